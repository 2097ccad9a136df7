"""Callbacks in real trainers of Lightning and transformers; skipped where these are absent."""

from __future__ import annotations

import copy
import logging
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rarefy.errors import InputError
from rarefy.pruning.gradual import GradualPruning, GradualUnits
from rarefy.pruning.sparsity.masks import hold, sparsity
from rarefy.pruning.sparsity.sparsify import sparsify
from rarefy.schedules import Constant
from rarefy.types import Budget

torch.set_num_threads(1)
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def zeros(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() == 0 for p in model.parameters() if p.ndim > 1]


def lightning_of(net: nn.Module):
    """Lightning, rarefy's callback, and a task that trains a network; for tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")
        from rarefy.integrations.lightning import AfterStep
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.validated = net, list[float]()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.validated.append(sparsity(self.net))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    return lightning, AfterStep, Task()


def fit(lightning, task, path, *callbacks, data: bool = True, **options) -> None:
    loader = DataLoader(TensorDataset(X, Y), 4)
    options = {"limit_val_batches": 2 if data else 0, "enable_checkpointing": False} | options
    lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=path, callbacks=list(callbacks), **options,
    ).fit(task, loader, loader)  # fmt: skip


def gradual_units(net: nn.Module) -> GradualUnits:
    return GradualUnits(net, X[:2], lambda step: min(0.1 * step, 0.5), every=4)


FUNCTIONS = {
    "weights": lambda net: GradualPruning(lambda step: min(0.1 * step, 0.6)),
    "units": gradual_units,
    "hold": lambda net: hold(net, {"0.weight": torch.eye(8, 6), "2.weight": torch.eye(3, 8)}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("validates", [True, False])
def test_lightning_leaves_the_zeros_in_averaged_weights(
    kind, is_first, validates, tmp_path
) -> None:
    net = network()
    lightning, callback, task = lightning_of(net)
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    function = FUNCTIONS[kind](net)
    callbacks = [callback(function, "net"), averaging.EMAWeightAveraging(decay=0.9)]
    options = {} if validates else {"num_sanity_val_steps": 0}
    fit(lightning, task, tmp_path, *callbacks[:: 1 if is_first else -1], data=validates, **options)
    masks = function.masks
    assert masks
    for path, keep in masks.items():
        held = net.get_parameter(path).detach()
        assert not held[~keep].any()
        assert held[keep].all()  # the average, and nothing else is gone
    wanted = sum(int((~keep).sum()) for keep in masks.values() if keep.ndim > 1) / 72
    assert sparsity(net) == pytest.approx(wanted)
    assert len(task.validated) == (2 * 2 + 2 if validates else 0)
    if validates:
        assert task.validated[-1] == pytest.approx(wanted)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_averages_that_were_validated_have_the_zeros(tmp_path) -> None:
    net = network()
    lightning, callback, task = lightning_of(net)
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    gradual = GradualPruning(Constant(0.5), every=4)
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, filename="last")
    callbacks = [callback(gradual, "net"), averaging.EMAWeightAveraging(decay=0.9), saving]
    fit(lightning, task, tmp_path, *callbacks, enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for path, keep in gradual.masks.items():
        assert not state[f"net.{path}"][~keep].any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("path", "remedy"),
    [("nett", "Did you mean net"), ("net.weight", "net"), ("q", "There are net, net.0, net.1")],
)
def test_a_path_that_lightnings_module_does_not_have_is_told_at_the_start(
    path, remedy, tmp_path
) -> None:
    lightning, callback, task = lightning_of(network())
    called: list[nn.Module] = []
    with pytest.raises(InputError, match="has no module of that path") as raised:
        fit(lightning, task, tmp_path, callback(called.append, network=path))
    assert raised.value.where == f"AfterStep(network={path!r})"
    assert remedy in raised.value.remedy
    assert not task.validated  # not even the check before the training
    assert not called
    with pytest.raises(InputError, match=r"a Sequential was given"):
        callback(called.append, network=task.net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning(accumulate, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")
        from rarefy.integrations.lightning import AfterStep
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Task(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    steps: list[nn.Module] = []

    def run(net: nn.Module, function) -> None:
        lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            accumulate_grad_batches=accumulate, callbacks=[AfterStep(function, network="net")],
        ).fit(Task(net), DataLoader(TensorDataset(X, Y), 4))  # fmt: skip

    sparse = sparsify(network(), Budget(sparsity=0.6))
    before, start = zeros(sparse), copy.deepcopy(sparse.state_dict())
    run(sparse, hold(sparse))
    assert all(map(torch.equal, zeros(sparse), before))
    assert not torch.equal(sparse[0].weight, start["0.weight"])
    run(network(), steps.append)
    assert len(steps) == 12 // accumulate
    dense = network()
    run(dense, GradualPruning(Constant(0.5)))
    assert sparsity(dense) == 0.5

    # a training that is resumed by other objects goes on with the masks and the step of before
    def part(epochs: int, net: nn.Module, gradual: GradualPruning, seen: list, path=None) -> None:
        other = GradualPruning(Constant(0.5), exclude=["0"], every=100)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            accumulate_grad_batches=accumulate,
            callbacks=[
                AfterStep(other, "net"),
                AfterStep(gradual, "net"),
                AfterStep(lambda model: seen.append(zeros(model)), "net"),
            ],
        )  # fmt: skip
        trainer.fit(Task(net), DataLoader(TensorDataset(X, Y), 4), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        assert other.step == gradual.step

    check_resumed(part, tmp_path / "1.ckpt", accumulate)


def check_resumed(part, path, accumulate: int) -> None:
    """Two epochs in two parts: zeros at every step hold those before, and follow the schedule."""
    steps, seen = 12 // accumulate, list[list[torch.Tensor]]()
    first, second = (
        GradualPruning(lambda step: 0.75 * step / steps, every=steps // 2) for _ in range(2)
    )
    part(1, network(), first, seen)
    assert first.step == steps // 2
    part(2, network(), second, seen, str(path))
    assert second.step == len(seen) == steps
    for before, after in pairwise(seen):
        assert all(bool(b[a].all()) for a, b in zip(before, after, strict=True))
    numbers = [sum(int(z.sum()) for z in found) for found in seen]
    assert numbers == [0] * (steps // 2 - 1) + [27] * (steps // 2) + [54]


class Rows(Dataset):
    """Examples as transformers wants them."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": X[index], "labels": Y[index]}


class Classifier(nn.Module):
    """Returns its loss, as transformers' networks do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_transformers(accumulate, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        from rarefy.integrations.transformers import AfterStep
    steps: list[nn.Module] = []

    def run(model: nn.Module, function) -> None:
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True,
            gradient_accumulation_steps=accumulate, learning_rate=0.01, weight_decay=0.1,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(
            model, arguments, train_dataset=Rows(), callbacks=[AfterStep(function)]
        ).train()

    model = sparsify(Classifier(network()), Budget(sparsity=0.6))
    before, start = zeros(model), copy.deepcopy(model.state_dict())
    run(model, hold(model))
    assert all(map(torch.equal, zeros(model), before))
    assert not torch.equal(model.net[0].weight, start["net.0.weight"])
    run(Classifier(network()), steps.append)
    assert len(steps) == 12 // accumulate
    dense = Classifier(network())
    run(dense, GradualPruning(Constant(0.5)))
    assert sparsity(dense) == 0.5

    def part(epochs: int, net: nn.Module, gradual: GradualPruning, seen: list, path=None) -> None:
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=4, use_cpu=True,
            gradient_accumulation_steps=accumulate, learning_rate=0.01, weight_decay=0.1,
            report_to=[], save_strategy="epoch", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        callbacks = [AfterStep(gradual), AfterStep(lambda model: seen.append(zeros(model)))]
        transformers.Trainer(
            Classifier(net), arguments, train_dataset=Rows(), callbacks=callbacks
        ).train(resume_from_checkpoint=path)

    check_resumed(part, tmp_path / f"checkpoint-{6 // accumulate}", accumulate)
