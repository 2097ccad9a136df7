"""Which layers go together, and where what a layer should give is found."""

import pytest
import torch
from torch import nn

from rarefy.graph.capture import capture
from rarefy.graph.program import Graph
from rarefy.pruning.repairing.pairs import StrangersError, layer_pairs
from rarefy.pruning.running.solvable import next_norm


class Net(nn.Module):
    def __init__(self, *, has_norm: bool = True, is_late: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.n, self.has_norm, self.is_late = nn.BatchNorm2d(4), has_norm, is_late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if self.has_norm and not self.is_late:
            y = self.n(y)
        z = self.b(x)
        if self.has_norm and self.is_late:
            y = self.n(y)
        return y + z


def graph(**options: bool) -> Graph:
    return capture(Net(**options).eval(), torch.randn(2, 3, 6, 6)).graph


def test_a_norm_of_both_networks_is_a_pair_of_its_own() -> None:
    pairs, alone = layer_pairs(graph(), graph())
    assert [p.right.kind for (p,) in pairs] == ["conv2d", "batch_norm", "conv2d"]
    assert all(p.end is p.left for (p,) in pairs)
    assert not alone


def test_a_norm_that_only_the_original_has_belongs_to_the_layer_before() -> None:
    pairs, alone = layer_pairs(graph(), graph(has_norm=False))
    assert [(p.left.kind, p.end.kind) for (p,) in pairs] == [
        ("conv2d", "batch_norm"),
        ("conv2d", "conv2d"),
    ]
    assert not alone


def test_what_is_only_known_behind_the_next_layer_is_left_alone() -> None:
    pairs, alone = layer_pairs(graph(is_late=True), graph(has_norm=False))
    assert [p.right.scope for (p,) in pairs] == ["b"]
    assert [node.scope for node in alone] == ["a"]


class Twice(nn.Module):
    """Calls in a row: of one layer, the last of them on what the first gave, and on one query."""

    def __init__(self, *, is_deep: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.query, self.is_deep = nn.Parameter(torch.randn(2, 4)), is_deep

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.is_deep:
            return self.b(self.query), self.c(self.query)
        one, two = self.a(x), self.a(y)
        return two, self.a(one)


@pytest.mark.parametrize(("is_deep", "sizes"), [(True, [2, 1]), (False, [1, 1])])
def test_calls_of_one_weight_that_read_none_of_the_others_are_a_group(is_deep, sizes) -> None:
    found = capture(Twice(is_deep=is_deep).eval(), (torch.randn(2, 4), torch.randn(2, 4))).graph
    assert [len(group) for group in layer_pairs(found, found)[0]] == sizes


def test_next_norm_is_that_of_the_result_alone() -> None:
    found = graph()
    layers = {n.scope: n for n in found.calls if n.kind == "conv2d"}
    norm = next_norm(found, layers["a"])
    assert norm is not None
    assert norm.kind == "batch_norm"
    assert next_norm(found, layers["b"]) is None


def test_strangers_are_refused() -> None:
    other = capture(nn.Linear(3, 2), torch.randn(2, 3)).graph
    with pytest.raises(StrangersError, match="same operators"):
        layer_pairs(graph(), other)
