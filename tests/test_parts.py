"""Examples as one batch and in parts, how many fit, and errors summed over parts."""

import pytest
import torch
from torch import nn

from rarefy.errors import DataError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.model import GraphModel
from rarefy.pruning.running import examples
from rarefy.pruning.running.examples import Misses, affordable, collect, distance, parts


def network() -> GraphModel:
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    return graph_model(net, capture(net, torch.randn(2, 4)))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("part", [1, 2000, 1 << 25])
def test_parts_are_all_examples_in_order_and_none_is_alone(size, part, monkeypatch) -> None:
    monkeypatch.setattr(examples, "PART", part)
    x, y = torch.randn(size, 4), torch.ones(3)
    found = parts(network(), (x, y))
    assert torch.equal(torch.cat([a for a, _ in found]), x)
    assert all(b is y or torch.equal(b, y) for _, b in found) or size == 3
    lengths = [len(a) for a, _ in found]
    assert min(lengths) >= min(2, size)
    assert max(lengths) - min(lengths) <= 1
    assert len(found) == 1 or part < 1 << 25


def test_less_is_held_between_layers_than_within(monkeypatch) -> None:
    monkeypatch.setattr(examples, "MEMORY", 10_000)
    net = network()
    last = [n.name for n in net.graph.calls][-1]
    assert affordable(net, 1000, [last]) > affordable(net, 1000)


def test_errors_of_parts_are_those_of_the_whole() -> None:
    found, expected = torch.randn(10, 3), torch.randn(10, 3)
    expected[2, 1] = torch.inf
    misses = Misses()
    for start, stop in ((0, 4), (4, 10)):
        misses.add([found[start:stop]], [expected[start:stop]])
    assert misses.relative == pytest.approx(distance([[found]], [[expected]], [None]))
    kept = torch.isfinite(expected)
    error = (found - expected)[kept].square().sum() / expected[kept].square().sum()
    assert misses.relative == pytest.approx(float(error))


def test_texts_padded_to_the_longest_of_their_batch_are_padded_to_the_longest_of_all() -> None:
    lengths = (3, 5, 4)
    given = [
        {
            "ids": torch.full((2, n), n),
            "more": (torch.ones(2, n, 1), 7),
            "attention_mask": torch.ones(2, n),
        }
        for n in lengths
    ]
    given[1] = dict(reversed(given[1].items()))
    joined, single = collect(given, 5)
    assert single["ids"].shape == (2, 5)
    assert joined["more"][1] == 7
    assert joined["more"][0].shape == (5, 5, 1)
    for n, ids, mask in zip((3, 3, 5, 5, 4), joined["ids"], joined["attention_mask"], strict=True):
        assert ids.tolist() == [n] * n + [0] * (5 - n)
        assert mask.tolist() == [1] * n + [0] * (5 - n)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(2, 3), "y": torch.ones(2)},
        {"x": torch.ones(2, 3, 1)},
        {"x": torch.ones(2, 4)},
        {"z": 1},
    ],
)
def test_batches_with_other_arguments_or_sizes_are_refused(other) -> None:
    with pytest.raises(DataError, match=r"different arguments|several sizes|no tensor"):
        collect([{"x": torch.ones(2, 3)}, other], 4)
