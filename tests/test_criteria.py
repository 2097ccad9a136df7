"""Criteria against NumPy written independently."""

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.errors import InputError
from rarefy.graph.trace import trace
from rarefy.pruning.criteria import CRITERIA, magnitude, magnitude_l1, named, random, scored

torch.set_num_threads(1)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4)
        )
    found = trace(net, torch.zeros(2, 3, 4, 4))
    (group,) = found.groups
    return net, group, dict(net.named_parameters())


@pytest.mark.parametrize(("criterion", "power"), [(magnitude, 2), (magnitude_l1, 1)])
def test_magnitude_is_the_share_of_each_coupled_layer(criterion, power) -> None:
    net, group, tensors = network()
    conv = np.abs(net[0].weight.detach().double().numpy()) ** power
    linear = np.abs(net[4].weight.detach().double().numpy()) ** power
    expected = [
        conv[u].sum() / conv.sum() + linear[:, 4 * u : 4 * u + 4].sum() / linear.sum()
        for u in range(5)
    ]
    np.testing.assert_allclose(criterion(group, tensors).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA.values())
def test_scores_do_not_depend_on_the_scale_of_a_layer(criterion) -> None:
    net, group, tensors = network()
    before = criterion(group, tensors)
    with torch.no_grad():
        net[0].weight.mul_(100)
    torch.testing.assert_close(criterion(group, tensors), before)


def test_layers_of_zeros_score_zero() -> None:
    _, group, tensors = network()
    zeros = {path: torch.zeros_like(t) for path, t in tensors.items()}
    assert magnitude(group, zeros).tolist() == [0.0] * 5


def test_groups_without_kernels_are_scored_by_their_vectors() -> None:
    _, group, tensors = network()
    vectors = {path: t for path, t in tensors.items() if t.ndim == 1}
    assert (magnitude(group, vectors) > 0).all()


def test_random_scores_are_the_same_for_the_same_group() -> None:
    _, group, tensors = network()
    state = torch.get_rng_state()
    assert torch.equal(random(group, tensors), random(group, {}))
    assert torch.equal(state, torch.get_rng_state())


def test_names_are_looked_up() -> None:
    assert named("l1") is magnitude_l1
    assert named(random) is random
    with pytest.raises(InputError, match="magnitude"):
        named("magnitud")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda group, tensors: torch.zeros(len(group) + 1),
        lambda group, tensors: torch.full((len(group),), torch.nan),
        lambda group, tensors: torch.zeros(len(group), 1),
    ],
)
def test_scores_of_another_form_are_refused(wrong) -> None:
    _, group, tensors = network()
    with pytest.raises(InputError, match="criterion"):
        scored(group, tensors, wrong)


def test_a_criterion_may_return_any_sequence() -> None:
    _, group, tensors = network()
    assert scored(group, tensors, lambda g, t: [1, 2, 3, 4, 5]).dtype == np.float64
