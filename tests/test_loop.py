"""The loop: accumulation, precision, averages, early stopping, metrics, the record, trackers."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy.errors import DataError, InputError, MissingExtraError, TrainingError
from rarefy.metrics import PSNR, MeanError, Perplexity
from rarefy.pruning.prune import prune
from rarefy.pruning.repair import repair
from rarefy.storage.format import load, save
from rarefy.training.average import Average
from rarefy.training.distill import distill
from rarefy.training.evaluate import evaluate
from rarefy.training.options import TrainOptions
from rarefy.training.record import Epoch, Fit, Trained
from rarefy.training.train import train
from rarefy.types import Budget
from training_networks import QUICK, Unsized, conv, mlp, random_batches, same

STEADY = {**QUICK, "schedule": "constant", "warmup": 0}


def close(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, atol=1e-6) for x, y in pairs)


# --- accumulation --------------------------------------------------------------------------------


def joined(batches):
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


@pytest.mark.parametrize("sized", [True, False])
def test_accumulated_steps_are_those_of_large_batches(sized) -> None:
    sizes = (8, 3, 5, 8, 1, 7, 4)
    data = [(x[:n], y[:n]) for (x, y), n in zip(random_batches(7), sizes, strict=True)]
    large = [joined(data[i : i + 3]) for i in (0, 3, 6)]
    options = {"clip_norm": 0.5, **STEADY}
    wanted = train(mlp(), large, **options)
    found = train(mlp(), data if sized else Unsized(data), accumulate=3, **options)
    assert close(found, wanted)
    assert found.trained.steps == wanted.trained.steps == 6
    for a, b in zip(found.trained.epochs, wanted.trained.epochs, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-6)


def test_positions_without_a_label_weigh_nothing() -> None:
    data = random_batches(2)
    data[0][1][2:] = -100
    wanted = train(mlp(), [joined(data)], **STEADY)
    assert close(train(mlp(), data, accumulate=2, **STEADY), wanted)


def test_a_penalty_counts_once_for_a_step() -> None:
    def penalty(model, step):
        return 0.1 * model[0].weight.square().sum()

    data = random_batches(4)
    wanted = train(mlp(), [joined(data)], regularizer=penalty, **STEADY)
    assert close(train(mlp(), data, accumulate=4, regularizer=penalty, **STEADY), wanted)


def test_more_batches_than_there_are_cannot_be_accumulated() -> None:
    with pytest.raises(InputError, match=r"accumulate=5\): an epoch has 4 batches"):
        train(mlp(), random_batches(), accumulate=5, **QUICK)


# --- precision -----------------------------------------------------------------------------------


def test_mixed_precision_computes_in_it_and_keeps_the_weights() -> None:
    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            found = self.net(x)
            seen.append(found.dtype)
            return found

    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        seen.clear()
        found = train(Watch(), random_batches(), precision=precision, **QUICK)
        assert set(seen) == {dtype}
        assert found.net[0].weight.dtype == torch.float32
    assert close(found.net, train(mlp(), random_batches(), **QUICK))
    with pytest.raises(InputError, match="bf16"):
        train(mlp(), random_batches(), precision="fp16", **QUICK)


# --- averages ------------------------------------------------------------------------------------


def test_the_average_is_that_of_the_weights_after_every_step() -> None:
    seen = []
    found = train(
        conv(), random_batches(), ema=0.4, after_step=lambda m: seen.append(m.state_dict()), **QUICK
    )
    assert len(seen) == 8
    trail = []
    train(conv(), random_batches(), after_step=lambda m: trail.append(copy.deepcopy(m)), **QUICK)
    wanted = {k: v.double() for k, v in conv().state_dict().items()}
    for step, net in enumerate(trail, 1):
        decay = min(0.4, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * value.double()
    for name, value in found.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), wanted[name], atol=1e-6)
        else:
            assert value == trail[-1].state_dict()[name]
    assert all(p.requires_grad for p in found.parameters())


def test_zeros_stay_zero_in_the_average() -> None:
    net = nn.Linear(3, 2)
    average = Average(net, 0.9, zeros=True)
    with torch.no_grad():
        net.weight[0] = 0
    average.update(1)
    assert (average.model.weight[0] == 0).all()
    assert (average.model.weight[1] != 0).all()


# --- best and last -------------------------------------------------------------------------------


class Scripted:
    """A metric that gives what it was told to, and keeps the networks it saw."""

    def __init__(self, *values, lower=False):
        self.values, self.lower_is_better, self.seen = list(values), lower, []

    def __call__(self, model, data):
        self.seen.append(copy.deepcopy(model))
        return self.values.pop(0) if self.values else 0.5


VAL = random_batches(1)


@pytest.mark.parametrize("lower", [False, True])
def test_training_stops_where_nothing_gets_better(lower) -> None:
    values = [0.0, 0.3, 0.6, 0.6, 0.5, 0.9]
    metric = Scripted(*[-v if lower else v for v in values], lower=lower)
    options = {"metric": metric, "val": VAL, "patience": 2, **STEADY, "epochs": 9}
    found = train(mlp(), random_batches(), **options)
    record = found.trained
    assert (record.last, record.best, record.kept, record.stopped) == (4, 2, 4, True)
    assert same(found, metric.seen[4])
    assert record.metric == "Scripted"


def test_the_best_epoch_is_kept_where_asked() -> None:
    metric = Scripted(0.0, 0.3, 0.6, 0.5, 0.4)
    found = train(
        mlp(), random_batches(), metric=metric, val=VAL, keep="best", **STEADY | {"epochs": 4}
    )
    assert (found.trained.last, found.trained.best, found.trained.kept) == (4, 2, 2)
    assert same(found, metric.seen[2])
    assert found.trained.student.val == 0.6
    assert not found.trained.stopped


def test_best_needs_a_measure() -> None:
    for wrong in ({"patience": 2}, {"keep": "best"}):
        with pytest.raises(InputError, match="Give val="):
            train(mlp(), random_batches(), **wrong, **QUICK)


# --- metrics -------------------------------------------------------------------------------------


def test_image_to_image() -> None:
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(noisy, images), 8)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    options = {"metric": PSNR(), "val": data, "optimizer": "adamw", "progress": False}
    found = train(net, data, loss=nn.functional.mse_loss, epochs=5, lr=0.01, **options)
    assert found.trained.student.val > found.trained.before + 1
    assert evaluate(found, data, metric=PSNR()) == found.trained.student.val


def test_metrics_that_fail_are_named_before_training() -> None:
    def broken(model, data):
        return [][0]

    stepped = []
    for metric, what in (
        (broken, "broken failed: IndexError"),
        (lambda m, d: float("nan"), "is NaN"),
        (lambda m, d: "high", "failed: ValueError"),
        (MeanError(), "differ in shape"),
    ):
        with pytest.raises(InputError, match=what):
            train(mlp(), random_batches(), val=VAL, metric=metric, after_step=stepped.append)
        with pytest.raises(InputError, match=what):
            evaluate(mlp(), VAL, metric=metric)
    assert not stepped


def test_what_is_wrong_with_val_is_said_of_val() -> None:
    bare = [x for x, _ in VAL]
    with pytest.raises(DataError, match=r"train\(val\): evaluate\(data\): a batch is unlabelled"):
        train(mlp(), random_batches(), val=bare, **QUICK)


def test_a_teacher_that_breaks_later_is_named() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return torch.where(x.sum() == 13, torch.nan, self.inner(x))

    x, y = random_batches()[0]
    last = torch.zeros_like(x)
    last[0, 0] = 13
    with pytest.raises(TrainingError, match=r"epoch 1, step 2: the teacher's answers hold NaN"):
        distill(Breaking(), mlp(), [(x, y), (last, y)], **QUICK)


def test_data_that_can_be_read_once_are_no_val() -> None:
    with pytest.raises(DataError, match=r"train\(val\): a list_iterator"):
        train(mlp(), random_batches(), val=iter(VAL), **QUICK)


# --- the record ----------------------------------------------------------------------------------


def test_the_record_says_what_was_done(capsys) -> None:
    data, teacher = random_batches(), mlp(16, seed=1)
    found = distill(teacher, mlp(), data, val=VAL, metric=Perplexity(), epochs=3, lr=0.05)
    record = found.trained
    assert [e.number for e in record.epochs] == [1, 2, 3]
    assert record.epochs[2].lr < record.epochs[1].lr
    assert all(e.seconds > 0 for e in record.epochs)
    assert sum(e.seconds for e in record.epochs) <= record.seconds
    assert record.steps == 12
    assert record.before == evaluate(mlp(), VAL, metric=Perplexity())
    assert record.student.val == evaluate(found, VAL, metric=Perplexity())
    assert record.student.train == evaluate(found, data, metric=Perplexity())
    assert record.teachers["teacher"].train == evaluate(teacher, data, metric=Perplexity())
    assert record.teachers["teacher"].gap == (
        record.teachers["teacher"].train - record.teachers["teacher"].val
    )
    assert record.sampled == 32
    assert record.best == min(record.epochs, key=lambda e: e.val).number
    assert "perplexity on val" in capsys.readouterr().err


def test_what_was_not_measured_is_not_in_the_record() -> None:
    record = train(mlp(), random_batches(), **QUICK).trained
    assert (record.student, record.best, record.before, record.teachers) == (None, None, None, {})
    bare = [x for x, _ in random_batches()]
    record = distill(mlp(seed=1), mlp(), bare, val=VAL, **QUICK).trained
    assert record.student.train is None
    assert record.student.gap is None
    assert record.student.val is not None


def test_training_data_that_the_metric_is_not_for(capsys) -> None:
    data = [(x, nn.functional.one_hot(y, 10).float()) for x, y in random_batches()]
    found = train(mlp(), data, loss=nn.functional.cross_entropy, val=VAL, epochs=1)
    assert found.trained.student.train is None
    assert found.trained.student.val == evaluate(found, VAL)
    assert "no metric on the training data" in capsys.readouterr().err


def test_the_record_goes_along(tmp_path) -> None:
    found = train(conv(), random_batches(), val=VAL, **QUICK)
    record = found.trained
    assert isinstance(record, Trained)
    assert isinstance(record.epochs[0], Epoch)
    assert isinstance(record.student, Fit)
    assert copy.deepcopy(found).trained == record
    assert pickle.loads(pickle.dumps(record)) == record
    save(found, tmp_path / "net.safetensors")
    assert same(load(tmp_path / "net.safetensors", conv()), found)
    x = VAL[0][0]
    small = prune(found, x, Budget(macs=0.6))
    healed = repair(found, small, [x])
    again = distill(found, healed, random_batches(), **QUICK)
    assert again.trained != record
    assert evaluate(again, VAL) >= 0


def test_an_attribute_of_the_networks_own_stays() -> None:
    net = mlp()
    net.trained = True
    assert train(net, random_batches(), **QUICK).trained is True


# --- trackers ------------------------------------------------------------------------------------


def test_a_tracker_gets_the_history() -> None:
    from accelerate.tracking import GeneralTracker

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None

        def __init__(self):
            super().__init__()
            self.config, self.logged, self.ended = None, [], False

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **rest):
            self.logged.append((step, values))

        def finish(self):
            self.ended = True

    memory = Memory()
    found = train(mlp(), random_batches(), val=VAL, trackers=memory, **QUICK)
    assert memory.config["epochs"] == 2
    assert [step for step, _ in memory.logged] == [4, 8]
    last = found.trained.epochs[-1]
    assert memory.logged[-1][1] == {"loss": last.loss, "lr": last.lr, "val top-1": last.val}
    assert not memory.ended
    assert same(found, train(mlp(), random_batches(), **QUICK))


def test_trackers_get_plain_values(monkeypatch) -> None:
    from accelerate import Accelerator

    given = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *a, config: given.append(config))
    made = partial(torch.optim.SGD, momentum=0.5)
    train(mlp(), random_batches(), trackers=[], optimizer=made, **QUICK)
    assert given[0]["optimizer"] == "torch.optim.sgd.SGD(momentum=0.5)"


def test_trackers_that_are_not_there(monkeypatch) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(InputError, match="no such tracker"):
        train(mlp(), random_batches(), trackers="notebook", **QUICK)
    with pytest.raises(MissingExtraError, match=r"rarefy\[tensorboard\]"):
        train(mlp(), random_batches(), trackers="tensorboard", **QUICK)
    with pytest.raises(InputError, match="pip install wandb"):
        train(mlp(), random_batches(), trackers=["wandb"], **QUICK)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp8"},
        {"accumulate": 0},
        {"accumulate": True},
        {"ema": 1},
        {"patience": 0},
        {"keep": "first"},
        {"min_lr_rate": 1.5},
    ],
)
def test_options_out_of_range(change) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        TrainOptions(**change)


def test_a_loss_that_breaks_while_accumulating_leaves_the_weights() -> None:
    data, seen = random_batches(), []
    data[3] = (data[3][0] * float("nan"), data[3][1])
    with pytest.raises(TrainingError, match="epoch 1, step 2: the loss is nan"):
        train(mlp(), data, accumulate=2, after_step=seen.append, **QUICK)
    assert len(seen) == 1
    assert all(p.isfinite().all() for p in seen[0].parameters())
