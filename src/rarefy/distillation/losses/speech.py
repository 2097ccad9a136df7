"""Losses of speech recognizers: posteriors of CTC, and label sequences that the teacher decoded.

Frames with a class each need nothing of their own: :class:`KD` takes ``(B, L, C)`` with a mask, and
:class:`CrossEntropy` the teacher's classes as labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.distillation.losses.arithmetic import divergence, precise
from rarefy.distillation.losses.base import (
    POSITIVE,
    POSITIVE_SHARE,
    Against,
    Loss,
    Number,
    require,
)
from rarefy.distillation.losses.layouts import IGNORE, require_mask, require_same_logits
from rarefy.errors import DataError, InputError


@dataclass(frozen=True)
class CTCPosteriors(Loss):
    """Frame by frame divergence of CTC posteriors, without the blanks, and with room for delays.

    Hinton's loss for every frame that counts, as for :class:`KD`::

        T^2 * mean over frames of sum over classes of p * (log p - log q)

    Networks trained by CTC put their spikes where they like, and most frames are blank, so that
    frames need not agree (Takashima et al. 2018, "An Investigation of a Knowledge Distillation
    Method for CTC Acoustic Models"). Two remedies of ours: frames to which the teacher gives a
    blank with a probability above ``blank_below`` can be left out, and with ``delay`` every
    utterance is compared at the shift, of at most so many frames to either side, at which its mean
    is least. Frames that a shift moves out of the utterance count for nothing, and a shift that
    leaves fewer than half of those that count without it is not considered.

    Logits are ``(B, L, C)`` with a mask ``(B, L)``; those of ``nn.CTCLoss``, ``(L, B, C)``, are
    transposed first.

    Args:
        temperature: T, above 0.
        blank: the class of the blank.
        blank_below: the highest probability of the blank, at temperature 1, at which a frame
            counts; above 0, at most 1, which leaves no frame out.
        delay: the longest shift in frames, at least 0.

    Raises:
        InputError: an argument is out of range; when called, the shapes differ or do not fit.

    Example:
        >>> logits = torch.randn(2, 6, 5)
        >>> CTCPosteriors(blank_below=0.9, delay=2)(logits, logits.roll(1, dims=1)).item() < 1e-6
        True
    """

    temperature: Number = 1.0
    blank: int = 0
    blank_below: Number = 1.0
    delay: int = 0
    against: ClassVar[Against] = "teacher"

    def __post_init__(self) -> None:
        require(self, POSITIVE, "temperature")
        require(self, POSITIVE_SHARE, "blank_below")
        for name in ("blank", "delay"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise InputError(
                    f"CTCPosteriors({name}={value!r})", "it counts from 0", f"Write {name}=0"
                )

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        temperature = self.number("temperature")
        _require_frames("CTCPosteriors", logits, self.blank)
        require_same_logits("CTCPosteriors", logits, reference, 2)
        real = _real("CTCPosteriors", logits, mask)
        student, teacher = (
            precise(x).masked_fill(~real[..., None], 0.0) for x in (logits, reference.detach())
        )
        limit = self.number("blank_below")
        counts = real & (F.softmax(teacher, -1)[..., self.blank] <= limit)
        log_q, log_p = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
        each, frames = _best_shift(log_p, log_q, counts, real, self.delay)
        return temperature**2 * each.sum() / frames.sum().clamp_min(1)


def _best_shift(
    log_p: Tensor, log_q: Tensor, counts: Tensor, real: Tensor, delay: int
) -> tuple[Tensor, Tensor]:
    """Each utterance's divergence at its best shift, summed over frames, and their numbers."""
    totals, numbers = [], []
    length = counts.shape[1]
    for shift in sorted(range(-delay, delay + 1), key=abs):
        if abs(shift) >= max(length, 1) and shift:
            continue
        of_teacher = slice(max(-shift, 0), length - max(shift, 0))
        of_student = slice(max(shift, 0), length - max(-shift, 0))
        both = counts[:, of_teacher] & real[:, of_student]
        each = divergence(log_p[:, of_teacher], log_q[:, of_student]).sum(-1)
        totals.append(each.masked_fill(~both, 0.0).sum(1))
        numbers.append(both.sum(1))
    total, number = torch.stack(totals), torch.stack(numbers)
    means = total.detach() / number.clamp_min(1)
    best = means.masked_fill(2 * number < number[:1], torch.inf).argmin(0, keepdim=True)
    return total.gather(0, best)[0], number.gather(0, best)[0]


@dataclass(frozen=True)
class CTC(Loss):
    """Connectionist temporal classification: label sequences whose places in time are not known.

    Graves et al. 2006, "Connectionist Temporal Classification"::

        mean over utterances of -log p(labels | logits) / number of labels

    as ``nn.CTCLoss`` averages. With the label sequences that the teacher decoded
    (:func:`greedy_labels`, or a beam search of one's own) this is sequence-level distillation (Kim
    and Rush 2016, "Sequence-Level Knowledge Distillation"; Takashima et al. 2019 for CTC). An
    utterance too short for its labels counts as 0, for no output could say them.

    Logits are ``(B, L, C)``, with a mask ``(B, L)`` whose padding comes last; labels are class
    indices ``(B, S)``, padded by -100 at their end.

    Args:
        blank: the class of the blank.

    Raises:
        InputError: the blank is no class; when called, the logits or the mask do not fit.
        DataError: when called, the labels do not fit the logits, or one is no class.

    Example:
        >>> round(CTC()(torch.zeros(1, 2, 2), torch.tensor([[1]])).item(), 4)
        0.2877
    """

    blank: int = 0
    against: ClassVar[Against] = "labels"

    def __post_init__(self) -> None:
        if not isinstance(self.blank, int) or self.blank < 0:
            raise InputError(f"CTC(blank={self.blank!r})", "it is a class", "Write blank=0")

    def __call__(self, logits: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
        _require_frames("CTC", logits, self.blank)
        real = _real("CTC", logits, mask)
        frames = real.sum(1)
        if not torch.equal(real, _first(frames, real.shape[1])):
            raise InputError("CTC", "frames are missing within", "Put all padding at the end")
        labels, lengths = _sequences(reference, logits, self.blank)
        if not len(logits):
            return precise(logits).sum()
        log_q = F.log_softmax(precise(logits).masked_fill(~real[..., None], 0.0), dim=-1)
        total = F.ctc_loss(
            log_q.transpose(0, 1),
            labels,
            frames,
            lengths,
            blank=self.blank,
            reduction="none",
            zero_infinity=True,
        )
        return (total / lengths.clamp_min(1)).mean()


def greedy_labels(logits: Tensor, mask: Tensor | None = None, blank: int = 0) -> Tensor:
    """Label sequences of CTC posteriors: the likeliest class of every frame, merged, no blanks.

    Args:
        logits: of the teacher, ``(B, L, C)``.
        mask: ``(B, L)``; frames where it is 0 or False are skipped.
        blank: the class of the blank.

    Returns:
        Class indices ``(B, S)`` with S the length of the longest, padded by -100.

    Raises:
        InputError: the logits or the mask do not fit, or the blank is no class.

    Example:
        >>> frames = torch.tensor([[1, 1, 0, 2, 2, 0, 2]])
        >>> greedy_labels(torch.nn.functional.one_hot(frames, 3).float())
        tensor([[1, 2, 2]])
    """
    _require_frames("greedy_labels", logits, blank)
    real = _real("greedy_labels", logits, mask)
    classes = logits.detach().argmax(-1).masked_fill(~real, blank)
    before = F.pad(classes[:, :-1], (1, 0), value=blank)[:, : classes.shape[1]]
    spoken = (classes != before) & (classes != blank)
    lengths = spoken.sum(1)
    found = classes.new_full((len(classes), int(lengths.max()) if len(lengths) else 0), IGNORE)
    found[_first(lengths, found.shape[1])] = classes[spoken]
    return found


def _first(lengths: Tensor, size: int) -> Tensor:
    """``(B, size)``, True at the first so many places of each."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _require_frames(where: str, logits: Tensor, blank: int) -> None:
    if logits.ndim != 3 or not logits.is_floating_point():
        raise InputError(
            where,
            f"logits of shape {tuple(logits.shape)}, {logits.dtype}, are no frames",
            "Give floating-point logits (B, L, C)",
        )
    if blank >= logits.shape[-1]:
        raise InputError(
            f"{where}(blank={blank})",
            f"there are {logits.shape[-1]} classes",
            "Name the class of the blank, counted from 0",
        )


def _real(where: str, logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    require_mask(where, logits, 2, mask)
    return mask.bool()


def _sequences(labels: Tensor, logits: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Label sequences without their padding's number, int64, and their lengths."""
    shape, classes = tuple(labels.shape), logits.shape[-1]
    if labels.ndim != 2 or len(labels) != len(logits) or labels.is_floating_point():
        raise DataError(
            "CTC",
            f"labels of shape {shape}, {labels.dtype}, are no sequences for {len(logits)} inputs",
            f"Give class indices (B, S), padded by {IGNORE} at the end",
        )
    spoken = labels != IGNORE
    lengths = spoken.sum(1)
    wrong = spoken & ((labels < 0) | (labels >= classes) | (labels == blank))
    if wrong.any() or not torch.equal(spoken, _first(lengths, shape[1])):
        what = f"label {int(labels[wrong][0])}" if wrong.any() else f"{IGNORE} before a label"
        raise DataError(
            "CTC",
            f"{what} is none of the {classes} classes, or is the blank",
            f"Give classes from 0 to {classes - 1} other than {blank}; {IGNORE} pads the end",
        )
    return labels.long().masked_fill(~spoken, blank), lengths
