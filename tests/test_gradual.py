"""Pruning along a schedule while training: weights, and units that are removed at the end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import rarefy as rf
from rarefy.errors import BudgetError, InputError
from rarefy.pruning.gradual import GradualPruning, GradualUnits
from rarefy.pruning.scoring.movement import Movement
from rarefy.pruning.sparsity.masks import sparsity
from rarefy.pruning.sparsity.patterns import Block
from rarefy.schedules import Constant, Cubic, Iterative

torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    X, Y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))

WEIGHTS = 8 * 9 + 12 * 4 * 9 + 36


def trained(model: nn.Module, after_step, steps: int, seen=lambda model: None) -> nn.Module:
    """The user's own loop."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        after_step(model)
        seen(model)
    return model


@pytest.mark.parametrize("schedule", [Cubic(0.9, steps=20, begin=4), Iterative(0.9, 3, every=5),
                                      Constant(0.5)])  # fmt: skip
@pytest.mark.parametrize("every", [1, 5])
def test_sparsity_follows_the_schedule_exactly(schedule, every) -> None:
    shares: list[float] = []
    trained(NET, GradualPruning(schedule, every=every), 30, lambda m: shares.append(sparsity(m)))
    for step, share in enumerate(shares, 1):
        selected = step // every * every
        expected = int(schedule(selected) * WEIGHTS + 1e-9) if selected else 0
        assert share * WEIGHTS == pytest.approx(expected)


def test_zeros_stay_zeros_as_their_number_grows() -> None:
    before: list[torch.Tensor] = [torch.zeros(12, 4, 3, 3, dtype=torch.bool)]

    def grown(model: nn.Module) -> None:
        now = model[3].weight == 0
        assert now[before[-1]].all()
        before.append(now)

    trained(NET, GradualPruning(Cubic(0.8, steps=20), every=3), 25, grown)
    assert before[-1].any()


def test_blocks_local_shares_and_excluded_layers() -> None:
    gradual = GradualPruning(
        Constant(0.5), structure=Block(2, 3), scope="local", exclude=["8"], example_inputs=X
    )
    model = trained(NET, gradual, 3)
    for layer, blocks in ((0, 12), (3, 72)):
        matrix = model[layer].weight.flatten(1)
        cells = matrix.view(len(matrix) // 2, 2, -1, 3).transpose(1, 2).flatten(2) == 0
        assert int(cells.all(-1).sum()) == blocks // 2
    assert not (model[8].weight == 0).any()


def test_it_works_in_rarefys_loop_and_goes_on_where_it_was() -> None:
    gradual = GradualPruning(Cubic(0.9, steps=10))
    tuned = rf.train(NET, [(X, Y)] * 5, epochs=2, progress=False, after_step=gradual)
    assert sparsity(tuned) * WEIGHTS == pytest.approx(int(0.9 * WEIGHTS))
    again = GradualPruning(Cubic(0.9, steps=10))
    again.load_state_dict(gradual.state_dict())
    assert again.step == 10
    assert set(again.masks) == {"0.weight", "3.weight", "8.weight"}
    assert sparsity(trained(tuned, again, 3)) * WEIGHTS == pytest.approx(int(0.9 * WEIGHTS))


def test_units_are_zeroed_and_then_removed() -> None:
    gradual = GradualUnits(NET, X, Cubic(0.5, steps=10), every=2)
    zeroed: list[int] = []

    def units(model: nn.Module) -> None:
        zeroed.append(int((model[0].weight == 0).all(3).all(2).all(1).sum()))
        zeroed[-1] += int((model[3].weight == 0).all(3).all(2).all(1).sum())

    model = trained(NET, gradual, 14, units).eval()
    assert zeroed == sorted(zeroed)
    assert 6 <= zeroed[-1] <= 12
    for norm in (1, 4):
        gone = (model[norm - 1].weight == 0).flatten(1).all(1)
        assert not model[norm].weight[gone].any()
        assert not model[norm].bias[gone].any()
    small = gradual.finish(model)
    assert small.pruned.kind == "module"
    assert small[0].out_channels + small[3].out_channels == 20 - zeroed[-1]
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)


def test_units_that_are_zero_are_never_taken_back() -> None:
    gradual = GradualUnits(NET, X, Cubic(0.6, steps=12), criterion=lambda g, t: torch.rand(len(g)))
    plans = [gradual._plan.removed]

    def nested(model: nn.Module) -> None:
        assert gradual._plan.removed[plans[-1]].all()
        plans.append(gradual._plan.removed)

    trained(NET, gradual, 12, nested)
    assert plans[-1].any()


@pytest.mark.parametrize("way", ["state", "network"])
def test_units_that_are_zero_go_also_after_a_resumption(way) -> None:
    make = lambda: GradualUnits(  # noqa: E731
        NET, X, Constant(0.5), every=4, criterion=lambda g, t: torch.rand(len(g))
    )
    gradual, again = make(), make()
    model = trained(NET, gradual, 4)
    if way == "state":
        again.load_state_dict(copy.deepcopy(gradual.state_dict()))
    else:
        again.resume(model, 4)
    assert again._plan.removed.any()
    assert again.masks.keys() == gradual.masks.keys()
    assert all(torch.equal(again.masks[path], gradual.masks[path]) for path in gradual.masks)
    after = trained(model, again, 3).eval()  # no selection is due
    small = again.finish(after)
    for layer in (0, 3):
        left = int((after[layer].weight != 0).flatten(1).any(1).sum())
        assert small[layer].out_channels == left < NET[layer].out_channels
    torch.testing.assert_close(small(X), after(X), rtol=1e-4, atol=1e-5)
    trained(after, again, 1)
    assert (again._plan.removed == gradual._plan.removed).all()


def test_layers_that_start_at_zero_are_not_taken_for_removed() -> None:
    net = copy.deepcopy(NET)
    with torch.no_grad():
        net[3].weight.zero_()
        net[3].bias.zero_()
        net[4].weight.zero_()
    gradual = GradualUnits(net, X, Constant(0.5))
    gradual.resume(net, 7)
    assert not gradual._plan.removed.any()
    assert not gradual.masks


def test_zeros_stay_whatever_the_criterion() -> None:
    gradual = GradualPruning(
        Cubic(0.8, steps=8), criterion=lambda w: torch.rand_like(w), exclude=["8"]
    )
    before = [torch.zeros(12, 4, 3, 3, dtype=torch.bool)]

    def grown(model: nn.Module) -> None:
        now = model[3].weight == 0
        assert now[before[-1]].all()
        before.append(now)

    model = trained(NET, gradual, 6, grown)
    again = GradualPruning(Cubic(0.8, steps=8), criterion=gradual._rule, exclude=["8"])
    again.resume(model, 6)
    assert set(again.masks) == {"0.weight", "3.weight"}
    trained(model, again, 3, grown)
    assert again.step == 9
    assert before[6].any()


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="N:M fixes the share"):
        GradualPruning(Constant(0.5), structure="2:4")
    with pytest.raises(InputError, match="calibration data"):
        GradualPruning(Constant(0.5), criterion="wanda")
    with pytest.raises(InputError, match=r"GradualUnits\(criterion='fisher'\): .*calibration data"):
        GradualUnits(NET, X, Constant(0.5), criterion="fisher")
    with pytest.raises(InputError, match="example_inputs"):
        GradualPruning(Constant(0.5), structure="1x4")
    with pytest.raises(InputError, match="every"):
        GradualPruning(Constant(0.5), every=0)
    with pytest.raises(InputError, match="schedule"):
        GradualPruning(0.5)
    with pytest.raises(BudgetError, match="scope"):
        GradualPruning(Constant(0.5), scope="all")
    for wrong in (1.0, None):
        with pytest.raises(BudgetError, match=f"gives {wrong}"):
            GradualPruning(lambda _, w=wrong: w)(copy.deepcopy(NET))
    with pytest.raises(InputError, match="Did you mean"):
        GradualPruning(Constant(0.5), every=100, exclude=["0.wieght"])(copy.deepcopy(NET))
    with pytest.raises(InputError, match=r"exclude=\['0.wieght'\]"):  # before any step is taken
        GradualUnits(NET, X, Constant(0.5), every=100, exclude=["0.wieght"])


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
@pytest.mark.parametrize("kind", ["weights", "units"])
def test_networks_are_pruned_within_wrappers(kind, wrap) -> None:
    def made():
        if kind == "units":
            return GradualUnits(NET, X, Cubic(0.5, steps=4))
        return GradualPruning(Cubic(0.5, steps=4), structure="1x4", example_inputs=X)

    plain, within = made(), made()
    model = trained(NET, plain, 6)
    same = trained(NET, lambda m: within(wrap(m)), 6)
    assert same.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(same.state_dict()[k], v) for k, v in model.state_dict().items())
    assert sparsity(same) > 0.3
    if kind == "units":
        smaller, found = plain.finish(model), within.finish(wrap(same))
        assert type(found) is nn.Sequential
        torch.testing.assert_close(found(X), smaller(X))


@pytest.mark.parametrize("kind", ["weights", "units"])
def test_movement_may_choose_along_a_schedule(kind) -> None:
    model = copy.deepcopy(NET)
    track = Movement(model)
    gradual = (
        GradualPruning(Cubic(0.5, steps=4), criterion=track.element)
        if kind == "weights"
        else GradualUnits(model, X, Cubic(0.5, steps=4), criterion=track.criterion)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        track()
        optimizer.step()
        gradual(model)
    assert 0.4 < sparsity(model) < 0.9


@pytest.mark.parametrize("kind", ["weights", "units"])
def test_weights_that_are_nan_are_named_and_not_the_criterion(kind) -> None:
    model = copy.deepcopy(NET)
    gradual = (
        GradualPruning(Constant(0.5)) if kind == "weights" else GradualUnits(NET, X, Constant(0.5))
    )
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"parameter 3\.weight: it holds NaN"):
        gradual(model)


def test_units_of_weight_normed_layers_train_on_at_zero() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(weight_norm(nn.Linear(36, 8)), nn.ReLU(), nn.Linear(8, 3))
    net = nn.Sequential(nn.Flatten(), net)
    gradual = GradualUnits(net, X, Constant(0.5))
    after = trained(net, gradual, 4)
    assert all(p.isfinite().all() for p in after.parameters())
    small = gradual.finish(after)
    assert small[1][2].in_features == 4
    torch.testing.assert_close(small(X), after.eval()(X))


def test_vectors_of_weight_normed_layers_keep_a_length() -> None:
    net = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(36, 8)), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[1].parametrizations.weight.original1[:2].mul_(0.1)
    after = trained(net, GradualPruning(Cubic(0.9, steps=4), scope="local"), 6)
    gone = after[1].parametrizations.weight.original1 == 0
    assert int(gone.sum()) == int(0.9 * 36 * 8)
    assert not gone.all(1).any()
    assert after(X).isfinite().all()


def test_a_layer_that_is_emptied_is_named_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        net[0].weight.mul_(1e-3)
    gradual = GradualPruning(Constant(0.5))
    with pytest.warns(
        RuntimeWarning, match=r"GradualPruning, step 1: no weight is left of 0\.weight"
    ):
        gradual(net)
    gradual(net)
    local = GradualPruning(Constant(0.5), scope="local")
    local(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
