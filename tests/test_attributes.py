"""Attributes of PyTorch's layers follow from the shapes of their parameters."""

import pytest
import torch
from torch import nn

from rarefy.pruning.attributes import KEY, RULES, derive, read, refresh, remember

LAYERS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv3d(4, 8, 1, groups=4, bias=False),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.ConvTranspose3d(4, 6, 1),
    nn.Linear(3, 5),
    nn.BatchNorm1d(5),
    nn.BatchNorm2d(5, affine=False),
    nn.BatchNorm3d(5, track_running_stats=False),
    nn.BatchNorm2d(5, affine=False, track_running_stats=False),
    nn.SyncBatchNorm(5),
    nn.InstanceNorm2d(5),
    nn.InstanceNorm1d(5, affine=True),
    nn.LayerNorm((3, 4)),
    nn.LayerNorm(4, elementwise_affine=False),
    nn.RMSNorm(4),
    nn.GroupNorm(2, 6),
    nn.GroupNorm(2, 6, affine=False),
    nn.Embedding(7, 3),
    nn.PReLU(4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_an_untouched_layer_is_described_as_it_was_made(layer) -> None:
    for name, value in derive(layer).items():
        assert getattr(layer, name) == value
        assert type(getattr(layer, name)) is type(value)


def test_every_rule_is_tested() -> None:
    assert all(any(isinstance(layer, kind) for layer in LAYERS) for kind in RULES)


def test_unknown_modules_have_none() -> None:
    assert derive(nn.ReLU()) == {}
    assert read(nn.Sequential(nn.ReLU(), nn.Linear(2, 3))) == {
        "1": {"out_features": 3, "in_features": 2}
    }


def test_attributes_follow_the_parameters() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    net[0].weight = nn.Parameter(torch.zeros(5, 3, 3, 3))
    net[1].running_mean = torch.zeros(5)
    net[1].weight = nn.Parameter(torch.zeros(5))
    refresh(net)
    assert (net[0].in_channels, net[0].out_channels, net[1].num_features) == (3, 5, 5)


def test_only_what_no_rule_derives_is_remembered() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "own": nn.Identity()})
    remember(net, {"conv": {"groups": 2}, "own": {"groups": 2}})
    remember(net, {"own": {"heads": 3}})
    assert net.__dict__[KEY] == {"own": {"groups": 2, "heads": 3}}
