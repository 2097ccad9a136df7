"""One pass over the data: batches, the network that runs on each, losses, sums by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rarefy.batches import (
    LIKE_TRACED,
    batch_size,
    batches,
    between,
    call,
    fitting,
    has_tokens,
    logits,
    map_tensors,
    mask_of,
    mask_of_all,
    tensors,
)
from rarefy.distillation.losses import CrossEntropy
from rarefy.distillation.losses.layouts import IGNORE
from rarefy.errors import DataError, InputError, RarefyError, first_line
from rarefy.graph.trace import Network
from rarefy.pruning.running.origins import Origins, all_padding, counted
from rarefy.pruning.running.taps import Runner, Watched
from rarefy.types import Data, Inputs

WHERE = "prune(data)"
"""The argument that errors name."""

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> scalar, the mean over the examples of a batch."""


@dataclass(frozen=True)
class Job:
    """One pass over the data.

    Where the inputs have an ``attention_mask`` (B, L), padding counts for nothing in cross entropy
    and where labels or noise are drawn, as in :func:`rarefy.distill`.

    Attributes:
        model: the network.
        network: its trace.
        data: batches.
        loss: (logits, targets) -> mean loss of a batch; cross entropy if not given.
        labelled: whether labels must be given.
        drawn: whether labels are drawn though some are given, whose type alone counts: those of
            real numbers tell that the outputs are no logits.
        generator: of what is drawn.
    """

    model: nn.Module
    network: Network
    data: Data
    loss: LossFunction | None
    labelled: bool
    drawn: bool
    generator: torch.Generator

    def passes(self, runner: Runner) -> Iterator[tuple[Watched, Inputs, Any, int]]:
        """For each batch, the network that runs on it, inputs, labels and number of examples.

        Batches that are nothing but padding are passed over.

        Raises:
            DataError: there is none, or nothing but padding.
        """
        seen = False
        for inputs, targets in batches(self.data, WHERE):
            if not has_tokens(inputs):
                continue
            seen = True
            copies = map_tensors(torch.clone, (inputs, targets))  # networks and losses overwrite
            running = runner.of(inputs)
            running.origins = Origins.of(inputs, running.dims)
            yield running, *copies, batch_size(inputs)
        if not seen:
            raise all_padding(WHERE)

    def outputs(self, running: Watched, inputs: Inputs) -> Any:
        """What the network returns."""
        try:
            return call(running, inputs)
        except RarefyError:
            raise
        except Exception as error:
            raise DataError(
                WHERE,
                f"the network does not run on a batch: {first_line(error)}",
                LIKE_TRACED,
            ) from error

    def losses(self, running: Watched, inputs: Inputs, targets: Tensor | None) -> Tensor:
        """The mean loss of a batch."""
        padding = mask_of_all(inputs)
        return self.judged(self.outputs(running, inputs), targets, padding)

    def judged(self, answers: Any, targets: Tensor | None, padding: Tensor | None) -> Tensor:
        """The mean loss of what the network returned for a batch.

        Args:
            answers: what it returned.
            targets: labels.
            padding: the mask of the inputs, 0 at padding.
        """
        if targets is None or self.drawn:
            found = self._surprise(answers, targets, padding)
        else:
            found = self._loss(answers, targets, padding)
        if not isinstance(found, Tensor) or found.ndim:
            raise InputError(
                "prune(loss=...)", "it did not return a scalar tensor", "Return the mean loss"
            )
        if not bool(torch.isfinite(found)):
            raise DataError(WHERE, "the loss of a batch is NaN or infinite", "Check the data")
        return found

    def summed(self, answers: Any, targets: Any, padding: Tensor | None, samples: int) -> Tensor:
        """The sum of the losses of samples, each a batch of its own along the first dimension."""
        if self.loss is None and _is_one_class_each(answers, targets):
            return self.judged(answers[:, 0], targets, None) * samples
        losses = [
            self.judged(
                map_tensors(itemgetter(n), answers), *between((targets, padding), n, n + 1, samples)
            )
            for n in range(samples)
        ]
        for loss in losses:
            check_differentiable(loss)
        return torch.stack(losses).sum()

    def _loss(self, answers: Any, targets: Tensor, padding: Tensor | None) -> Tensor:
        found = logits(answers)
        if self.loss is None:
            return CrossEntropy()(found, targets, mask=_mask(answers, found, padding))
        try:
            return self.loss(found, targets)
        except Exception as error:
            raise InputError(
                "prune(loss=...)",
                f"it raised {first_line(error)}",
                "Give a function (logits, targets) -> mean loss of a batch",
            ) from error

    def _surprise(self, answers: Any, targets: Any, padding: Tensor | None) -> Tensor:
        """The loss against targets drawn from what the network predicts.

        Its squared gradients are the Fisher information, on average: of the labels where the
        network gives logits, else of a normal distribution around the output. Where it gives both,
        that of each counts.
        """
        if self.labelled or self.loss is not None:
            raise DataError(
                WHERE,
                "a batch is unlabelled, and this criterion asks for the gradient of the loss",
                "Yield (inputs, targets); criterion='fisher' takes unlabelled data, without loss=",
            )
        scores = _class_scores(answers)
        numbers = [t for t in tensors(answers) if t.is_floating_point() and t.numel()]
        if scores is None or _are_real(targets, scores):
            return self._noise(numbers, padding)
        last = scores.detach().float().softmax(-1)
        if bool(last.isnan().any()):
            raise DataError(WHERE, "the network's outputs are NaN or infinite", "Check the data")
        drawn = torch.multinomial(last.flatten(0, -2).cpu(), 1, generator=self.generator)
        labels = drawn.view(last.shape[:-1]).to(scores.device)
        own = mask_of(answers)
        others = [t for t in numbers if t is not scores and t is not own]
        found = CrossEntropy()(scores, labels, mask=_mask(answers, scores, padding))
        return found + self._noise(others, padding) if others else found

    def _noise(self, found: Sequence[Tensor], padding: Tensor | None) -> Tensor:
        """For ``t = y + e * rms(y)`` with normal ``e`` the squared error's gradient is that of
        ``e * y / rms(y)``; all outputs of a network count alike, whatever their size."""
        if not found:
            raise InputError(
                "prune(data)", "the network returns no numbers", "Use criterion='magnitude'"
            )
        total = torch.zeros((), dtype=torch.float64)
        for tensor in found:
            noise = torch.randn(tensor.shape, generator=self.generator).to(tensor)
            noise = noise * counted(tensor, padding)
            scale = (
                (tensor.detach() * counted(tensor, padding))
                .square()
                .sum()
                .sqrt()
                .clamp_min(_SMALLEST)
            )
            examples = len(tensor) if tensor.ndim else 1
            total = total + ((noise * tensor).sum() / (scale * examples**0.5)).double().cpu()
        return total


def _is_one_class_each(answers: Any, targets: Any) -> bool:
    """Whether samples have logits (1, C) each, and a label each that counts."""
    if not isinstance(answers, Tensor) or not isinstance(targets, Tensor):
        return False
    single = answers.ndim == 3 and answers.shape[1] == 1 and targets.shape == answers.shape[:1]
    return single and not targets.is_floating_point() and bool((targets != IGNORE).all())


def _mask(answers: Any, scores: Tensor, padding: Tensor | None) -> Tensor | None:
    """Which positions of logits count: as the network itself says, or the inputs; None for all."""
    own = fitting(mask_of(answers), scores)
    return fitting(padding, scores) if own is None else own


def _are_real(targets: Any, scores: Tensor) -> bool:
    """Whether targets are real numbers, and no probabilities of the classes of these logits."""
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return False
    if targets.shape != scores.shape or bool((targets < 0).any()):
        return True
    return not bool(((targets.sum(-1) - 1).abs() <= _LOOSE).all())


def _class_scores(answers: Any) -> Tensor | None:
    """The logits ``(B, C)`` or ``(B, L, C)`` among a network's outputs, None where it has none."""
    try:
        found = logits(answers)
    except InputError:
        return None
    classes = found.ndim in (2, 3) and found.shape[-1] > 1 and found.is_floating_point()
    return found if classes else None


_LOOSE = 0.01
"""How far from 1 probabilities may sum."""

_SMALLEST = 1e-12
"""Norm below which outputs are not divided by it."""


def check_differentiable(loss: Tensor) -> None:
    """Refuse a loss that has no gradient."""
    if not loss.requires_grad:
        raise InputError(
            "prune(criterion=...)",
            "the loss does not depend on the network's weights by a gradient",
            "Return a loss computed from the logits, and leave detach() and no_grad() out of both",
        )


class Sums:
    """Sums by parameter path, each under all paths of a shared parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[str, int] = {}
        self.totals: dict[int, Tensor] = {}
        self.samples = 0
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                self.paths[path] = id(parameter)
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                zeros = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
                self.totals.setdefault(id(parameter), zeros)

    def add(self, values: Mapping[str, Tensor], factor: float, size: int) -> None:
        """Add values of a batch, times a factor."""
        for path, value in values.items():
            self.totals[self.paths[path]].add_(value, alpha=factor)
        self.samples += size

    def means(self) -> dict[str, Tensor]:
        """Total over number of samples, by path."""
        count = max(self.samples, 1)
        means = {key: total.div_(count) for key, total in self.totals.items()}
        return {path: means[key] for path, key in self.paths.items()}
