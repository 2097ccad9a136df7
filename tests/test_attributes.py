"""Attributes of PyTorch's layers follow from the shapes of their parameters."""

import pytest
import torch
from torch import nn

from rarefy.pruning.structure.attributes import KEY, RULES, derive, read, refresh, remember

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
    nn.EmbeddingBag(7, 3),
    nn.Bilinear(3, 4, 5),
    nn.LSTM(3, 5, num_layers=2, bidirectional=True),
    nn.LSTM(3, 5, proj_size=2),
    nn.GRU(3, 5, bias=False),
    nn.RNN(3, 5),
    nn.RNN(3, 5, nonlinearity="relu", bidirectional=True),
    nn.LSTMCell(3, 5),
    nn.GRUCell(3, 5, bias=False),
    nn.RNNCell(3, 5),
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


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_follow_their_weights() -> None:
    net = nn.LSTM(3, 8, proj_size=4, batch_first=True)
    for name, shape in {
        "weight_ih_l0": (20, 2),
        "weight_hh_l0": (20, 3),
        "bias_ih_l0": (20,),
        "bias_hh_l0": (20,),
        "weight_hr_l0": (3, 5),
    }.items():
        setattr(net, name, nn.Parameter(torch.randn(shape)))
    refresh(net)
    assert (net.input_size, net.hidden_size, net.proj_size) == (2, 5, 3)
    assert net(torch.randn(4, 6, 2))[0].shape == (4, 6, 3)


def test_parametrized_layers_follow_the_weights_computed() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    held = net.parametrizations.weight
    held.original0 = nn.Parameter(held.original0[:5])
    held.original1 = nn.Parameter(held.original1[:5])
    assert derive(net) == {"out_features": 5, "in_features": 4}


def test_only_what_no_rule_derives_is_remembered() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "own": nn.Identity()})
    remember(net, {"conv": {"groups": 2}, "own": {"groups": 2}})
    remember(net, {"own": {"heads": 3}})
    assert net.__dict__[KEY] == {"own": {"groups": 2, "heads": 3}}
