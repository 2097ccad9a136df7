"""Moving averages of networks."""

import copy

import pytest
import torch
from torch import nn

from rarefy.training.average import Average, follow


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        made[1].running_mean.normal_()
        made[1].num_batches_tracked.fill_(seed)
    return made


def test_a_share_of_the_way_is_moved() -> None:
    average, network = net(1), net(2)
    before = copy.deepcopy(average)
    follow(average, network, 0.25)
    for (name, found), old, its in zip(
        average.state_dict().items(), before.state_dict().values(), network.state_dict().values(),
        strict=True,
    ):  # fmt: skip
        expected = 0.75 * old + 0.25 * its if old.is_floating_point() else its
        torch.testing.assert_close(found, expected, msg=name)
    assert torch.equal(network[0].weight, net(2)[0].weight)


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
def test_the_average_is_the_weighted_sum_of_all_it_saw(decay) -> None:
    network = net(0)
    average = Average(network, decay, zeros=False)
    expected = network[0].weight.detach().double().clone()
    for step in range(1, 6):
        with torch.no_grad():
            network[0].weight.normal_(generator=torch.Generator().manual_seed(step))
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * network[0].weight.detach().double()
        average.update(step)
    found = average.state_dict()["0.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert not average.model[0].weight.requires_grad


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("zeros", [False, True])
def test_what_is_zero_in_the_network_is_zero_in_the_average_where_asked(zeros, trainable) -> None:
    network = net(0)
    network[0].weight.requires_grad_(trainable)
    average = Average(network, 0.9, zeros=zeros)
    with torch.no_grad():
        network[0].weight[:, 0] = 0
    average.update(1)
    assert bool((average.state_dict()["0.weight"][:, 0] == 0).all()) is zeros
    assert average.state_dict()["0.weight"][:, 1].any()
