"""What may go of each group: bounds, names, patterns, and the layers that they concern."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.errors import InputError
from rarefy.graph.trace import trace
from rarefy.pruning.prune import prune
from rarefy.pruning.selection.limits import Range, ranges
from rarefy.types import Budget, Limit

torch.set_num_threads(1)
QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)


class Net(nn.Module):
    """A stream of 12 that two layers write to, two inner layers of 10 and 8, a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, n, 1), nn.ReLU(), nn.Conv2d(n, 12, 1)) for n in (10, 8)
        )
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(torch.relu(self.up(x)))


NET = Net().eval()
X = torch.zeros(2, 3, 4, 4)
NETWORK = trace(NET, X)


def most(budget: Budget, exclude: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """The least and the largest number of units that may go, by group."""
    found = ranges(NETWORK, NET, budget, exclude)
    return {NETWORK.groups[g].name: (r.low, r.high) for g, r in found.items()}


def half(**options: object) -> Budget:
    return Budget(sparsity=0.5, max_drop=0.5, **options)


def test_without_limits_the_budget_bounds_all() -> None:
    assert most(half()) == {
        "stem": (0, 6),
        "blocks.0.0": (0, 5),
        "blocks.1.0": (0, 4),
        "up": (0, 3),
    }


@pytest.mark.parametrize(
    ("layers", "changed"),
    [
        ({"blocks.0.0": 0.3}, {"blocks.0.0": (3, 3)}),
        ({"blocks.0": 0.3}, {"blocks.0.0": (3, 3), "stem": (3, 3)}),  # its last layer: the stream
        ({"blocks.*.0": Limit(min_keep=7)}, {"blocks.0.0": (0, 3), "blocks.1.0": (0, 1)}),
        ({"blocks.1.2": Limit(max_drop=0)}, {"stem": (0, 0)}),
        ({"up": Limit(max_drop=1)}, {"up": (0, 5)}),
        ({"up.weight": 0.99}, {"up": (5, 5)}),
        ({"*": 0.2, "up": Limit(min_keep=2)}, {"stem": (2, 2), "blocks.0.0": (2, 2),
                                               "blocks.1.0": (1, 1), "up": (0, 3)}),
        ({"up": Limit(min_keep=2), "*": 0.2}, {"stem": (2, 2), "blocks.0.0": (2, 2),
                                               "blocks.1.0": (1, 1), "up": (1, 1)}),
    ],
)  # fmt: skip
def test_limits_concern_the_outputs_of_the_layers_named(layers, changed) -> None:
    assert most(half(layers=layers)) == {**most(half()), **changed}


def test_excluded_patterns_take_groups_out() -> None:
    assert set(most(half(), ("blocks.*.0", "up"))) == {"stem"}


@pytest.mark.parametrize("name", ["blocks.0.O", "blocks.?.7", "stemm"])
def test_a_name_that_matches_nothing_lists_the_nearest(name) -> None:
    for budget, exclude in ((half(layers={name: 0.5}), ()), (half(), (name,))):
        with pytest.raises(InputError, match=r"Did you mean (blocks\.|stem)") as caught:
            ranges(NETWORK, NET, budget, exclude)
        assert repr(name) in str(caught.value)


def test_a_limit_of_a_layer_that_cannot_shrink_is_refused() -> None:
    with pytest.raises(InputError, match="none of its outputs can be removed"):
        most(half(layers={"out": 0.5}))


def test_limits_hold_in_the_pruned_network() -> None:
    limits = {"blocks.0.0": 0.3, "stem": Limit(max_drop=0), "up": Limit(min_keep=5)}
    small = prune(NET, X, Budget(macs=0.8, layers=limits))
    assert small.blocks[0][0].out_channels == 7
    assert small.stem.out_channels == 12
    assert small.up.out_channels >= 5


@QUICK
@given(st.integers(1, 70), st.data())
def test_steps_up_and_down_visit_what_may_go(size, data) -> None:
    high = data.draw(st.integers(0, size - 1))
    step = data.draw(st.sampled_from([1, 2, 8, 16]))
    bounds = Range(size, 0, high, step)
    allowed = [n for n in range(high + 1) if size <= step or n == 0 or (size - n) % step == 0]
    count = 0
    for expected in allowed[1:]:
        count = bounds.more(count)
        assert count == expected
    assert bounds.more(count) == count
    for expected in reversed(allowed[:-1]):
        count = bounds.fewer(count)
        assert count == expected
    assert bounds.fewer(0) == 0


@QUICK
@given(st.integers(1, 70), st.integers(0, 80), st.data())
def test_the_nearest_number_never_removes_more_than_asked(size, count, data) -> None:
    high = data.draw(st.integers(0, size - 1))
    step = data.draw(st.sampled_from([1, 2, 8, 16]))
    found = Range(size, 0, high, step).nearest(count)
    assert 0 <= found <= min(count, high)
    assert size <= step or found == 0 or (size - found) % step == 0
