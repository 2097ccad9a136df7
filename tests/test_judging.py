"""Criteria in any form, and what they are asked for."""

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.errors import DataError, InputError
from rarefy.graph.trace import trace
from rarefy.pruning.scoring.compensated import Compensated
from rarefy.pruning.scoring.criteria import CRITERIA
from rarefy.pruning.scoring.judging import judged, named, on_data

DATA = [(torch.linspace(-1, 1, 24).view(6, 4), torch.arange(6) % 2)]


def network() -> tuple[nn.Module, object]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    return net, trace(net, DATA[0][0])


def test_names_and_values() -> None:
    assert named("compensated") == Compensated()
    assert named(Compensated(samples=3)) == Compensated(samples=3)
    assert named("l1") is CRITERIA["l1"]
    with pytest.raises(InputError, match="activation, compensated, or a function"):
        named("compensatd")


def test_what_asks_for_data() -> None:
    asking = {name for name in (*CRITERIA, "compensated") if on_data(name)}
    assert {"compensated", "fisher", "wanda"} <= asking
    assert not asking & {"magnitude", "l1", "random", "lamp", "fpgm", "norm_scale"}
    assert not on_data(lambda group, evidence: torch.ones(len(group)))


@pytest.mark.parametrize("name", [*CRITERIA, "compensated"])
def test_every_criterion_scores_every_unit(name) -> None:
    net, found = network()
    response = judged(net, found, name, DATA)
    (scores,) = response.scores
    assert scores.shape == (8,)
    assert np.isfinite(scores).all()
    assert (response.losses is None) == (name != "compensated")


@pytest.mark.parametrize("name", ["compensated", "fisher"])
def test_data_that_are_missing_are_asked_for(name) -> None:
    net, found = network()
    with pytest.raises(InputError, match="Give data="):
        judged(net, found, name)


def test_data_decide_where_no_criterion_is_given() -> None:
    net, traced = network()
    plain, informed = judged(net, traced), judged(net, traced, data=DATA)
    unlabelled = judged(net, traced, "fisher", [x for x, _ in DATA])
    assert np.array_equal(plain.scores[0], judged(net, traced, "magnitude").scores[0])
    assert np.array_equal(informed.scores[0], unlabelled.scores[0])
    assert not np.array_equal(plain.scores[0], informed.scores[0])


def test_labels_decide_where_their_loss_is_given() -> None:
    net, traced = network()
    loss = nn.functional.cross_entropy
    found = judged(net, traced, data=DATA, loss=loss)
    assert np.array_equal(found.scores[0], judged(net, traced, "fisher", DATA, loss).scores[0])


class Deciding(nn.Module):
    """Its outputs have no gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).argmax(1)


def test_where_data_tell_nothing_magnitude_decides_and_says_so() -> None:
    net = Deciding(network()[0])
    traced = trace(net, DATA[0][0])
    with pytest.warns(RuntimeWarning, match="scored by magnitude"):
        found = judged(net, traced, data=DATA)
    assert np.array_equal(found.scores[0], judged(net, traced, "magnitude").scores[0])


def test_data_that_cannot_be_used_are_refused_whatever_the_criterion() -> None:
    net, traced = network()
    with pytest.raises(DataError):
        judged(net, traced, data=[torch.full((2, 4), torch.nan)])


@pytest.mark.parametrize(
    "targets",
    [
        torch.linspace(-3, 3, 12).view(6, 2),
        torch.linspace(0, 3, 12).view(6, 2),
        torch.linspace(0, 1, 6),
    ],
    ids=["signed", "positive", "of another shape"],
)
def test_targets_of_real_numbers_tell_that_outputs_are_no_logits(targets) -> None:
    """Of real outputs a shift of all counts for nothing under softmax, and here it does."""
    net, _ = network()
    with torch.no_grad():  # a unit whose weights to both outputs are alike, and the largest
        net[2].weight[:, 3] = 5.0
        net[0].weight[3], net[0].bias[3] = 1.0, 2.0
    found = trace(net, DATA[0][0])
    x = DATA[0][0]
    as_logits = judged(net, found, data=[x])
    as_numbers = judged(net, found, data=[(x, targets)])
    assert as_logits.scores[0].argmax() != 3
    assert as_logits.scores[0][3] < 1e-9 < as_numbers.scores[0][3]
    assert as_numbers.scores[0].argmax() == 3


@pytest.mark.parametrize("targets", [torch.eye(2)[DATA[0][1]], DATA[0][1], ["a"] * 6])
def test_labels_of_other_kinds_tell_nothing_of_the_outputs(targets) -> None:
    net, found = network()
    x = DATA[0][0]
    one, two = (judged(net, found, data=data) for data in ([x], [(x, targets)]))
    assert np.array_equal(one.scores[0], two.scores[0])


@pytest.mark.parametrize("other", ["boxes", "mask"])
def test_outputs_beside_logits_count(other) -> None:
    """All but the mask of the logits, which is no answer."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)
            self.classes, self.places = nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x):
            found = self.places(self.second(x).relu())
            return {"logits": self.classes(self.first(x).relu()), other: found}

    net, x = Heads().eval(), torch.randn(64, 6)
    network = trace(net, x)
    scores = judged(net, network, "fisher", [x]).scores
    first, second = (
        next(s for g, s in zip(network.groups, scores, strict=True) if g.members[0].path == path)
        for path in ("first.weight", "second.weight")
    )
    assert first.max() > 0
    assert (second.max() > 0) == (other == "boxes")
