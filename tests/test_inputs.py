"""What weights are multiplied by, against the Jacobian of the outputs by the weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call

from rarefy.graph.capture import graph_model
from rarefy.graph.trace import trace
from rarefy.pruning.running.inputs import rows
from rarefy.pruning.running.lockstep import Run
from rarefy.pruning.running.products import products
from rarefy.pruning.scoring.gather import gather


class Functional(nn.Module):
    """A weight that is read through a view, by a functional call."""

    def __init__(self, shape, call) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(shape))
        self.call = call

    def forward(self, x):
        return self.call(x, self.weight)


def layer(kind, *args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args, **options)


X = {
    1: torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),
    2: torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)),
    3: torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(1)),
    4: torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1)),
    5: torch.randn(2, 4, 3, 4, 3, generator=torch.Generator().manual_seed(1)),
}

LAYERS = {
    "linear": (layer(nn.Linear, 4, 3), X[1]),
    "linear on a sequence": (layer(nn.Linear, 4, 3), X[2]),
    "conv1d": (layer(nn.Conv1d, 4, 3, 3, stride=2, padding=1), X[3]),
    "conv1d same": (layer(nn.Conv1d, 4, 3, 4, dilation=2, padding="same"), X[3]),
    "conv2d": (
        layer(nn.Conv2d, 4, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        X[4],
    ),
    "conv3d": (layer(nn.Conv3d, 4, 2, 2, stride=(1, 2, 1), padding=1), X[5]),
    "grouped": (layer(nn.Conv2d, 4, 6, 3, padding=1, groups=2), X[4]),
    "depthwise": (layer(nn.Conv2d, 4, 4, 3, padding=1, groups=4), X[4]),
    "transposed": (
        layer(nn.ConvTranspose2d, 4, 3, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 0)),
        X[4],
    ),
    "transposed, grouped, dilated": (
        layer(nn.ConvTranspose1d, 4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        X[3],
    ),
    "addmm": (
        Functional((4, 3), lambda x, w: torch.addmm(w[0], x.view(-1, 4), w).view(3, 5, 3)),
        X[2],
    ),
    "matmul from the left": (Functional((6, 5), lambda x, w: torch.matmul(w, x)), X[2]),
    "einsum": (Functional((4, 2, 3), lambda x, w: torch.einsum("btc,chd->bthd", x, w)), X[2]),
    "a slice, transposed": (Functional((4, 8), lambda x, w: F.linear(x, w[:, 2:5].t())), X[2]),
    "cast": (Functional((3, 4), lambda x, w: F.linear(x, w.to(x.dtype))), X[2]),
    "one matrix per position": (
        Functional((5, 4, 3), lambda x, w: torch.einsum("btc,tcd->btd", x, w)),
        X[2],
    ),
}


def columns(net, x):
    """The Jacobian of all outputs by the weight: (outputs, weights)."""
    net = net.double()
    others = {n: p.detach() for n, p in net.named_parameters() if n != "weight"}

    def outputs(weight):
        return functional_call(net, {"weight": weight, **others}, (x.double(),)).flatten()

    return jacobian(outputs, net.weight.detach()).flatten(1)


@pytest.mark.parametrize("name", LAYERS)
def test_norms_and_gram_matrices_are_those_of_the_jacobian(name) -> None:
    net, x = LAYERS[name]
    jac = columns(net, x) if name != "addmm" else None
    network = trace(net.double(), x.double())
    data = [x.double()[:2], x.double()[2:]] if len(x) > 2 else [x.double()]
    if name == "addmm":  # the weight is its own bias: the product alone
        flat = x.double().view(-1, 4)
        jac = torch.einsum("rc,od->rocd", flat, torch.eye(3).double()).flatten(2).flatten(0, 1)
        data = [x.double()]
    expected = jac.T @ jac / len(x)
    norms = gather(net, network, frozenset({"norms"}), data).norms["weight"]
    torch.testing.assert_close(norms.flatten().double(), expected.diagonal())
    (gram,) = gather(net, network, frozenset({"grams"}), data).grams["weight"]
    groups, outputs, unknowns = gram.index.shape
    for g in range(groups):
        for o in range(outputs):
            at = gram.index[g, o]
            torch.testing.assert_close(gram.matrix[g], expected[at[:, None], at])
    assert groups * outputs * unknowns == gram.index.unique().numel()


def test_packed_projections_of_attention_are_seen() -> None:
    net = layer(nn.MultiheadAttention, 8, 2, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = trace(net, (x, x, x))
    found = gather(net, network, frozenset({"norms", "grams"}), [((x, x, x), None)])
    expected = x.square().sum((0, 1)) / 3
    torch.testing.assert_close(found.norms["in_proj_weight"].double(), expected.expand(24, 8))
    (gram,) = found.grams["in_proj_weight"]
    torch.testing.assert_close(gram.matrix[0], torch.einsum("bti,btj->ij", x, x) / 3)
    keys = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    across = gather(net, trace(net, (x, keys, keys)), frozenset({"norms"}), [((x, keys, keys),)])
    torch.testing.assert_close(across.norms["in_proj_weight"][:8].double(), expected.expand(8, 8))
    expected = keys.square().sum((0, 1)) / 3
    torch.testing.assert_close(across.norms["in_proj_weight"][8:].double(), expected.expand(16, 8))


def test_a_weight_that_is_used_twice_sums_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    net = layer(Twice).double()
    x = X[1].double()
    inner = net.a(x).relu().detach()
    found = gather(net, trace(net, x), frozenset({"norms", "grams"}), [x])
    expected = (x.square().sum(0) + inner.square().sum(0)) / len(x)
    for path in ("a.weight", "b.weight"):
        torch.testing.assert_close(found.norms[path].double(), expected.expand(4, 4))
        (gram,) = found.grams[path]
        torch.testing.assert_close(gram.matrix[0], (x.T @ x + inner.T @ inner) / len(x))


@pytest.mark.parametrize("name", LAYERS)
def test_rows_that_are_drawn_are_some_of_all(name) -> None:
    net, x = LAYERS[name]
    network = trace(net.double(), x.double())
    graph = graph_model(net, network.captured)
    (product,) = products(graph.graph, {"weight": net.weight})
    run = Run(graph, x.double())
    run.before(graph.graph.by_name[product.node.name])
    given = product, run.values[product.x], run.values[product.weight]
    (whole,) = rows(*given)
    (some,) = rows(*given, lambda n: n // 2, torch.Generator().manual_seed(3))
    order = torch.randperm(whole.every, generator=torch.Generator().manual_seed(3))
    assert some.every == whole.every == whole.inputs.shape[1]
    assert torch.equal(some.index, order[: whole.every // 2])
    assert torch.equal(some.inputs, whole.inputs[:, some.index])


def test_gram_matrices_of_large_images_are_estimated_without_bias(monkeypatch) -> None:
    net = layer(nn.Conv2d, 2, 3, 3, padding=1).double()
    x = torch.rand(4, 2, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = trace(net, x)
    needs = frozenset({"grams"})
    monkeypatch.setattr("rarefy.pruning.scoring.gather.LEAST", 0)
    found = [gather(net, network, needs, [x], seed=seed).grams["weight"][0] for seed in range(40)]
    monkeypatch.undo()
    (whole,) = gather(net, network, needs, [x[:1], *x[1:].split(1)]).grams["weight"]
    few = torch.stack([gram.matrix for gram in found])
    spread = few.std(0) / len(few) ** 0.5
    assert (spread > 0).all()
    assert ((few.mean(0) - whole.matrix).abs() < 5 * spread).all()


def test_large_gram_matrices_are_kept_as_blocks(monkeypatch) -> None:
    net, x = layer(nn.Linear, 8, 3).double(), torch.randn(5, 8, dtype=torch.float64)
    network = trace(net, x)
    (whole,) = gather(net, network, frozenset({"grams"}), [x]).grams["weight"]
    monkeypatch.setattr("rarefy.pruning.scoring.gather.LARGEST", 5)
    (parts,) = gather(net, network, frozenset({"grams"}), [x]).grams["weight"]
    assert tuple(parts.matrix.shape) == (2, 4, 4)
    torch.testing.assert_close(parts.matrix[0], whole.matrix[0, :4, :4])
    torch.testing.assert_close(parts.matrix[1], whole.matrix[0, 4:, 4:])
    assert torch.equal(parts.index[1], whole.index[0, :, 4:])


def test_embeddings_and_weights_that_are_computed_are_left_out() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.weight = nn.Embedding(6, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, ids):
            return F.linear(self.table(ids), self.weight / self.weight.norm())

    net, ids = Computed(), torch.tensor([[1, 2], [3, 4]])
    found = gather(net, trace(net, ids), frozenset({"norms", "grams"}), [ids])
    assert not found.norms
    assert not found.grams
