"""Training on labels: what it does, shows and refuses."""

import copy
import io
import sys
import threading
import warnings
from dataclasses import FrozenInstanceError
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rarefy.copies import fingerprint
from rarefy.distillation.losses import KD, MSE, CrossEntropy
from rarefy.errors import DataError, InputError, TrainingError
from rarefy.training.distill import distill
from rarefy.training.evaluate import evaluate
from rarefy.training.options import TrainOptions
from rarefy.training.train import train
from training_networks import (
    QUICK,
    Unsized,
    conv,
    mlp,
    random_batches,
    same,
    seeded_net,
)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data / 16.0, dtype=torch.float32)
    y = torch.tensor(found.target)
    return TensorDataset(x[:1200], y[:1200]), TensorDataset(x[1200:], y[1200:])


@pytest.fixture(scope="module")
def teacher(digits):
    return train(
        conv(16), DataLoader(digits[0], 64, shuffle=True), epochs=6, lr=0.1, progress=False
    )


# --- what it does --------------------------------------------------------------------------------


def test_training_learns_the_digits(digits, teacher) -> None:
    val = DataLoader(digits[1], 256)
    assert evaluate(conv(16), val) < 0.3
    assert evaluate(teacher, val) > 0.92
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_learns_from_the_teacher_without_labels(digits, teacher) -> None:
    images, _ = digits[0].tensors
    val = DataLoader(digits[1], 256)
    student = distill(teacher, mlp(24), list(images.split(64)), epochs=12, lr=0.1, progress=False)
    assert evaluate(student, val) > 0.85
    agree = (student(images).argmax(1) == teacher(images).argmax(1)).float().mean()
    assert agree > 0.95


def test_adamw_trains(digits) -> None:
    loader = DataLoader(digits[0], 64, shuffle=True)
    found = train(mlp(), loader, epochs=8, optimizer="adamw", lr=0.005, progress=False)
    assert evaluate(found, DataLoader(digits[1], 256)) > 0.85


def test_one_step_is_that_of_a_bare_loop() -> None:
    data, model = random_batches(3), mlp()
    wanted = copy.deepcopy(model)
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.05, momentum=0.9)
    for x, y in data * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wanted(x), y).backward()
        optimizer.step()
    found = train(model, data, **QUICK, schedule="constant", warmup=0, weight_decay=0)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def with_fast_vectors(groups, lr=0.01):
    """Vectors learn ten times as fast."""
    matrices, vectors = (group["params"] for group in groups)
    return torch.optim.SGD([{"params": matrices, "lr": lr}, {"params": vectors, "lr": 10 * lr}])


@pytest.mark.parametrize(
    ("make", "lr"),
    [
        (torch.optim.NAdam, None),
        (partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.05),
        (with_fast_vectors, 0.02),
    ],
)
def test_optimizers_of_ones_own_step_as_in_a_bare_loop(make, lr) -> None:
    data, model = random_batches(3), mlp()
    wanted, given = copy.deepcopy(model), {} if lr is None else {"lr": lr}
    matrices, vectors = (
        [p for p in wanted.parameters() if (p.ndim > 1) is m] for m in (True, False)
    )
    optimizer = make([{"params": matrices}, {"params": vectors}], **given)
    fade = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    for x, y in data * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wanted(x), y).backward()
        optimizer.step()
        fade.step()
    options = {"schedule": "linear", "warmup": 0, "weight_decay": 0, "progress": False}
    found = train(model, data, epochs=2, optimizer=make, lr=lr, **options)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_ends_at_the_share_that_is_asked_for(schedule) -> None:
    data, model = random_batches(3), mlp()
    wanted = copy.deepcopy(model)
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.05, momentum=0.9)
    fade = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6, eta_min=0.05 * 0.3),
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.3, 6),
        "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, 1, 6),
    }[schedule]
    for x, y in data * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wanted(x), y).backward()
        optimizer.step()
        fade.step()
    options = {"schedule": schedule, "min_lr_rate": 0.3, "warmup": 0, "weight_decay": 0}
    found = train(model, data, **{**QUICK, **options})
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_optimizers_of_ones_own_find_the_weight_decay_in_their_groups() -> None:
    seen = []

    def make(groups):
        seen.extend((group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups)
        return torch.optim.SGD(groups, lr=0.1)

    distill(mlp(), mlp(), random_batches(), optimizer=make, weight_decay=0.25, progress=False)
    assert seen == [(0.25, {2}), (0.0, {1})]


def test_an_optimizer_that_is_made_already_is_refused_in_a_line() -> None:
    made = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"optimizer=SGD \( .*or a function") as refused:
        TrainOptions(optimizer=made)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda groups: None, "made a NoneType"),
        (torch.optim.LBFGS, "raised ValueError"),
        (lambda groups: torch.optim.LBFGS(groups[0]["params"]), "LBFGS computes the loss several"),
        (lambda groups: torch.optim.SGD(mlp().parameters(), lr=0.1), "other parameters than"),
        (lambda groups: torch.optim.Optimizer(groups, {}), "the groups of Optimizer have no lr"),
        (torch.optim.SparseAdam, "raised RuntimeError: SparseAdam does not support dense"),
    ],
)
def test_what_makes_no_optimizer_is_refused(make, message) -> None:
    with pytest.raises(InputError, match=message):
        train(mlp(), random_batches(), optimizer=make, progress=False)


class Within(torch.optim.Optimizer):
    """Steps by another optimizer, to which its groups belong, too."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1})
        self.within = torch.optim.SGD(self.param_groups)
        rates.clear()

    def step(self, closure=None):
        rates.append([group["lr"] for group in self.within.param_groups])
        self.within.step()

    def zero_grad(self):
        self.within.zero_grad()


rates: list[list[float]] = []
"""Learning rates with which the last optimizer within took its steps."""


def test_the_schedule_is_that_of_optimizers_within() -> None:
    quick = {"epochs": 1, "schedule": "linear", "warmup": 0, "progress": False}
    train(mlp(), random_batches(), optimizer=Within, **quick)
    assert rates == [[pytest.approx(0.1 * share)] * 2 for share in (1, 0.75, 0.5, 0.25)]


def test_checkpoints_that_would_leave_out_optimizers_within(tmp_path) -> None:
    with pytest.raises(InputError, match=r"the state of the SGD in Within is not in its state_di"):
        train(mlp(), random_batches(), optimizer=Within, checkpoint=tmp_path, progress=False)


def test_groups_of_an_optimizer_that_come_later_follow_the_schedule() -> None:
    class Splitting(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            rates.append([group["lr"] for group in self.param_groups])
            if len(self.param_groups) == 2:
                self.add_param_group({"params": self.param_groups[0]["params"].pop(), "lr": 1.0})

    rates.clear()
    quick = {"epochs": 1, "schedule": "linear", "warmup": 0, "progress": False}
    train(mlp(), random_batches(), optimizer=Splitting, lr=0.1, **quick)
    assert rates[-1] == [pytest.approx(v) for v in (0.025, 0.025, 0.25)]


def test_what_takes_the_groups_apart_is_an_optimizer_of_its_own() -> None:
    def make(groups, lr):
        return torch.optim.SGD([p for group in groups for p in group.pop("params")], lr=lr)

    found = train(mlp(), random_batches(), optimizer=make, **QUICK)
    assert not same(found, mlp())


@pytest.mark.parametrize("label_weight", [0.0, 0.25, 1.0])
def test_labels_weigh_what_was_asked(label_weight) -> None:
    (x, y), teacher, student = random_batches(1)[0], mlp(16, seed=1), mlp()
    wanted = copy.deepcopy(student)
    soft, hard = KD(2.0)(wanted(x), teacher(x).detach()), CrossEntropy()(wanted(x), y)
    ((1 - label_weight) * soft + label_weight * hard).backward()
    torch.optim.SGD(wanted.parameters(), lr=0.05).step()
    options = {"epochs": 1, "lr": 0.05, "warmup": 0, "weight_decay": 0, "progress": False}
    found = distill(teacher, student, [(x, y)], loss=KD(2.0), label_weight=label_weight, **options)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_unlabelled_batches_take_the_whole_of_the_loss() -> None:
    data = [x for x, _ in random_batches()]
    options = {"label_weight": 0.0, **QUICK}
    found = distill(mlp(16, seed=1), mlp(), data, **QUICK)
    assert same(found, distill(mlp(16, seed=1), mlp(), data, **options))


def test_decay_spares_vectors() -> None:
    model = nn.Linear(4, 2)
    quiet = train(
        model,
        [(torch.zeros(2, 4), torch.tensor([0, 1]))],
        loss=lambda logits, labels: 0.0 * logits.sum(),
        epochs=1,
        lr=0.1,
        warmup=0,
        weight_decay=0.5,
        progress=False,
    )
    assert torch.equal(quiet.bias, model.bias)
    assert torch.allclose(quiet.weight, model.weight * 0.95)


@pytest.mark.parametrize("sized", [True, False])
def test_the_learning_rate_warms_up_and_falls(sized) -> None:
    rates, data = [], random_batches(5)
    weight = nn.Linear(64, 10)
    before = [weight.weight.detach().clone()]

    def watch(model):
        rates.append((before[0] - model.weight).abs().max().item())
        before[0] = model.weight.detach().clone()

    train(
        weight,
        data if sized else Unsized(data),
        loss=lambda logits, labels: logits.sum() + 0 * labels.sum(),
        after_step=watch,
        epochs=10,
        lr=0.1,
        momentum=0.0,
        warmup=0.2,
        clip_norm=1.0,
        weight_decay=0,
        progress=False,
    )
    assert len(rates) == 50
    peak = max(rates)
    assert 0 < rates[0] < 0.5 * peak
    assert rates[-1] < 0.1 * peak


def test_clipping_bounds_the_step() -> None:
    model = mlp()
    data = [(1e3 * x, y) for x, y in random_batches(1)]
    options = {"epochs": 1, "lr": 0.1, "warmup": 0, "weight_decay": 0, "progress": False}
    found = train(model, data, clip_norm=1.0, **options)
    moved = [
        (a - b).square().sum() for a, b in zip(found.parameters(), model.parameters(), strict=True)
    ]
    assert torch.stack(moved).sum().sqrt() <= 0.1001


def test_a_hook_after_each_step_keeps_zeros() -> None:
    model = mlp()
    mask = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        model[0].weight.mul_(mask)
    calls = []

    def keep(net):
        calls.append(net)
        net[0].weight.mul_(mask)

    for found in (
        train(model, random_batches(), after_step=keep, **QUICK),
        distill(mlp(seed=1), model, random_batches(), after_step=keep, **QUICK),
    ):
        assert (found[0].weight[~mask] == 0).all()
        assert not same(found, model)
    assert len(calls) == 16
    assert all(type(net) is nn.Sequential for net in calls)


def test_modules_and_functions_serve_as_losses() -> None:
    loss = nn.CrossEntropyLoss()
    assert same(
        train(mlp(), random_batches(), loss=loss, **QUICK),
        train(mlp(), random_batches(), loss=nn.functional.cross_entropy, **QUICK),
    )
    assert loss.training
    distill(mlp(), mlp(), random_batches(), loss=nn.functional.mse_loss, **QUICK)
    distill(mlp(), mlp(seed=1), random_batches(), loss=0.5 * KD() + 0.5 * MSE(), **QUICK)


class Text(nn.Module):
    """A mapping to an object with logits for every position."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 6)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.head(self.embedding(input_ids))}


def test_padding_counts_for_nothing_in_mappings() -> None:
    ids = torch.randint(1, 20, (4, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 4)
    other = torch.where(mask.bool(), ids, 0)
    found = [
        distill(
            seeded_net(Text, 1),
            seeded_net(Text, 2),
            [{"input_ids": i, "attention_mask": mask}],
            **QUICK,
        )
        for i in (ids, other)
    ]
    assert torch.equal(found[0].head.weight, found[1].head.weight)
    labelled = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, 1, -100)}
    tuned = train(seeded_net(Text), [labelled], epochs=30, lr=0.5, progress=False)
    assert evaluate(tuned, [labelled]) == 1.0
    distill(tuned, seeded_net(Text), [labelled], **QUICK)


def test_tuples_of_arguments() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.layer(a + b)

    data = [((torch.ones(2, 4), torch.ones(2, 4)), torch.tensor([0, 1]))]
    assert 0 <= evaluate(train(Two(), data, **QUICK), data) <= 1


def test_a_captured_network_trains() -> None:
    from rarefy.graph.capture import capture, graph_model

    model = conv()
    net = graph_model(model, capture(model.eval(), torch.randn(2, 64)))
    data = random_batches()
    found = train(net, data, **QUICK)
    assert not same(found, net)
    buffers = dict(found.named_buffers())
    assert any(not torch.equal(b, buffers[n]) for n, b in net.named_buffers())
    student = distill(model.eval(), net, [*data, random_batches(1, size=1)[0]], **QUICK)
    assert all(t.isfinite().all() for t in student.state_dict().values())


# --- what it shows -------------------------------------------------------------------------------


def test_lines_for_every_epoch_where_there_is_no_terminal(capsys) -> None:
    distill(mlp(), mlp(seed=1), random_batches(), val=random_batches(), epochs=3)
    shown = capsys.readouterr()
    assert not shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 4
    assert "teacher" in lines[0]
    assert "before" in lines[0]
    assert "epoch 3/3" in lines[3]
    assert "val" in lines[3]
    assert "\x1b" not in shown.err


def test_a_bar_on_a_terminal(monkeypatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    train(mlp(), random_batches(), val=random_batches(), epochs=2)
    assert "epoch 2/2" in stream.getvalue()


def test_silence(capsys) -> None:
    train(conv(), [*random_batches(), random_batches(1, size=1)[0]], val=random_batches(), **QUICK)
    assert capsys.readouterr() == ("", "")


# --- what it refuses -----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_at_once() -> None:
    model, data = mlp(), random_batches()
    data[2] = (data[2][0] * float("nan"), data[2][1])
    kept = fingerprint(model)
    with pytest.raises(TrainingError, match=r"epoch 1, step 3: the loss is nan. Lower lr"):
        train(model, data, **QUICK)
    assert fingerprint(model) == kept
    with pytest.raises(TrainingError, match=r"epoch \d, step \d"):
        train(
            mlp(),
            random_batches(),
            loss=nn.functional.cross_entropy,
            epochs=9,
            lr=1e30,
            progress=False,
        )


def test_weights_that_break_in_the_last_step_are_found() -> None:
    def spoil(model):
        model[0].weight.fill_(float("inf"))

    with pytest.raises(TrainingError, match=r"epoch 1: parameter '0.weight'"):
        train(mlp(), random_batches(1), epochs=1, after_step=spoil, progress=False)


def test_nan_in_a_network_is_named_before_training() -> None:
    bad = mlp()
    with torch.no_grad():
        bad[2].bias[3] = float("nan")
    with pytest.raises(InputError, match=r"'2.bias' holds NaN"):
        train(bad, random_batches(), **QUICK)
    with pytest.raises(InputError, match=r"distill\(teacher\).*'2.bias'"):
        distill(bad, mlp(), random_batches(), **QUICK)
    with pytest.raises(InputError, match=r"distill\(model\).*'2.bias'"):
        distill(mlp(), bad, random_batches(), **QUICK)
    with pytest.raises(InputError, match="NaN"):
        evaluate(bad, random_batches())
    bn = conv()
    bn[2].running_var.fill_(float("nan"))
    with pytest.raises(InputError, match=r"'2.running_var'"):
        train(bn, random_batches(), **QUICK)


def test_data_that_can_be_read_only_once() -> None:
    once = (b for b in random_batches())
    with pytest.raises(DataError, match=r"train\(data\): a generator can be read only once"):
        train(mlp(), once, **QUICK)
    assert len(list(once)) == 4

    class Once:
        batches = iter(random_batches())

        def __iter__(self):
            yield from self.batches

    with pytest.raises(DataError, match=r"epoch 2: .*generator can be read only once"):
        train(mlp(), Once(), **QUICK)
    train(mlp(), (b for b in random_batches()), epochs=1, progress=False)


@pytest.mark.parametrize(
    "data", [[], [(torch.zeros(0, 64), torch.zeros(0).long())], 7, torch.ones(2)]
)
def test_data_without_examples(data) -> None:
    for act in (
        lambda: train(mlp(), data, **QUICK),
        lambda: distill(mlp(), mlp(), data, **QUICK),
        lambda: evaluate(mlp(), data),
    ):
        with pytest.raises(DataError):
            act()


def test_labels_that_are_missing_or_wrong() -> None:
    bare = [x for x, _ in random_batches()]
    with pytest.raises(DataError, match=r"unlabelled.*distill"):
        train(mlp(), bare, **QUICK)
    with pytest.raises(DataError, match="unlabelled"):
        evaluate(mlp(), bare)
    with pytest.raises(DataError, match="labels are a list"):
        train(mlp(), [(bare[0], [1] * 8)], **QUICK)
    with pytest.raises(DataError, match="none of the 10 classes"):
        train(mlp(), [(bare[0], torch.full((8,), 10))], **QUICK)
    with pytest.raises(DataError, match="do not fit"):
        evaluate(mlp(), [(bare[0], torch.zeros(8, 1).long())])
    with pytest.raises(DataError, match="no position"):
        evaluate(mlp(), [(bare[0], torch.full((8,), -100))])


def test_networks_with_nothing_to_train() -> None:
    for model in (nn.ReLU(), mlp().requires_grad_(False)):
        with pytest.raises(InputError, match="no parameter is trainable"):
            train(model, random_batches(), **QUICK)
    with pytest.raises(InputError, match="meta"):
        train(mlp().to("meta"), random_batches(), **QUICK)


def test_a_network_that_cannot_be_copied() -> None:
    model = mlp()
    model.lock = threading.Lock()
    with pytest.raises(InputError, match="cannot be copied"):
        train(model, random_batches(), **QUICK)


def test_a_network_that_holds_computed_tensors() -> None:
    """Such as those that the older weight norm leaves behind, or a cache."""
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[-1])
    data = random_batches()
    model.cached = model(data[0][0])
    small = train(model, data, ema=0.9, **QUICK)
    found = distill(model, small, data, **QUICK)
    assert not torch.equal(small[-1].weight_v, model[-1].weight_v)
    assert not torch.equal(found[-1].weight_v, small[-1].weight_v)
    assert torch.isfinite(found(data[0][0])).all()


def test_losses_that_cannot_be_minimized() -> None:
    with pytest.raises(InputError, match="no scalar that depends"):
        train(mlp(), random_batches(), loss=lambda a, b: a.sum().detach(), **QUICK)
    for loss, what in (
        (lambda a, b: a, r"a tensor of shape \(8, 10\)"),
        (lambda a, b: a.sum().item(), "a float"),
        (lambda a, b: {"loss": a.sum()}, "a dict"),
        (lambda a, b: None, "a NoneType"),
    ):
        with pytest.raises(InputError, match=rf"train\(loss\): it gives {what}"):
            train(mlp(), random_batches(), loss=loss, **QUICK)


def test_networks_with_other_classes() -> None:
    with pytest.raises(InputError, match="10 and 7 classes"):
        distill(mlp(classes=7), mlp(), random_batches(), **QUICK)


def test_a_loss_on_labels_is_not_one_on_teachers() -> None:
    with pytest.raises(InputError, match="label_weight"):
        distill(mlp(), mlp(), random_batches(), loss=CrossEntropy(), **QUICK)


def test_a_teacher_that_changes_is_refused() -> None:
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv()

        def forward(self, x):
            self.net[2].train()
            return self.net(x)

    teacher = Restless()
    kept = fingerprint(teacher)
    with pytest.raises(TrainingError, match="teacher's weights or buffers changed"):
        distill(teacher, mlp(), random_batches(), **QUICK)
    assert fingerprint(teacher) == kept


def test_a_last_batch_of_one_example(capsys) -> None:
    data = random_batches()
    single = random_batches(1, size=1)[0]
    flat = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    options = {"epochs": 2, "lr": 0.05, "schedule": "constant", "warmup": 0}
    found = train(flat, [*data, single], **options)
    assert capsys.readouterr().err.count("BatchNorm needs two") == 1
    assert same(found, train(flat, data, progress=False, **options))
    with pytest.raises(DataError, match="single example"):
        train(flat, [single], **QUICK)
    train(mlp(), [single], **QUICK)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"lr": 0},
        {"lr": float("nan")},
        {"optimizer": "adam"},
        {"momentum": 1.0},
        {"weight_decay": -1},
        {"schedule": "step"},
        {"warmup": 1},
        {"warmup": "0.1"},
        {"momentum": None},
        {"weight_decay": "none"},
        {"ema": "0.9"},
        {"clip_norm": 0},
    ],
)
def test_options_out_of_range(change) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        train(mlp(), random_batches(), **change)
    with pytest.raises(InputError, match=next(iter(change))):
        TrainOptions(**change)


def test_options_of_numpy_are_kept_as_pythons() -> None:
    options = TrainOptions(epochs=np.int64(3), lr=np.float32(0.5), ema=np.float64(0.5))
    assert options == TrainOptions(epochs=3, lr=0.5, ema=0.5)
    assert [type(v) for v in (options.epochs, options.lr, options.ema)] == [int, float, float]


def test_options_are_values_that_keywords_change() -> None:
    options = TrainOptions(epochs=2, lr=0.05)
    with pytest.raises(FrozenInstanceError):
        options.lr = 1
    assert same(
        train(mlp(), random_batches(), options=options, progress=False),
        train(mlp(), random_batches(), options=TrainOptions(lr=0.05), epochs=2, progress=False),
    )
    with pytest.raises(InputError, match=r"train\(epoch=...\): no such option. Use epochs, lr"):
        train(mlp(), random_batches(), epoch=3)
    with pytest.raises(InputError, match="label_weight"):
        distill(mlp(), mlp(), random_batches(), label_weight=1.1)


def test_streams_without_a_length() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(torch.ones(6, 64), torch.arange(6)))

    train(mlp(), DataLoader(Stream(), 3), **QUICK)


def test_fingerprints_tell_networks_apart() -> None:
    model = conv()
    prints = [fingerprint(model)]
    model[2].running_mean[0] += 1
    prints.append(fingerprint(model))
    prints += [fingerprint(copy.deepcopy(model).to(t)) for t in (torch.bfloat16, torch.float64)]
    assert len(set(prints)) == 4


class Tokens(nn.Module):
    """Logits of every position of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def test_labels_that_are_the_tokens_themselves_are_told() -> None:
    tokens = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))
    same = [{"input_ids": tokens, "labels": tokens.masked_fill(tokens == 3, -100)}] * 2
    with pytest.warns(RuntimeWarning, match="learns to copy.*shift them") as found:
        train(Tokens(), same, **QUICK)
    assert len(found) == 1
    with pytest.warns(RuntimeWarning, match="learns to copy"):
        distill(Tokens(), Tokens(), same, **QUICK)
    distill(Tokens(), Tokens(), same, label_weight=0, **QUICK)  # nobody reads them
    shifted = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    train(Tokens(), [{"input_ids": tokens, "labels": shifted}], **QUICK)


BUFFERS = {
    "expanded": lambda: torch.zeros(1).expand(5),
    "sparse": lambda: torch.eye(5).to_sparse(),
    "float8": lambda: torch.zeros(5).to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(5), 0.1, 0, torch.qint8),
}


class Counting(nn.Module):
    """Counts its batches in a buffer whose entries are one number, beside a buffer of any kind."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("kept", buffer)
        self.register_buffer("count", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count[:1] += 1
        out: Tensor = self.layer(x)
        return out


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_all_kinds_come_through_averages_and_the_best_weights(kind) -> None:
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)]
    options = {"epochs": 2, "lr": 0.1, "progress": False}
    averaged = train(Counting(BUFFERS[kind]()), data, ema=0.5, **options)
    assert 1 < float(averaged.count[0]) <= 8
    assert len(averaged.count.unique()) == 1
    best = train(Counting(BUFFERS[kind]()), data, val=data, keep="best", **options)
    assert float(best.count[0]) in (4, 8)
    for net in (averaged, best):
        assert type(net.kept) is type(BUFFERS[kind]())
        assert net.kept.dtype == BUFFERS[kind]().dtype


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", ["sparse", "quantized"])
def test_tensors_that_files_do_not_hold_are_refused_by_name(kind, tmp_path) -> None:
    data = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    net = Counting(BUFFERS[kind]())
    with pytest.raises(InputError, match=rf"train\(checkpoint=...\): 'kept' of Counting is {kind}"):
        train(net, data, checkpoint=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    assert not float(net.count[0])
