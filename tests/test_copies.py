"""Copies share nothing, and hold the values of what was computed."""

import copy

import pytest
import torch
from torch import nn

from rarefy.copies import computed, converted, copied

torch.set_num_threads(1)


class Caching(nn.Module):
    """Keeps tensors that it computed, plainly and nested."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(x)
        self.parts = {"all": [self.last * 2, x]}
        return self.last


def test_computed_tensors_are_copied_by_value() -> None:
    net, x = Caching(), torch.ones(1, 2)
    net(x)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(net)
    assert len(computed(net)) == 2
    twin = copied(net)
    assert torch.equal(twin.last, net.last)
    assert torch.equal(twin.parts["all"][0], 2 * net.last)
    assert not twin.last.requires_grad
    assert net.last.requires_grad, "the network itself is untouched"
    assert torch.equal(twin(x), net(x))


def test_a_copy_shares_nothing() -> None:
    net = Caching()
    twin = copied(net)
    with torch.no_grad():
        twin.layer.weight.zero_()
    assert net.layer.weight.abs().sum() > 0
    assert type(twin) is Caching


def test_shared_parameters_stay_shared() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    twin = copied(net)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not net[0].weight


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
def test_weight_norm_can_be_copied() -> None:
    layer, x = nn.utils.weight_norm(nn.Linear(2, 3)), torch.ones(1, 2)
    assert torch.equal(copied(layer)(x), layer(x))


def test_a_converted_copy_has_one_precision_and_keeps_what_is_shared() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 3))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    twin = converted(net, torch.float64)
    assert twin[0].weight is twin[1].weight
    assert not twin[0].bias.requires_grad
    assert all(p.dtype is torch.float64 for p in twin.parameters())
    assert twin[2].running_var.dtype is torch.float64
    assert twin[2].num_batches_tracked.dtype is torch.int64
    x = torch.ones(4, 2)
    expected = net[3](x)[0]
    torch.testing.assert_close(twin[3](x.double())[0].float(), expected)
    again = converted(twin, torch.float64)
    with torch.no_grad():
        again[0].weight.zero_()
    assert twin[0].weight.abs().sum() > 0
    assert all(p.dtype is torch.float32 for p in net.parameters())
