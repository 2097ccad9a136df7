"""Gradients of the loss by parameters: their mean, and the mean of the squares of each sample's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rarefy.batches import batch_size, between, map_tensors, mask_of_all
from rarefy.errors import DataError, InputError, first_line
from rarefy.pruning.running.taps import Runner, Watched
from rarefy.pruning.scoring.passes import WHERE, Job, Sums, check_differentiable
from rarefy.pruning.scoring.samples import Together, finite
from rarefy.pruning.scoring.squaring import learned, wide
from rarefy.types import Inputs


def means(job: Job) -> dict[str, Any]:
    """The mean gradient, as training would have it."""
    total = Sums(job.model)
    runner = Runner(job.model, job.network, trainable=True, where=WHERE)
    for running, inputs, targets, size in job.passes(runner):
        with torch.enable_grad():
            loss = job.losses(running, inputs, targets)
        total.add(_gradient(running, loss), size, size)
    return {"gradients": total.means(), "samples": total.samples}


def squares(job: Job) -> dict[str, Any]:
    """The mean of the squares of each sample's own gradient."""
    total = Sums(job.model)
    runner = Runner(job.model, job.network, trainable=True, where=WHERE)
    ways: dict[Watched, Together | None] = {}
    for running, inputs, targets, size in job.passes(runner):
        if running not in ways:
            ways[running] = Together(job, running)
        together = ways[running]
        most = size if together is None else together.most
        for start in range(0, size, most):
            some = range(start, min(start + most, size))
            for found, count in _own(job, running, inputs, targets, some, ways):
                total.add(found, 1, count)
    return {"squares": total.means(), "samples": total.samples}


def _own(
    job: Job,
    running: Watched,
    inputs: Inputs,
    targets: Tensor | None,
    some: range,
    ways: dict[Watched, Together | None],
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Squares of the gradients of some samples of a batch, summed, and of how many.

    All at once, as far as the network's operators can; else one by one.

    Args:
        ways: how each network takes samples together; None for one that was found not to.
    """
    together = ways[running]
    if len(some) > 1 and together is not None:
        drawn = job.generator.get_state()
        try:
            found = together.squares(map_tensors(torch.clone, inputs), targets, some)
        except Exception:  # noqa: BLE001 - operators raise anything; one by one, errors are clear
            ways[running] = None
            job.generator.set_state(drawn)
        else:
            yield found, len(some)
            return
    for n in some:
        with torch.enable_grad():
            loss = _alone(job, running, inputs, targets, n)
        found = _gradient(running, loss)
        yield {path: wide(g).square() for path, g in found.items()}, 1  # some share memory


def _alone(job: Job, running: Watched, inputs: Inputs, targets: Tensor | None, n: int) -> Tensor:
    """The loss of one sample of a batch, run among the others where the network needs them all."""
    size = batch_size(inputs)
    single, target = (between(v, n, n + 1, size) for v in (inputs, targets))
    try:
        return job.losses(running, map_tensors(torch.clone, single), target)
    except DataError:
        if size == 1:
            raise
    answers = job.outputs(running, map_tensors(torch.clone, inputs))
    return job.judged(between(answers, n, n + 1, size), target, mask_of_all(single))


def _gradient(running: Watched, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss, by path in the graph."""
    leaves = learned(running)
    check_differentiable(loss)
    try:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except RuntimeError as error:
        raise InputError(
            "prune(criterion=...)",
            f"the loss has no gradient by the network's weights: {first_line(error)}",
            "Write the operations in the network that PyTorch cannot go back through otherwise, "
            "or use criterion='magnitude'",
        ) from error
    return finite(leaves, found)
