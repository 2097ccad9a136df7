"""Single weights set to zero."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.errors import BudgetError, InputError
from rarefy.pruning.masks import hold, prunable, sparsify, sparsity
from rarefy.types import Budget

torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def zeros(model: nn.Module) -> list[int]:
    return [int((w == 0).sum()) for w in (model[0].weight, model[3].weight)]


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.999))
def test_the_share_is_exact(share) -> None:
    local = sparsify(NET, Budget(sparsity=share, scope="local"))
    assert zeros(local) == [int(share * 36 + 1e-9), int(share * 80 + 1e-9)]
    assert sum(zeros(sparsify(NET, Budget(sparsity=share)))) == int(share * 116 + 1e-9)


def test_the_smallest_go_and_the_rest_is_untouched() -> None:
    before = copy.deepcopy(NET.state_dict())
    sparse = sparsify(NET, Budget(sparsity=0.5))
    gone = torch.cat(
        [NET[i].weight.abs().flatten()[sparse[i].weight.flatten() == 0] for i in (0, 3)]
    )
    left = torch.cat([sparse[i].weight[sparse[i].weight != 0].abs() for i in (0, 3)])
    assert gone.max() <= left.min()
    assert torch.equal(sparse[0].bias, NET[0].bias)
    assert torch.equal(sparse[1].weight, NET[1].weight)
    assert all(torch.equal(v, before[k]) for k, v in NET.state_dict().items())
    assert NET.training
    assert not sparse.training


def test_equal_weights_are_still_cut_exactly() -> None:
    layer = nn.Linear(4, 4)
    nn.init.ones_(layer.weight)
    assert sparsity(sparsify(nn.Sequential(layer), Budget(sparsity=0.5))) == 0.5


def test_excluded_layers_stay_dense() -> None:
    assert zeros(sparsify(NET, Budget(sparsity=0.5, scope="local"), exclude=["0"])) == [0, 40]
    assert zeros(sparsify(NET, Budget(sparsity=0.5), exclude=["3.weight"])) == [18, 0]
    with pytest.raises(InputError, match="no module"):
        sparsify(NET, Budget(sparsity=0.5), exclude=["9"])
    with pytest.raises(InputError, match="no weight"):
        sparsify(NET, Budget(sparsity=0.5), exclude=["0", "3"])


def test_only_sparsity_makes_sense() -> None:
    with pytest.raises(BudgetError, match="sparsity"):
        sparsify(NET, Budget(macs=0.5))


def test_shared_weights_are_counted_once() -> None:
    layer = nn.Linear(4, 4)
    assert len(prunable(nn.Sequential(layer, layer))) == 1


def test_zeros_survive_training() -> None:
    sparse = sparsify(NET, Budget(sparsity=0.7)).train()
    before = zeros(sparse)
    again = hold(sparse)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        sparse(torch.randn(2, 1, 4, 4)).square().sum().backward()
        optimizer.step()
        again(sparse)
    assert zeros(sparse) == before
