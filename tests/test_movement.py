"""Movement, summed over the steps of a training."""

import copy

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.errors import InputError
from rarefy.graph.trace import trace
from rarefy.pruning.scoring.criteria import scored
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.scoring.movement import Movement

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))


def train(net, steps=4, lr=0.1):
    """Plain gradient descent, with every weight and gradient written down before its step."""
    track, held = Movement(net), []
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        track()
        held.append({n: (p.detach().clone(), p.grad.clone()) for n, p in net.named_parameters()})
        optimizer.step()
    return track, held


def test_movement_is_the_sum_of_minus_gradient_times_weight() -> None:
    net = network()
    track, held = train(net)
    assert track.steps == len(held)
    evidence = Evidence(dict(net.named_parameters()))
    for path in ("0.weight", "2.weight"):
        expected = sum(-(w * g) for w, g in (step[path] for step in held))
        torch.testing.assert_close(track.element(path, evidence), expected.double())
    (group,) = trace(net, X).groups
    found = scored(group, evidence, track.criterion)
    first, last = (track.scores[p].double() for p in ("0.weight", "2.weight"))
    torch.testing.assert_close(torch.from_numpy(found), first.sum(1) + last.sum(0))
    small = rf.prune(net, X, rf.Budget(sparsity=0.5), criterion=track.criterion)
    kept = torch.from_numpy(found).argsort()[3:].sort().values
    assert small.pruned.kept["0.weight", 0].tolist() == kept.tolist()


def test_weights_that_shrink_have_negative_movement() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    track, _ = train(net, steps=1, lr=1e-5)  # none passes zero
    shrunk = net[0].weight.detach().abs() < before["0.weight"].abs()
    moved = track.scores["0.weight"]
    assert (moved[shrunk] < 0).all()
    assert (moved[~shrunk] >= 0).all()


def test_training_is_not_touched() -> None:
    plain, tracked = network(), network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        plain(X).square().sum().backward()
        optimizer.step()
    train(tracked)
    for a, b in zip(plain.parameters(), tracked.parameters(), strict=True):
        assert torch.equal(a, b)


def test_before_any_step_and_with_broken_gradients_it_says_so() -> None:
    net = network()
    track = Movement(net)
    with pytest.raises(InputError, match="no step"):
        rf.prune(net, X, rf.Budget(sparsity=0.5), criterion=track.criterion)
    net(X).sum().backward()
    net[2].weight.grad[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"2.weight.*NaN or infinite"):
        track()
    assert not track.steps
    assert not any(scores.any() for scores in track.scores.values())
