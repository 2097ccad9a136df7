"""Parameters that are shared, computed, frozen, or used without a module of their own."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rarefy as rf
from rarefy.graph.trace import trace

torch.set_num_threads(1)
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
HALF = rf.Budget(sparsity=0.5, scope="local")


class Tied(nn.Module):
    """A table of embeddings that is the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.table(x)).relu())


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.out(self.inner(self.inner(y).relu()).relu())


class Repeated(nn.Module):
    """One block registered three times."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.first, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList([block] * 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for block in self.blocks:
            y = y + block(y)
        return self.out(y)


class OneWeight(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(32, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x).relu(), self.b(x).tanh()], -1))


class Buffers(nn.Module):
    """A frozen layer, a buffer that is saved, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 16).requires_grad_(False), nn.Linear(16, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 16)[None])
        self.register_buffer("scale", torch.linspace(0.5, 2, 16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.first(x) * self.scale + self.shift).relu())


class Lists(nn.Module):
    """Parameters in lists and dictionaries, used by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(16, 5), torch.randn(3, 16)])
        self.biases = nn.ParameterDict({"first": torch.randn(16), "second": torch.randn(3)})

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weights[0], self.biases["first"]).relu()
        return F.linear(y, self.weights[1], self.biases["second"])


class Computed(nn.Module):
    """A weight that is a product of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(16, 5)), nn.Parameter(torch.randn(16, 1))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.weight * self.scale).relu())


class Recurrent(nn.Module):
    """A recurrent layer whose recurrent weight is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = parametrizations.weight_norm(nn.GRU(5, 16), "weight_hh_l0")
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.unsqueeze(0))[0]).squeeze(0)


class Scale(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 12)[:, None])

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class Clamp(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(-0.3, 0.3)


class Softplus(nn.Module):
    """A parametrization that is not zero where its parameter is."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


def layers(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """Three layers, the second of which is changed."""

    def build() -> nn.Module:
        net = nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older ones warn that there are newer ones
            change(net[2])
        return net

    return build


def parametrized(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return layers(lambda layer: parametrize.register_parametrization(layer, "weight", build()))


def legacy(name: str) -> Callable[[nn.Module], object]:
    return lambda layer: getattr(nn.utils, name)(layer)


TWO = [16, 12]
NETWORKS = {
    "tied embeddings": (Tied, TOKENS, [16]),
    "a layer called twice": (Twice, X, [16]),
    "a block registered thrice": (Repeated, X, [16, 32]),
    "one weight in two layers": (OneWeight, X, [16]),
    "buffers and frozen layers": (Buffers, X, [16]),
    "lists and dictionaries": (Lists, X, [16]),
    "computed weight": (Computed, X, [16]),
    "recurrent weight": (Recurrent, X, [16]),
    "scale": (parametrized(Scale), X, TWO),
    "clamp": (parametrized(Clamp), X, TWO),
    "softplus": (parametrized(Softplus), X, TWO),
    "weight norm": (layers(parametrizations.weight_norm), X, TWO),
    "weight norm of columns": (layers(lambda m: parametrizations.weight_norm(m, dim=1)), X, TWO),
    "weight norm of all": (layers(lambda m: parametrizations.weight_norm(m, dim=None)), X, TWO),
    "older weight norm": (layers(legacy("weight_norm")), X, TWO),
    "spectral norm": (layers(parametrizations.spectral_norm), X, TWO),
    "older spectral norm": (layers(legacy("spectral_norm")), X, TWO),
    "mask of torch.nn.utils.prune": (
        layers(lambda m: prune.l1_unstructured(m, "weight", 0.3)),
        X,
        TWO,
    ),
    "orthogonal": (layers(parametrizations.orthogonal), X, [16]),
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_pruned_with_its_class_saved_loaded_and_trained(name, tmp_path) -> None:
    build, inputs, expected = NETWORKS[name]
    net = seeded(build)
    network = trace(net, inputs)
    assert sorted(map(len, network.groups)) == sorted(expected)
    small = rf.prune(net, inputs, HALF, criterion="random")
    assert small.pruned.kind == "module"
    assert type(small) is type(net)
    before, after = dict(net.named_parameters()), dict(small.named_parameters())
    assert before.keys() == after.keys()
    assert [p.requires_grad for p in before.values()] == [p.requires_grad for p in after.values()]
    assert sum(p.numel() for p in after.values()) < 0.9 * sum(p.numel() for p in before.values())
    y = small(inputs)
    loaded = rf.load(rf.save(small, tmp_path / "small.safetensors"), build())
    assert torch.equal(loaded(inputs), y)
    for module in (small, loaded):
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
    small.train()(inputs).sum().backward()
    trained = [p for p in small.parameters() if p.requires_grad]
    assert all(p.grad is None or p.grad.shape == p.shape for p in trained)


def test_shared_parameters_stay_shared() -> None:
    small = rf.prune(seeded(Tied), TOKENS, HALF)
    assert small.head.weight is small.table.weight
    assert small.table.weight.shape == (20, 8)
    small = rf.prune(seeded(OneWeight), X, HALF)
    assert small.a.weight is small.b.weight
    small = rf.prune(seeded(Repeated), X, HALF)
    assert small.blocks[0] is small.blocks[2]


def test_tied_embeddings_equal_the_formula() -> None:
    net = seeded(Tied)
    small = rf.prune(net, TOKENS, HALF, criterion="random")
    width, hidden = (small.pruned.kept[key] for key in (("table.weight", 1), ("inner.weight", 1)))
    assert width.tolist() == hidden.tolist()
    table = net.table.weight[:, width]
    y = F.linear(table[TOKENS], net.inner.weight[:, width], net.inner.bias)
    kept = small.pruned.kept["inner.weight", 0]
    expected = y[..., kept].relu() @ table.t()
    assert kept.tolist() == width.tolist()
    assert torch.allclose(small(TOKENS), expected, atol=1e-6)


class Unregistered(nn.Module):
    """A tensor in a plain list, which no state dict holds and no cast reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
        self.held = [torch.linspace(0.5, 2, 16)]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).relu() * self.held[0])


def test_tensors_that_are_not_registered_shrink_in_the_graph_only() -> None:
    net = seeded(Unregistered)
    small = rf.prune(net, X, HALF, criterion="random")
    assert small.pruned.kind == "graph"
    assert small.pruned.reason
    assert net.held[0].shape == (16,)
    reference = copy.deepcopy(net)
    kept = small.pruned.kept["first.weight", 0]
    gone = [n for n in range(16) if n not in kept]
    with torch.no_grad():
        reference.first.weight[gone] = 0
        reference.first.bias[gone] = 0
    assert torch.allclose(small(X), reference(X), atol=1e-5)
