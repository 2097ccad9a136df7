"""Networks that answer as one: means, and what they are told by."""

import math

import pytest
import torch
from torch import nn

from rarefy.copies import fingerprint
from rarefy.distillation.ensemble import Ensemble
from rarefy.errors import InputError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Says(nn.Module):
    """The same logits whatever it is asked."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return {"logits": self.what}


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (5, 3, 2, 2)])
def test_means_of_logits_and_of_probabilities(shape) -> None:
    made = torch.Generator().manual_seed(1)
    logits = [torch.randn(shape, generator=made, dtype=torch.float64) for _ in range(3)]
    says = [Says(a) for a in logits]
    shares = (0.5, 0.3, 0.2)
    found = Ensemble(says, weights=(5, 3, 2))(X)
    assert torch.allclose(found, sum(s * a for s, a in zip(shares, logits, strict=True)))
    dim = 1 if len(shape) == 4 else None
    axis = 1 if len(shape) == 4 else -1
    answers = Ensemble(says, weights=(5, 3, 2), average="probabilities", dim=dim)(X)
    mean = sum(s * a.softmax(axis) for s, a in zip(shares, logits, strict=True))
    assert torch.allclose(answers.exp(), mean)
    # Temperature 3 of the answers is that of the mean distribution.
    soft = mean.pow(1 / 3) / mean.pow(1 / 3).sum(axis, keepdim=True)
    assert torch.allclose((answers / 3).softmax(axis), soft)


@pytest.mark.parametrize(
    "options",
    [
        {"networks": []},
        {"networks": [nn.Linear(4, 3)], "weights": [0.0]},
        {"networks": [nn.Linear(4, 3)], "weights": [1, 2]},
        {"networks": [nn.Linear(4, 3)], "weights": [math.nan]},
        {"networks": [nn.Linear(4, 3)], "average": "votes"},
        {"networks": ["resnet"]},
        {"networks": nn.Linear(4, 3)},
        {"networks": nn.Sequential(nn.Linear(4, 3))},
        {"networks": [nn.Linear(4, 3)], "weights": nn.Linear(4, 3)},
    ],
    ids=str,
)
def test_ensembles_that_make_no_sense(options) -> None:
    with pytest.raises(InputError, match=r"Ensemble\("):
        Ensemble(**options)


def test_answers_of_several_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(5, 3\), \(5, 4\).*same classes"):
        Ensemble([nn.Linear(4, 3), nn.Linear(4, 4)])(X)


def test_a_fingerprint_tells_networks_weights_and_kind_of_mean() -> None:
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    found = [
        Ensemble([a, b]),
        Ensemble([b, a]),
        Ensemble([a, b], weights=[1, 2]),
        Ensemble([a, b], average="probabilities"),
    ]
    assert len({fingerprint(ensemble) for ensemble in found}) == 4
    assert fingerprint(Ensemble([a, b], weights=[2, 2])) == fingerprint(found[0])
