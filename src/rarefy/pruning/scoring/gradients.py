"""Gradients of the loss by parameters: their mean, and the mean of the squares of each sample's.

The gradients of single samples are found together, as far as the network's operators can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.batches import arguments, batch_size, between, is_of, map_tensors, tensors
from rarefy.errors import DataError
from rarefy.pruning.running.taps import Runner, Watched
from rarefy.pruning.scoring.passes import WHERE, Job, Sums, check_differentiable
from rarefy.types import Inputs

OWN = 1 << 27
"""Bytes of single samples' gradients that are held at once."""


def means(job: Job) -> dict[str, Any]:
    """The mean gradient, as training would have it."""
    total = Sums(job.model)
    runner = Runner(job.model, job.network, trainable=True, where=WHERE)
    for running, inputs, targets, size in job.passes(runner):
        total.add(_gradient(job, running, inputs, targets), size, size)
    return {"gradients": total.means(), "samples": total.samples}


def squares(job: Job) -> dict[str, Any]:
    """The mean of the squares of each sample's own gradient."""
    total = Sums(job.model)
    runner = Runner(job.model, job.network, trainable=True, where=WHERE)
    alone: set[Watched] = set()
    most = max(1, OWN // max(total.bytes, 1))
    for running, inputs, targets, size in job.passes(runner):
        for start in range(0, size, most):
            some = range(start, min(start + most, size))
            for found, count in _own(job, running, inputs, targets, some, alone):
                total.add(found, 1, count)
    return {"squares": total.means(), "samples": total.samples}


def _own(
    job: Job,
    running: Watched,
    inputs: Inputs,
    targets: Tensor | None,
    some: range,
    alone: set[Watched],
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Squares of the gradients of some samples of a batch, summed, and of how many.

    All at once, as far as the network's operators can; else one by one.

    Args:
        alone: networks that were found to take samples one by one only, to which this one is added.
    """
    if len(some) > 1 and running not in alone:
        drawn = job.generator.get_state()
        try:
            found = _together(job, running, map_tensors(torch.clone, inputs), targets, some)
        except Exception:  # noqa: BLE001 - operators raise anything; one by one, errors are clear
            alone.add(running)
            job.generator.set_state(drawn)
        else:
            yield found, len(some)
            return
    size = batch_size(inputs)
    for n in some:
        single, target = (between(v, n, n + 1, size) for v in (inputs, targets))
        found = _gradient(job, running, map_tensors(torch.clone, single), target)
        yield {path: _wide(g).square_() for path, g in found.items()}, 1


def _together(
    job: Job, running: Watched, inputs: Inputs, targets: Tensor | None, some: range
) -> dict[str, Tensor]:
    """The sum of the squares of the gradients of samples' losses, by path in the graph.

    Each sample meets weights of its own, which are the network's without a copy.
    """
    size = batch_size(inputs)
    own = {
        path: weight.detach().expand(len(some), *weight.shape).requires_grad_()
        for path, weight in _learned(running).items()
    }

    def answer(weights: dict[str, Tensor], given: list[Tensor]) -> Any:
        left = iter(given)
        single = map_tensors(lambda t: next(left)[None] if is_of(size, t) else t, inputs)
        return functional_call(running, weights, *arguments(single))

    given = [t[some.start : some.stop] for t in tensors(inputs) if is_of(size, t)]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _at_once():
        answers = vmap(answer)(own, given)
        losses = [
            job.judged(map_tensors(itemgetter(k), answers), between(targets, n, n + 1, size))
            for k, n in enumerate(some)
        ]
        for loss in losses:
            check_differentiable(loss)
    total = torch.stack(losses).sum()
    found = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    return _finite(own, (None if g is None else _wide(g).square_().sum(0) for g in found))


@contextmanager
def _at_once() -> Iterator[None]:
    """``vmap`` refuses operators that it would call sample by sample, and complain of."""
    switch: Any = torch._C._functorch
    held = switch._is_vmap_fallback_enabled()
    switch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        switch._set_vmap_fallback_enabled(held)


def _wide(gradient: Tensor) -> Tensor:
    """In float32 at least: squares of half precision are zero below 2e-4."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _gradient(
    job: Job, running: Watched, inputs: Inputs, targets: Tensor | None
) -> dict[str, Tensor]:
    """The gradient of the mean loss of a batch, by path in the graph."""
    with torch.enable_grad():
        loss = job.losses(running, inputs, targets)
    leaves = _learned(running)
    check_differentiable(loss)
    return _finite(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))


def _learned(running: Watched) -> dict[str, Tensor]:
    """The parameters that gradients are taken by."""
    return {path: p for path, p in running.named_parameters() if p.requires_grad}


def _finite(paths: Iterable[str], found: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Gradients by path, those that there are."""
    gradients = {p: g for p, g in zip(paths, found, strict=True) if g is not None}
    for path, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                WHERE,
                f"the gradient of the loss by {path} is NaN or infinite",
                "Check the data, the loss and that weight",
            )
    return gradients
