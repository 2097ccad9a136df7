"""Stacks of layers, which of them can go, and which are picked."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.graph.stacks import evenly, find_stacks, spread
from rarefy.graph.trace import trace
from residual_networks import Residual, inputs

torch.set_num_threads(1)


@given(st.integers(1, 80), st.data())
def test_layers_are_picked_at_equal_distances(count, data) -> None:
    keep = data.draw(st.integers(1, count))
    picks = evenly(count, keep)
    assert len(set(picks)) == keep
    assert picks == tuple(sorted(picks))
    assert picks[0] == 0
    if keep > 1:
        assert picks[-1] == count - 1
        exact = torch.linspace(0, count - 1, keep, dtype=torch.float64)
        assert (torch.tensor(picks) - exact).abs().max() <= 0.5 + 1e-9
        steps = [b - a for a, b in pairwise(picks)]
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("count", "picks"), [(12, (0, 2, 4, 7, 9, 11)), (12, (0, 4, 7, 11)), (6, (0, 3, 5)), (5, (0,))]
)
def test_picks_are_those_of_distilbert(count, picks) -> None:
    assert evenly(count, len(picks)) == picks


@given(st.integers(1, 30), st.data())
def test_what_has_to_stay_counts(count, data) -> None:
    keep = data.draw(st.integers(1, count))
    fixed = data.draw(st.sets(st.integers(0, count - 1)))
    picks = spread(count, keep, sorted(fixed))
    assert fixed <= set(picks)
    assert len(picks) == max(keep, len(fixed))
    assert picks == tuple(sorted(set(picks)))
    if not fixed - set(evenly(count, keep)):
        assert picks == evenly(count, keep)


def test_children_of_one_class_make_a_stack() -> None:
    model = Residual(("PreNorm", "PreNorm", "Basic", "Basic", "Basic", "Half"))
    found = find_stacks(model, trace(model, inputs()))
    assert [(s.path, s.names) for s in found] == [
        ("blocks", ("0", "1")),
        ("blocks", ("2", "3", "4")),
    ]
    assert all(s.layers.keys() == set(s.names) for s in found)


class Stack(nn.Module):
    """Layers in a list, called by a forward of one's own."""

    def __init__(self, layers, body) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(make() for make in layers)
            self.head = nn.Linear(6, 3)
        self.body = body
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, x))


class PostNorm(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.skip = nn.Linear(6, width) if width != 6 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.skip(x) + torch.relu(self.fc(x)))


class Leaky(PostNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.fc(x)
        return self.norm(x + torch.relu(inner)), inner


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def stacks(layers, body):
    model = Stack(layers, body)
    return find_stacks(model, trace(model, X))


def in_turn(model: Stack, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x)
    return x


def test_a_layer_goes_with_the_normalization_after_its_sum() -> None:
    (found,) = stacks([PostNorm] * 3, in_turn)
    (layer,) = found.layers["1"]
    assert layer.branch == ""
    assert {*layer.tensors} == {
        f"layers.1.{name}" for name in ("fc.weight", "fc.bias", "norm.weight", "norm.bias")
    }
    assert (layer.params, layer.macs) == (6 * 6 + 3 * 6, 36)


def test_a_layer_of_which_more_is_read_than_its_output_stays() -> None:
    def body(model, x):
        kept = []
        for layer in model.layers:
            x, inner = layer(x)
            kept.append(inner)
        return x + kept[0]

    (found,) = stacks([Leaky] * 3, body)
    assert found.layers.keys() == {"1", "2"}
    assert "2 values leave it" in found.stuck["0"]


def test_branches_that_the_forward_outside_adds_are_layers_too() -> None:
    def body(model, x):
        for layer in model.layers:
            x = x + layer(x)
        return x

    (found,) = stacks([lambda: nn.Linear(6, 6)] * 3, body)
    assert [block.name for name in found.names for block in found.layers[name]] == [
        "layers.0", "layers.1", "layers.2",
    ]  # fmt: skip


def test_plain_layers_are_no_stack() -> None:
    assert stacks([lambda: nn.Linear(6, 6)] * 3, in_turn) == ()


def test_of_nested_stacks_the_longer_one_counts() -> None:
    pair = lambda: nn.Sequential(PostNorm(), PostNorm())  # noqa: E731
    four = lambda: nn.Sequential(*(PostNorm() for _ in range(4)))  # noqa: E731
    assert [s.path for s in stacks([pair] * 3, in_turn)] == ["layers"]
    assert [s.path for s in stacks([four] * 2, in_turn)] == ["layers.0", "layers.1"]
