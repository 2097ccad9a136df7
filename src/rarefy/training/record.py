"""What a training did, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Epoch:
    """One epoch.

    Attributes:
        number: from 1.
        loss: mean over its optimizer steps, on all processes together.
        lr: learning rate of its last step.
        val: the metric after it; None without ``val``.
        seconds: how long it took, with its evaluation.
    """

    number: int
    loss: float
    lr: float
    val: float | None
    seconds: float


@dataclass(frozen=True)
class Fit:
    """How good one network is on the data it was trained on, and on others.

    Attributes:
        train: the metric on a sample of the training data, as they come, with their augmentation;
            None where the sample is not labelled or was not looked at.
        val: the metric on ``val``.
    """

    train: float | None
    val: float

    @property
    def gap(self) -> float | None:
        """Generalization gap: ``train - val``, in the metric's unit."""
        return None if self.train is None else self.train - self.val


@dataclass(frozen=True)
class Trained:
    """What a training did; the attribute ``trained`` of its result.

    Attributes:
        metric: the name of the metric.
        epochs: the history.
        steps: optimizer steps, over all epochs.
        seconds: in training, over all sessions where it was resumed.
        kept: the epoch whose weights the result has, from 1.
        best: the epoch with the best metric on ``val``, the first of equals; None without ``val``.
        stopped: whether it ended before the last epoch that was asked for, for lack of progress.
        before: the metric of the network on ``val`` before the first step.
        student: train and val metric of the result; None without ``val``.
        teachers: those of the teachers, by name.
        sampled: number of training examples that the train metrics were computed on.
        resumed: steps that were done when it was last resumed; None where it never was.
        peer: the network that was trained along, where there is one.
    """

    metric: str
    epochs: tuple[Epoch, ...]
    steps: int
    seconds: float
    kept: int
    best: int | None
    stopped: bool
    before: float | None
    student: Fit | None
    teachers: Mapping[str, Fit]
    sampled: int
    resumed: int | None
    peer: nn.Module | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{'epoch':>5} {'loss':>10} {'lr':>10} {self.metric:>10} {'s':>8}"]
        for e in self.epochs:
            val = "" if e.val is None else f"{e.val:.4f}"
            lines.append(f"{e.number:5} {e.loss:10.4f} {e.lr:10.2g} {val:>10} {e.seconds:8.1f}")
        lines.append(f"{self.steps:,} steps in {self.seconds:.0f} s; weights of epoch {self.kept}")
        if self.best is not None:
            lines[-1] += f" of {self.last}, best epoch {self.best}"
        fits = {"student" if self.teachers else "network": self.student, **self.teachers}
        for name, fit in fits.items():
            if fit is not None:
                lines.append(f"{name}: {self.metric} on val {fit.val:.4f}")
                if fit.train is not None:
                    lines[-1] += f", on training data {fit.train:.4f}, gap {fit.gap:+.4f}"
        return "\n".join(lines)

    @property
    def last(self) -> int:
        """The last epoch that was trained, from 1."""
        return len(self.epochs)
