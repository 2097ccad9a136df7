"""How good a network is: metrics as small values, whatever computes the outputs.

A metric is any callable ``metric(model, data) -> float``; higher is better, unless it has an
attribute ``lower_is_better`` that is true. Those of this module are means over all that counts in
the data, so that batches of any size, and processes that share the data, give the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.batches import batches, call, device_of, logits, moved
from rarefy.distillation.losses import IGNORE, label_dim
from rarefy.errors import DataError, InputError
from rarefy.types import Data, Inputs

Metric: TypeAlias = Callable[[nn.Module, Data], float]
"""``metric(model, data)``, called in eval mode without gradients."""

Predict: TypeAlias = Callable[[Inputs], Any]
"""Inputs to logits, or to what holds them as ``logits``."""


class Ratio:
    """A metric that is a ratio of two sums over the data; each subclass says of which.

    Attributes:
        title: its name in lines and tables.
        lower_is_better: whether less is better.
    """

    title: ClassVar[str]
    lower_is_better: ClassVar[bool] = False

    def sums(self, where: str, answers: Tensor, labels: Tensor) -> tuple[float, float]:
        """Numerator and denominator of one batch."""
        raise NotImplementedError

    def result(self, total: float, count: float) -> float:
        """The metric of the two sums."""
        return total / count

    def show(self, value: float) -> str:
        """The value with its unit."""
        return f"{value:.4g}"

    def totals(
        self, predict: Predict, data: Data, where: str, part: int = 0, parts: int = 1
    ) -> tuple[float, float]:
        """Both sums over the data, or over every so many batches from the ``part``-th on."""
        total = count = 0.0
        with torch.no_grad():
            for index, (inputs, labels) in enumerate(batches(data, f"{where}(data)")):
                if index % parts == part:
                    answers = logits(predict(inputs))
                    known = tensor_of_labels(where, labels).to(answers.device)
                    found = self.sums(where, answers, known)
                    total, count = total + found[0], count + found[1]
        return total, count

    def final(self, where: str, total: float, count: float) -> float:
        """The metric of sums over all of the data, or an error where nothing counts."""
        if not count:
            raise DataError(
                f"{where}(data)", "no position has a label", f"Label some other than {IGNORE}"
            )
        return self.result(total, count)

    def over(self, predict: Predict, data: Data, where: str) -> float:
        """The metric of anything that answers inputs."""
        return self.final(where, *self.totals(predict, data, where))

    def __call__(self, model: nn.Module, data: Data) -> float:
        return self.over(predictor(model), data, "evaluate")


@dataclass(frozen=True)
class Top1(Ratio):
    """Top-1 accuracy: the share of labels that have the highest logit, 0 to 1.

    For logits of several positions, (B, L, C) or (B, C, H, W), every position labelled other than
    -100 counts.
    """

    title: ClassVar[str] = "top-1"

    def sums(self, where: str, answers: Tensor, labels: Tensor) -> tuple[float, float]:
        hits = _hits(where, answers, labels)
        return float(hits.sum()), float(len(hits))

    def show(self, value: float) -> str:
        return f"{value:.2%}"


@dataclass(frozen=True)
class Perplexity(Ratio):
    """``exp`` of the mean cross entropy (in nats) of the labels; lower is better, 1 is the least.

    For logits (B, C), (B, L, C) or (B, C, H, W); every position labelled other than -100 counts.
    Nothing is shifted: labels stand at the position of their prediction.
    """

    title: ClassVar[str] = "perplexity"
    lower_is_better: ClassVar[bool] = True

    def sums(self, where: str, answers: Tensor, labels: Tensor) -> tuple[float, float]:
        count = len(_hits(where, answers, labels))
        scores = answers.movedim(label_dim(f"{where}(data)", answers, labels), 1).float()
        loss = F.cross_entropy(scores, labels.long(), ignore_index=IGNORE, reduction="none")
        return float(loss.double().sum()), float(count)

    def result(self, total: float, count: float) -> float:
        mean = total / count
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class F1(Ratio):
    """Micro-averaged F1 of binary decisions, ``2 TP / (2 TP + FP + FN)``, 0 to 1.

    For multi-label classification: logits and labels of one shape, such as (B, C), labels 0 or 1;
    labels of -100 count for nothing. It is 1 where nothing was to be found and nothing was.

    Args:
        threshold: the probability from which on the answer is yes, in (0, 1).
    """

    threshold: float = 0.5
    title: ClassVar[str] = "F1"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise InputError(
                f"F1(threshold={self.threshold!r})",
                "it is a probability, above 0 and below 1",
                "Write threshold=0.5",
            )

    def sums(self, where: str, answers: Tensor, labels: Tensor) -> tuple[float, float]:
        _same_shape(where, answers, labels)
        counts = labels != IGNORE
        yes, true = (answers.float().sigmoid() >= self.threshold)[counts], labels[counts] > 0.5
        return 2.0 * float((yes & true).sum()), float(yes.sum() + true.sum())

    def final(self, where: str, total: float, count: float) -> float:
        return total / count if count else 1.0

    def show(self, value: float) -> str:
        return f"{value:.2%}"


@dataclass(frozen=True)
class PSNR(Ratio):
    """Peak signal-to-noise ratio in dB: the mean over images of ``10 log10(peak^2 / MSE)``.

    For outputs and targets of one shape (B, ...); every example is an image. An image without any
    error counts as 100 dB, so that means stay finite.

    Args:
        peak: the range of the values: 1 for images in [0, 1], 255 for bytes.
    """

    peak: float = 1.0
    title: ClassVar[str] = "PSNR"

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise InputError(
                f"PSNR(peak={self.peak!r})", "the range of the values is above 0", "Write peak=1.0"
            )

    def sums(self, where: str, answers: Tensor, labels: Tensor) -> tuple[float, float]:
        _same_shape(where, answers, labels)
        errors = (answers.double() - labels.double()).square().flatten(1).mean(1)
        ratios = 10 * torch.log10(self.peak**2 / errors)
        return float(ratios.clamp(max=100.0).sum()), float(len(ratios))

    def show(self, value: float) -> str:
        return f"{value:.2f} dB"


@dataclass(frozen=True)
class MeanError(Ratio):
    """Mean absolute error in the unit of the targets; lower is better.

    For regression: outputs and targets of one shape, every number counts.
    """

    title: ClassVar[str] = "mean error"
    lower_is_better: ClassVar[bool] = True

    def sums(self, where: str, answers: Tensor, labels: Tensor) -> tuple[float, float]:
        _same_shape(where, answers, labels)
        return float((answers.double() - labels.double()).abs().sum()), float(labels.numel())


def lower_is_better(metric: Metric) -> bool:
    """Whether less of a metric is better."""
    return bool(getattr(metric, "lower_is_better", False))


def title(metric: Metric) -> str:
    """What lines and tables call a metric."""
    if isinstance(metric, Ratio):
        return metric.title
    return str(getattr(metric, "__name__", type(metric).__name__))


def show(metric: Metric, value: float) -> str:
    """A value of a metric as lines and tables have it."""
    return metric.show(value) if isinstance(metric, Ratio) else f"{value:.4g}"


def predictor(model: nn.Module) -> Predict:
    """The answers of a network to inputs that are anywhere."""
    device = device_of(model)
    return lambda inputs: call(model, moved(inputs, device))


def top1(predict: Predict, data: Data, *, where: str = "top1") -> float:
    """Top-1 accuracy of anything that answers inputs, see :class:`Top1`.

    Args:
        predict: inputs to logits of shape (B, C), (B, L, C) or (B, C, H, W), or to what holds them
            as ``logits``.
        data: labelled batches, see :mod:`rarefy.batches`.
        where: the call that errors name.

    Raises:
        DataError: the data are empty or not labelled, or labels do not fit the logits.
        InputError: the logits hold NaN, or there are none.

    Example:
        >>> top1(lambda x: x, [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    return Top1().over(predict, data, where)


def tensor_of_labels(where: str, labels: Any) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: the batch is not labelled, or not with a tensor.
    """
    if isinstance(labels, Tensor):
        return labels
    what = "a batch is unlabelled" if labels is None else f"labels are a {type(labels).__name__}"
    raise DataError(
        f"{where}(data)",
        what,
        "Yield (inputs, labels) with a tensor of labels; distill(...) needs none",
    )


def _same_shape(where: str, answers: Tensor, labels: Tensor) -> None:
    if answers.shape != labels.shape:
        raise DataError(
            f"{where}(data)",
            f"outputs {tuple(answers.shape)} and targets {tuple(labels.shape)} differ in shape",
            "Give targets of the shape of the outputs",
        )
    if answers.isnan().any():
        raise InputError(f"{where}(model)", "its outputs hold NaN", "Check its weights and data")


def _hits(where: str, answers: Tensor, labels: Tensor) -> Tensor:
    """For every labelled position whether its highest logit is that of the label."""
    dim = label_dim(f"{where}(data)", answers, labels)
    best, classes = answers.argmax(dim=dim), answers.shape[dim]
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise DataError(
            f"{where}(data)",
            f"label {int(wrong[0])} is none of the network's {classes} classes",
            f"Number the classes from 0 to {classes - 1}",
        )
    if answers.isnan().any():
        raise InputError(f"{where}(model)", "its logits hold NaN", "Check its weights and the data")
    return (best == labels)[labels != IGNORE]
