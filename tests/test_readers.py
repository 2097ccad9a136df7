"""Moments of inputs against the inputs unfolded by hand, columns against units at zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.graph.trace import Network, trace
from rarefy.pruning import readers
from rarefy.pruning.readers import Place, places
from rarefy.pruning.taps import Runner

LAYERS = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "strided": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)}),
    "dilated": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False}),
    "grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "1d": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "3d": (nn.Conv3d, {"kernel_size": (1, 3, 2), "padding": (0, 1, 0)}),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "linear": (nn.Linear, {}),
}


class Pair(nn.Module):
    """A layer whose units another one reads."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, options = LAYERS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rank = {"linear": 0, "1d": 1, "3d": 3}.get(name, 2)
            first = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
            self.a = first(3, 8) if rank == 0 else first(3, 8, 1)
            self.b = kind(8, 4, **options)
        self.rank = rank

    def forward(self, x):
        return self.b(self.a(x).relu())


def example(model: Pair, examples: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, 3, *[7, 6, 5][: model.rank], generator=generator)


def found(model: nn.Module, x: torch.Tensor, step: int = 3) -> tuple[Network, list[Place]]:
    network = trace(model.eval(), x)
    running = Runner(model, network).of(x)
    with torch.no_grad():
        return network, places(network, running, torch.split(x, step))


def gradients(layer: nn.Module, h: torch.Tensor, output: int) -> torch.Tensor:
    """Inputs of one output at all its places, as autograd has them: (rows, *shape of weight)."""
    weight = layer.weight.detach().double().requires_grad_()
    bias = {"bias": torch.zeros(layer.bias.shape).double()} if layer.bias is not None else {}
    given = {"weight": weight, **bias}
    result = torch.func.functional_call(layer.double(), given, (h.double(),))
    dim = 1 if h.ndim > 2 else -1
    entries = result.select(dim, output).flatten()
    return torch.stack([torch.autograd.grad(e, weight, retain_graph=True)[0] for e in entries])


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_the_inputs_unfolded(name) -> None:
    model = Pair(name)
    x = example(model)
    _network, every = found(model, x)
    assert len(every) == (2 if name == "grouped" else 1)
    h = model.a(x).relu().detach()
    for place in every:
        rows = gradients(model.b, h, place.first).flatten(1)[:, place.positions[0]]
        mean, about = rows.mean(0), rows - rows.mean(0)
        centered = place.mean is not None
        assert centered == (name != "dilated")
        used = about if centered else rows
        torch.testing.assert_close(
            place.reader.gram.double(), used.T @ used / len(rows), rtol=1e-4, atol=1e-6
        )
        if centered:
            torch.testing.assert_close(place.mean, mean, rtol=1e-4, atol=1e-6)
        entries = model.b.weight.detach().double().flatten()[place.positions]
        torch.testing.assert_close(place.reader.weight, entries)


@pytest.mark.parametrize("name", LAYERS)
def test_columns_at_zero_are_units_at_zero(name) -> None:
    model = Pair(name)
    x = example(model)
    network, every = found(model, x)
    h = model.a(x).relu().detach()
    dim = 1 if h.ndim > 2 else -1
    for place in every:
        for number, columns in place.reader.columns.items():
            (member,) = [m for m in network.groups[number].members if m.path == "a.weight"]
            for row, unit in enumerate(columns.units.tolist()):
                silent = h.index_fill(dim, torch.from_numpy(member.indices[unit]), 0)
                weight = model.b.weight.detach().clone()
                weight.view(-1)[place.positions[:, columns.index[row]]] = 0
                result = torch.func.functional_call(model.b, {"weight": weight}, (h,))
                own = torch.arange(place.first, place.first + len(place.positions))
                torch.testing.assert_close(
                    result.index_select(dim, own), model.b(silent).index_select(dim, own)
                )


def test_parts_of_any_size_give_the_same() -> None:
    model = Pair("linear")
    x = example(model, 7) + 100
    one, many = (found(model, x, step)[1][0] for step in (7, 2))
    torch.testing.assert_close(one.reader.gram, many.reader.gram, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(one.mean, many.mean)


def test_layers_with_the_same_inputs_share_their_gram_matrix() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 8)
            self.p, self.q, self.r = (nn.Linear(8, 4) for _ in range(3))

        def forward(self, x):
            h = self.a(x)
            first = self.p(h)
            second = self.q(h)
            h.relu_()
            return first + second + self.r(h)

    p, q, r = found(Three(), torch.randn(9, 3))[1]
    assert p.reader.gram.data_ptr() == q.reader.gram.data_ptr()
    assert not torch.allclose(p.reader.gram, r.reader.gram)


class Einsum(nn.Module):
    """Weights that are parameters of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(3, 8), nn.Parameter(torch.randn(8, 5))

    def forward(self, x):
        return torch.einsum("bi,io->bo", self.a(x).relu(), self.w)


def test_einsum_and_shared_weights_are_read() -> None:
    x = torch.randn(9, 3)
    model = Einsum()
    (place,) = found(model, x)[1]
    h = model.a(x).relu().detach().double()
    torch.testing.assert_close(place.reader.gram.double(), h.T @ h / 9, rtol=1e-4, atol=1e-6)
    assert place.mean is None

    class Twice(Einsum):
        def forward(self, x):
            return (self.a(x).relu() @ self.w) * (self.a(2 * x).relu() @ self.w)

    assert [place.path for place in found(Twice(), x)[1]] == ["w", "w"]


def test_conv1d_of_transformers_is_read() -> None:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(layer(8, 3), nn.ReLU(), layer(2, 8))
    x = torch.randn(4, 5, 3)
    (place,) = found(model, x)[1]
    h = F.relu(model[0](x)).detach().double().flatten(0, 1)
    torch.testing.assert_close(place.reader.gram.double(), torch.cov(h.T, correction=0), rtol=1e-4,
                               atol=1e-6)  # fmt: skip


def test_the_largest_are_left_out_where_memory_ends(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    monkeypatch.setattr(readers, "MEMORY", 4 * 4 * 4 + 6)
    assert [place.path for place in found(model, torch.randn(9, 3))[1]] == ["2.weight"]
