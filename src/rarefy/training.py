"""One training loop, on Hugging Face Accelerate: training, fine-tuning and distillation.

:func:`train` learns from labels, :func:`distill` from a teacher; both return a new network and
leave what they were given as it was. :func:`evaluate` is the metric that they show.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rarefy.batches import batch_size, batches, call, evaluating, logits, map_tensors, seeded
from rarefy.copies import fingerprint
from rarefy.distillation.losses import KD, CrossEntropy
from rarefy.errors import DataError, InputError, TrainingError
from rarefy.graph.program import GraphModel
from rarefy.metrics import tensor_of_labels, top1
from rarefy.process import local_share, own_accelerator, quiet_setup, replayable
from rarefy.progress import EpochDisplay
from rarefy.schedules import Constant, Cosine, Linear, Schedule, Warmup
from rarefy.types import Data, Inputs

if TYPE_CHECKING:
    from accelerate import Accelerator

LossFunction: TypeAlias = Callable[..., Tensor]
"""``loss(logits, reference)`` to a scalar, such as those of :mod:`rarefy.distillation.losses`."""

AfterStep: TypeAlias = Callable[[nn.Module], None]
"""Called with the network after every optimizer step."""

Penalty: TypeAlias = Callable[[nn.Module, int], Tensor]
"""``penalty(model, step)`` to a scalar that is added to the loss, such as those of
:mod:`rarefy.pruning.sparsity.regularize`."""

SCHEDULES: Mapping[str, Callable[[int], Schedule]] = {
    "cosine": lambda steps: Cosine(1.0, steps),
    "linear": lambda steps: Linear(1.0, 0.0, steps),
    "constant": lambda steps: Constant(1.0),
}
"""Name to the schedule of the factor on the learning rate, over so many steps."""


@dataclass(frozen=True)
class _Recipe:
    """An optimizer: its learning rates where none is given, and how to build it.

    Attributes:
        lr: to train a network.
        gentle: to distil, where the student often knows much already: it was cut from its teacher.
    """

    lr: float
    gentle: float
    build: Callable[[list[dict[str, Any]], float, float], torch.optim.Optimizer]


OPTIMIZERS: Mapping[str, _Recipe] = {
    "sgd": _Recipe(0.1, 0.02, lambda groups, lr, m: torch.optim.SGD(groups, lr=lr, momentum=m)),
    "adamw": _Recipe(
        0.001, 0.001, lambda groups, lr, m: torch.optim.AdamW(groups, lr=lr, betas=(m, 0.999))
    ),
}
"""Name to optimizer."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the same for :func:`train` and :func:`distill`.

    Args:
        epochs: how often the data are read, at least 1.
        lr: the highest learning rate; None for the optimizer's own: 0.1 for SGD
            (0.02 to distil), 0.001 for AdamW.
        optimizer: ``"sgd"`` or ``"adamw"``.
        momentum: of SGD, and the first beta of AdamW, in [0, 1).
        weight_decay: on parameters of two and more dimensions; biases, BatchNorm and other scales
            and vectors are not decayed. At least 0.
        schedule: ``"cosine"``, ``"linear"`` (both fall to 0) or ``"constant"``.
        warmup: share of the training over which the learning rate rises to ``lr``, in [0, 1).
        clip_norm: the largest norm of all gradients together; None for no limit.

    The learning rate changes at every step where the data say how many batches they have
    (``len(data)``), and at every epoch where they do not.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> TrainOptions(epochs=30, lr=0.05).optimizer
        'sgd'
    """

    epochs: int = 10
    lr: float | None = None
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for name, (valid, rule) in _RULES.items():
            value = getattr(self, name)
            if not valid(value):
                raise InputError(f"{name}={value!r}", f"{name} must be {rule}", f"Give {rule}")


def _positive(value: float | None) -> bool:
    return value is None or (isinstance(value, int | float) and 0 < value < math.inf)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda v: isinstance(v, int) and v >= 1, "a whole number, at least 1"),
    "lr": (_positive, "a number above 0, or None"),
    "optimizer": (lambda v: v in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
    "momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "a number, at least 0"),
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup": (lambda v: 0 <= v < 1, "a share of the training, at least 0 and below 1"),
    "clip_norm": (_positive, "a number above 0, or None"),
}


def train(
    model: nn.Module,
    data: Data,
    *,
    loss: LossFunction | None = None,
    options: TrainOptions | None = None,
    val: Data | None = None,
    seed: int = 0,
    progress: bool = True,
    after_step: AfterStep | None = None,
    regularizer: Penalty | None = None,
    **changes: Any,
) -> nn.Module:
    """Train a copy of a network on labelled data.

    Accelerate chooses the device (``accelerate config`` and ``accelerate launch`` apply); the
    result is on the device of ``model``. All its modules are trained in training mode, all
    parameters with ``requires_grad`` are learned.

    Two runs with one seed on one machine are equal bit for bit. Where a ``DataLoader`` has a
    generator of its own, that generator decides the order and starts every run from the state that
    it has when the run begins; its state is put back afterwards, like the global random states.

    A batch of a single example is left out where the network has BatchNorm, which needs two.

    Args:
        model: the network; it is not changed.
        data: labelled batches, see :mod:`rarefy.batches`; read once per epoch.
        loss: ``loss(logits, labels)`` to a scalar; None for :class:`CrossEntropy`.
        options: how to train; None for the defaults of :class:`TrainOptions`.
        val: labelled batches whose top-1 accuracy is shown before the first step and after every
            epoch, and not computed where nothing is shown. It has no influence on the result: the
            last epoch is returned, not the best.
        seed: of shuffling, dropout and augmentation.
        progress: show a bar on a terminal, or a line for every epoch elsewhere, on stderr.
        after_step: called with the network after every optimizer step, for example to keep pruned
            weights at zero. It may change weights in place, and nothing else.
        regularizer: ``penalty(model, step)``, added to the loss.
        **changes: single fields of ``options``, for example ``epochs=30, lr=0.05``.

    Returns:
        The trained network, in eval mode.

    Raises:
        InputError: the network has nothing to train or holds NaN, or an option is out of range.
        DataError: the data are empty, not labelled, or cannot be read a second time.
        TrainingError: the loss or a weight is no longer finite.

    Example:
        >>> net = train(nn.Linear(4, 2), [(torch.zeros(8, 4), torch.zeros(8).long())],
        ...             epochs=1, progress=False)
        >>> net.training
        False
    """
    job = _Job(
        "train", _options("train", options, changes), val, seed, progress, after_step, regularizer
    )
    return _fit(model, data, _Objective("train", loss or CrossEntropy()), job)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    data: Data,
    *,
    loss: LossFunction | None = None,
    label_weight: float = 0.1,
    options: TrainOptions | None = None,
    val: Data | None = None,
    seed: int = 0,
    progress: bool = True,
    after_step: AfterStep | None = None,
    regularizer: Penalty | None = None,
    **changes: Any,
) -> nn.Module:
    """Train a copy of the student to give the teacher's answers (Hinton et al. 2015).

    The objective is ``(1 - label_weight) * loss(student, teacher) + label_weight * cross entropy``
    on labelled batches and ``loss(student, teacher)`` on unlabelled ones. Both networks see the
    same inputs, so that augmentation in ``data`` is safe. The teacher works in eval mode without
    gradients. Where the inputs are a mapping with an ``attention_mask`` of the shape of a
    sequence's logits ``(B, L, C)`` without the classes, padding counts for nothing.

    Labels of sequences must stand at the position of their prediction: nothing is shifted.

    Args:
        teacher: the network to learn from; it is not changed.
        student: the network to train; it is not changed.
        data: batches, labelled or not, see :mod:`rarefy.batches`; read once per epoch.
        loss: ``loss(student_logits, teacher_logits)`` to a scalar, with ``mask=`` where there is
            one; None for ``KD(temperature=4)``.
        label_weight: share of the cross entropy on the true labels, 0 to 1.
        options: how to train; None for the defaults of :class:`TrainOptions`.
        val: labelled batches; the accuracy of teacher and student on them is shown before the
            first step, that of the student after every epoch.
        seed: as for :func:`train`, as are the arguments that follow.
        progress: show progress.
        after_step: called with the student after every optimizer step.
        regularizer: ``penalty(student, step)``, added to the objective.
        **changes: single fields of ``options``.

    Returns:
        The trained student, in eval mode.

    Raises:
        InputError: the student has nothing to train, a network holds NaN, the two have other
            numbers of classes, or an option is out of range.
        DataError: the data are empty, or cannot be read a second time.
        TrainingError: the loss or a weight is no longer finite, or the teacher changed.

    Example:
        >>> student = distill(nn.Linear(4, 2), nn.Linear(4, 2), [torch.zeros(8, 4)],
        ...                   epochs=1, progress=False)
    """
    if not 0 <= label_weight <= 1:
        raise InputError(
            f"distill(label_weight={label_weight!r})", "it is a share, 0 to 1", "Write 0.1"
        )
    if getattr(loss, "against", "teacher") != "teacher":
        raise InputError(
            f"distill(loss={loss!r})",
            "it compares with labels, not with a teacher",
            "Give KD() or MSE(); label_weight is the share of the labels",
        )
    chosen = _options("distill", options, changes)
    if chosen.lr is None:
        chosen = replace(chosen, lr=OPTIMIZERS[chosen.optimizer].gentle)
    job = _Job("distill", chosen, val, seed, progress, after_step, regularizer)
    _require_finite(teacher, "distill(teacher)", InputError, "Check the checkpoint")
    objective = _Objective(
        "distill", loss or KD(), _copy(teacher, "distill(teacher)"), label_weight
    )
    assert objective.teacher is not None
    before = fingerprint(objective.teacher)
    result = _fit(student, data, objective, job)
    if fingerprint(objective.teacher) != before:
        raise TrainingError(
            "distill(teacher)",
            "the teacher's weights or buffers changed while it only answered",
            "Take out of its forward what writes to them, such as statistics kept in eval mode",
        )
    return result


def evaluate(model: nn.Module, data: Data) -> float:
    """Top-1 accuracy: the share of labels that have the highest logit, 0 to 1.

    The network is evaluated where it is, in eval mode without gradients; its training flags and
    the global random states are as before afterwards. For logits of several positions,
    ``(B, L, C)`` or ``(B, C, H, W)``, every position labelled other than -100 counts.

    Args:
        model: the network.
        data: labelled batches, see :mod:`rarefy.batches`.

    Raises:
        DataError: the data are empty or not labelled, or labels do not fit the logits.
        InputError: the logits hold NaN.

    Example:
        >>> evaluate(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    device = _device(model)
    with evaluating(model), seeded(0), replayable(data):
        return top1(lambda x: call(model, _to(x, device)), data, where="evaluate")


# --- what is trained, and against what -----------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """The arguments that every kind of training shares."""

    where: str
    options: TrainOptions
    val: Data | None
    seed: int
    progress: bool
    after_step: AfterStep | None
    regularizer: Penalty | None


class _Network(nn.Module):
    """Inputs to logits. What Accelerate wraps and patches is this, never the user's network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        return logits(call(self.model, inputs))


class _Objective(nn.Module):
    """A batch to the loss: against its labels, or against a teacher."""

    def __init__(
        self,
        where: str,
        loss: LossFunction,
        teacher: nn.Module | None = None,
        label_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.where, self.teacher = where, teacher
        # A module follows this one's device and mode; a copy, for the caller's stays as it is.
        self.loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
        self.label_weight, self.label_loss = label_weight, CrossEntropy()

    def forward(self, network: nn.Module, inputs: Inputs, labels: Tensor | None) -> Tensor:
        if self.teacher is None:
            student = network(inputs)
            return self.loss(student, self.labels(labels, student.device))
        with torch.no_grad():
            answers = logits(call(self.teacher, inputs))
        student = network(inputs)
        options = _mask(inputs, student)
        value = self.loss(student, answers, **options)
        if labels is None or not self.label_weight:
            return value
        hard = self.label_loss(student, self.labels(labels, student.device), **options)
        return (1 - self.label_weight) * value + self.label_weight * hard

    def labels(self, labels: Tensor | None, device: torch.device) -> Tensor:
        """The labels on a device, or an error where there are none."""
        return tensor_of_labels(self.where, labels).to(device, non_blocking=True)


def _mask(inputs: Inputs, answers: Tensor) -> dict[str, Tensor]:
    """``{"mask": ...}`` where the inputs say which positions of a sequence are padding."""
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    fits = isinstance(found, Tensor) and answers.ndim == 3 and found.shape == answers.shape[:2]
    return {"mask": found} if fits and found is not None else {}


# --- the loop ------------------------------------------------------------------------------------


def _fit(model: nn.Module, data: Data, objective: _Objective, job: _Job) -> nn.Module:
    """Train a copy of ``model`` on an objective."""
    _require_trainable(model, job.where)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded(job.seed),
        replayable(data, job.val),
        own_accelerator() as accelerator,
    ):
        result = _copy(model, job.where)
        objective.to(accelerator.device).eval()
        loop = _Loop(result, local_share(data, accelerator), objective, job, accelerator)
        with loop.display:
            loop.run()
    for parameter in result.parameters():
        parameter.grad = None
    return result.to(_device(model)).eval()


class _Loop:
    """The state of one training run."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        objective: _Objective,
        job: _Job,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.data, self.objective, self.job = model, data, objective, job
        self.options, self.accelerator = job.options, accelerator
        self.length, self.steps = operator.length_hint(data, 0), 0
        steps = max(self.length, 1) * self.options.epochs
        self.schedule = _schedule(self.options, steps)
        with quiet_setup():
            built = _optimizer(model.to(accelerator.device).train(), self.options)
            self.network, wrapped = accelerator.prepare(_Network(model), built)
        # Accelerate's wrapper costs 0.3 ms a step: only where it does something.
        plain = accelerator.distributed_type == "NO" and accelerator.scaler is None
        self.optimizer = built if plain else wrapped
        self.peak = self.optimizer.param_groups[0]["lr"]
        self.needs_two = _has_batch_norm(model)
        shown = job.progress and accelerator.is_main_process
        self.val = job.val if shown else None  # accuracy is for the eye only
        self.display = EpochDisplay(job.where, self.options.epochs, self.length, shown)

    def run(self) -> None:
        """All epochs; the model is trained in place."""
        if self.val is not None:
            before = {"teacher": self.objective.teacher, "before": self.model}
            found = {k: evaluate(m, self.val) for k, m in before.items() if m is not None}
            self.display.note("  ".join(f"{k} {v:.2%}" for k, v in found.items()) + "  on val")
        for epoch in range(self.options.epochs):
            mean = self.epoch(epoch)
            _require_finite(
                self.model, f"{self.job.where}, epoch {epoch + 1}", TrainingError, _DIVERGED
            )
            accuracy = None if self.val is None else evaluate(self.model, self.val)
            self.display.epoch(epoch, mean, accuracy)

    def epoch(self, epoch: int) -> float:
        """One pass over the data; returns the mean loss of its steps."""
        total, steps = 0.0, 0
        where = f"{self.job.where}(data), epoch {epoch + 1}"
        for index, (inputs, labels) in enumerate(batches(self.data, where)):
            if self.needs_two and batch_size(inputs) < 2:
                self.display.once("left out a batch of one example: BatchNorm needs two")
                continue
            loss = self.step(epoch, index, inputs, labels)
            total, steps = total + loss, steps + 1
            self.display.step(epoch, index, loss)
        if not steps:
            raise DataError(
                where,
                "every batch holds a single example, and BatchNorm needs two to train",
                "Use larger batches, or a network without BatchNorm",
            )
        return total / steps

    def step(self, epoch: int, index: int, inputs: Inputs, labels: Tensor | None) -> float:
        """One optimizer step; returns the loss before it."""
        done = epoch * self.length + min(index, self.length - 1) if self.length else epoch
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * self.schedule(done)
        device = self.accelerator.device
        with self.accelerator.autocast():
            loss = self.objective(self.network, _to(inputs, device), labels)
        if self.job.regularizer is not None:
            loss = loss + self.job.regularizer(self.model, self.steps)
        self.steps += 1
        value = _checked(loss, f"{self.job.where}, epoch {epoch + 1}, step {index + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.options.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.options.clip_norm)
        self.optimizer.step()
        if self.job.after_step is not None:
            with torch.no_grad():
                self.job.after_step(self.model)
        return value


_DIVERGED = "Lower lr, set clip_norm=1.0 or a longer warmup, and check the inputs for NaN"


def _checked(loss: Tensor, where: str) -> float:
    """The loss as a number, or an error where it cannot be minimized."""
    if loss.numel() != 1 or not loss.requires_grad:
        raise InputError(
            where,
            f"the loss, of shape {tuple(loss.shape)}, is no scalar that depends on the parameters",
            "Return one number, and do not detach the logits in the network",
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(where, f"the loss is {value}", _DIVERGED)
    return value


def _schedule(options: TrainOptions, steps: int) -> Schedule:
    warmup = int(options.warmup * steps)
    return Warmup(SCHEDULES[options.schedule](steps - warmup), warmup)


def _optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    recipe = OPTIMIZERS[options.optimizer]
    lr = recipe.lr if options.lr is None else options.lr
    return recipe.build([g for g in groups if g["params"]], lr, options.momentum)


def _options(where: str, options: TrainOptions | None, changes: Mapping[str, Any]) -> TrainOptions:
    known = [field.name for field in fields(TrainOptions)]
    unknown = sorted(changes.keys() - set(known))
    if unknown:
        raise InputError(
            f"{where}({', '.join(unknown)}=...)", "no such option", f"Use {', '.join(known)}"
        )
    return replace(options or TrainOptions(), **changes)


# --- models --------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _device(model: nn.Module) -> torch.device:
    return next((t.device for _, t in _tensors(model)), torch.device("cpu"))


def _to(value: Any, device: torch.device) -> Any:
    return map_tensors(lambda t: t.to(device, non_blocking=True), value)


def _copy(model: nn.Module, where: str) -> nn.Module:
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            where,
            f"the network cannot be copied: {error}",
            "Keep no computed tensors, locks or open files as its attributes",
        ) from error


def _require_trainable(model: nn.Module, where: str) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"{where}(model)",
            "no parameter is trainable",
            "Give a network with parameters, and set requires_grad on those to learn",
        )
    devices = {tensor.device for _, tensor in _tensors(model)}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise InputError(
            f"{where}(model)",
            f"its tensors are on {sorted(map(str, devices))}",
            "Move it to one real device first",
        )
    _require_finite(model, f"{where}(model)", InputError, "Check the checkpoint it was loaded from")


def _require_finite(
    model: nn.Module, where: str, error: type[InputError | TrainingError], remedy: str
) -> None:
    """Parameters are finite and buffers hold no NaN (an attention mask may hold ``-inf``)."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise error(where, f"parameter {name!r} holds NaN or infinity", remedy)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise error(where, f"buffer {name!r} holds NaN", remedy)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(
        isinstance(module, _BatchNorm)
        or (
            isinstance(module, GraphModel)
            and any(node.op == "aten.batch_norm.default" for node in module.graph.calls)
        )
        for module in model.modules()
    )
