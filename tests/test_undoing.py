"""Changes of which the first so many are kept."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rarefy.graph.capture import capture, graph_model
from rarefy.pruning.repairing.undoing import Changes, first_that_hold
from rarefy.pruning.running.products import Entries


@given(st.integers(1, 300), st.data())
def test_the_number_found_holds_its_successor_does_not_and_few_are_tried(count, data) -> None:
    good = data.draw(st.sets(st.integers(1, count - 1)) if count > 1 else st.just(set()))
    tried = []

    def holds(kept: int) -> bool:
        tried.append(kept)
        return kept in good

    found = first_that_hold(count, holds)
    assert found == 0 or found in good
    assert found + 1 not in good
    assert set(tried) <= set(range(1, count))
    assert len(tried) <= 2 * math.log2(count) + 2


@given(st.integers(2, 300), st.data())
def test_where_fewer_always_hold_the_most_are_found(count, data) -> None:
    most = data.draw(st.integers(0, count - 1))
    assert first_that_hold(count, lambda kept: kept <= most) == most


def test_changes_are_written_and_taken_back() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), torch.zeros(2, 3)
    captured = capture(net, x)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    plain, changed = graph_model(net, captured), graph_model(other, captured)
    paths = [("0.weight", "0.bias"), ("1.weight",)]
    made = [[Entries(p, tuple(net.get_parameter(p).shape)) for p in each] for each in paths]
    before, after = ({k: v.clone() for k, v in m.state_dict().items()} for m in (net, other))
    changes = Changes(changed, plain, made)
    for kept in (0, 1, 2, 1):
        with torch.no_grad():
            changes.keep(kept)
        new = {path for each in paths[:kept] for path in each}
        for path in ("0.weight", "0.bias", "1.weight"):
            source = after if path in new else before
            assert torch.equal(other.get_parameter(path), source[path])
    assert torch.equal(net.get_parameter("0.weight"), before["0.weight"])
