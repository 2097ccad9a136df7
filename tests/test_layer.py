"""A call as the layer that a runtime sees: widths, repetitions and all else."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.graph.count import COSTS
from rarefy.graph.layer import Layer, layer
from rarefy.graph.trace import trace

torch.set_num_threads(1)


def found(net: nn.Module, *inputs: Tensor) -> list[Layer]:
    graph = trace(net.eval(), inputs).captured.graph

    def shape(name: str) -> tuple[int, ...]:
        return graph.by_name[name].shape

    layers = [(layer(graph, node, shape), node) for node in graph.calls]
    for own, node in layers:  # as many multiplications as the count has
        if own is not None:
            assert multiplications(own) == COSTS[node.kind](node, shape)
    return [own for own, _ in layers if own is not None]


def multiplications(own: Layer) -> int:
    """MACs by the fields of a layer alone."""
    if own.kind == "conv":
        extent, kernel, stride, before, after, dilation = own.form
        places, weights = 1, 1
        for n, k, s, a, b, d in zip(extent, kernel, stride, before, after, dilation, strict=True):
            places *= (n + a + b - d * (k - 1) - 1) // s + 1
            weights *= k
        return own.times * own.outer * places * own.inner * weights
    if own.kind == "attention":
        queries, keys = own.form[0]
        return own.times * queries * keys * (own.inner + own.outer)
    rows = own.form[0][0] if own.kind == "product" else 1
    return own.times * rows * own.inner * own.outer


@pytest.mark.parametrize(
    ("conv", "inner", "outer", "groups"),
    [
        (nn.Conv2d(6, 10, 3, stride=2, padding=(1, 0)), 6, 10, 1),
        (nn.Conv2d(6, 12, 3, groups=6, dilation=2), 1, 12, 6),
        (nn.Conv2d(6, 9, 5, groups=3, padding="same"), 2, 9, 3),
        (nn.Conv2d(6, 9, 4, padding="same"), 6, 9, 1),
        (nn.Conv2d(6, 9, 3, padding="valid"), 6, 9, 1),
    ],
)
def test_convolutions(conv, inner, outer, groups) -> None:
    (own,) = found(nn.Sequential(conv), torch.randn(3, 6, 11, 9))
    assert (own.inner, own.outer, own.groups, own.times) == (inner, outer, groups, 3)
    assert own.form[0] == (11, 9)


def test_other_ranks() -> None:
    assert (
        len(found(nn.Sequential(nn.Conv1d(4, 5, 3), nn.Conv1d(5, 2, 1)), torch.zeros(2, 4, 9))) == 2
    )
    (own,) = found(nn.Sequential(nn.Conv3d(4, 5, 2)), torch.zeros(2, 4, 5, 6, 7))
    assert own.form[0] == (5, 6, 7)


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        scores = y @ y.transpose(1, 2)
        mixed = torch.einsum("bnm,bmc->bnc", scores, y)
        heads = mixed.view(mixed.shape[0], mixed.shape[1], 2, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


def test_products_and_attention() -> None:
    assert found(Products(), torch.randn(3, 5, 8)) == [
        Layer("matmul", 8, 6, times=15),
        Layer("product", 6, 5, times=3, form=((5,),)),
        Layer("product", 5, 6, times=3, form=((5,),)),
        Layer("attention", 3, 3, times=6, form=((5, 5),)),
    ]


def test_what_is_no_layer() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.BatchNorm2d(4))
    assert found(net, torch.randn(2, 3, 4, 4)) == []
