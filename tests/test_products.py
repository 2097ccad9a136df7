"""Which entries of which parameter calls multiply with, and how."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from product_networks import IMAGE, Reads, X, graph
from rarefy.pruning.running.products import handed, inputs_dim, matrix, products


def of(net: nn.Module, *inputs: torch.Tensor):
    """Its products, and what nodes hand on."""
    found = graph(net, *inputs)
    return list(products(found, found.tensor_paths)), handed(found, found.tensor_paths)


SUMMED = {
    "linear": (nn.Linear(4, 3), X, 1),
    "one input": (Reads((3, 1), lambda x, w, b: F.linear(x[..., :1], w)), X, 1),
    "one output": (Reads((4, 1), lambda x, w, b: x @ w), X, 0),
    "one of both": (Reads((1, 1), lambda x, w, b: F.linear(x[..., :1], w)), X, 1),
    "turned": (Reads((4, 3), lambda x, w, b: x @ w), X, 0),
    "a part": (Reads((4, 6), lambda x, w, b: x @ w[:, 1:4]), X, 0),
    "conv": (nn.Conv2d(4, 6, 3), IMAGE, 1),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), IMAGE, 0),
    "a layer of a stack": (Reads((2, 3, 4), lambda x, w, b: F.linear(x, w[1])), X, None),
    "some inputs": (Reads((3, 8), lambda x, w, b: F.linear(x, w[:, 2:6])), X, None),
    "a kernel in another shape": (
        Reads((3, 8), lambda x, w, b: F.conv1d(x.mT, w.view(3, 4, 2))),
        X,
        None,
    ),
    "a kernel turned": (Reads((4, 3, 2), lambda x, w, b: F.conv1d(x.mT, w.transpose(0, 1))), X, 0),
    "two": (Reads((5, 4, 3), lambda x, w, b: torch.einsum("bhk,hko->bo", x, w)), X, None),
    "each": (Reads((5, 4, 3), lambda x, w, b: torch.einsum("btc,tcd->btd", x, w)), X, None),
}


CONVS = ("conv", "transposed", "a kernel turned")  # where their rows are is for the tests of inputs


@pytest.mark.parametrize("name", SUMMED)
def test_the_dimension_that_is_summed_over(name) -> None:
    net, x, dim = SUMMED[name]
    (product,), _ = of(net, x)
    assert inputs_dim(product) == dim


@pytest.mark.parametrize(
    "name",
    [name for name, (net, _, dim) in SUMMED.items() if dim is not None and name not in CONVS],
)
def test_the_matrix_times_the_inputs_is_the_result(name) -> None:
    net, x, _ = SUMMED[name]
    (product,), _ = of(net, x)
    weight = net.weight.detach().flatten()[matrix(product, product.index)][0]
    rows = x[..., : weight.shape[1]]
    expected = net(x) if product.bias is None else net(x) - net.bias
    torch.testing.assert_close(rows @ weight.T, expected)


def test_views_of_one_kind_are_the_same_entries() -> None:
    def call(x, w, b):
        return F.linear(x, w[1:3]) + F.linear(x, w[1:3]) * F.linear(x, w[2:4]) + F.linear(x, w[3:5])

    found, held = of(Reads((6, 4), call), X)
    a, b, c, d = (product.entries for product in found)
    assert a.key == b.key
    assert len({a.key, c.key, d.key}) == 3
    assert a.overlap(b)
    assert a.overlap(c)
    assert not a.overlap(d)
    assert a.index.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert {entries.path for entries in held.values()} == {"weight"}


def test_what_is_not_handed_on_as_it_is() -> None:
    def call(x, w, b):
        return F.linear(x, w * 2) + F.linear(x, w.clone()) + F.linear(x, torch.cat([w[:1], w[1:]]))

    found, _ = of(Reads((3, 4), call), X)
    assert not found
    assert not of(Reads((4, 4), lambda x, w, b: x @ torch.mm(w, w)), X)[0]
    found, _ = of(Reads((4, 4, 2), lambda x, w, b: (x + 0j) @ torch.view_as_complex(w)), X)
    assert not found


VIEWS = {
    "row": lambda w: w[1],
    "part of a row": lambda w: w[0, 2:, ::2],
    "turned": lambda w: w[:, 1:].transpose(1, 2),
    "reshaped": lambda w: w.transpose(0, 1).reshape(3, -1)[:2],
    "unbound": lambda w: w.unbind(1)[2],
    "in windows": lambda w: w.unfold(1, 2, 1)[:, 1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_positions_are_those_of_the_entries(name) -> None:
    take = VIEWS[name]
    _, held = of(Reads((2, 3, 4), lambda x, w, b: x.sum() * take(w)), X)
    entries = list(held.values())[-1]
    every = torch.arange(24).view(2, 3, 4)
    assert torch.equal(entries.index, take(every))
    assert entries.span == (int(take(every).min()), int(take(every).max()))


def test_of_two_parameters_the_second_is_multiplied_with() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.project = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 5)

        def forward(self, x):
            return x @ self.project(self.queries).T

    (project,), _ = of(Queries(), torch.randn(2, 5))
    assert (project.path, project.bias.path) == ("project.weight", "project.bias")
