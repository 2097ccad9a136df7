"""Gradients of the losses of single samples by parameters, squared and summed, found together.

Layers that alone read their parameters sum the squares themselves
(:mod:`~rarefy.pruning.scoring.squaring`). Of every other parameter each sample meets one of its
own, through ``vmap``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.batches import arguments, batch_size, between, is_of, map_tensors, mask_of_all, tensors
from rarefy.errors import DataError
from rarefy.graph.program import Node
from rarefy.pruning.running.taps import Watched
from rarefy.pruning.scoring.passes import WHERE, Job
from rarefy.pruning.scoring.squaring import learned, readers, wide
from rarefy.types import Inputs

OWN = 1 << 27
"""Bytes of single samples' gradients that are held at once."""


class Together:
    """A network of which the gradients of many samples are found in one pass.

    Args:
        job: the pass over the data.
        running: the network.

    Attributes:
        most: samples that it takes at once.
    """

    def __init__(self, job: Job, running: Watched) -> None:
        self._job, self._running = job, running
        self._readers = dict(readers(running))
        self._means = [node.name for node in running.graph.calls if _is_mean(node)]
        alone = {path for reader in self._readers.values() for path in reader.paths}
        others = [w for path, w in learned(running).items() if path not in alone]
        held = sum(w.numel() * w.element_size() for w in others)
        self.most = max(1, OWN // max(held, 1))

    def squares(self, inputs: Inputs, targets: Tensor | None, some: range) -> dict[str, Tensor]:
        """The sum of the squares of the gradients of some samples of a batch, by path.

        Raises:
            Exception: the network's operators do not take samples together.
        """
        running, size, found = self._running, batch_size(inputs), dict[str, Tensor]()
        own = {
            path: weight.detach().expand(len(some), *weight.shape).requires_grad_()
            for path, weight in learned(running).items()
        }

        def answer(weights: dict[str, Tensor], given: list[Tensor]) -> Any:
            left = iter(given)
            single = map_tensors(lambda t: next(left)[None] if is_of(size, t) else t, inputs)
            return functional_call(running, weights, *arguments(single))

        given = [t[some.start : some.stop] for t in tensors(inputs) if is_of(size, t)]
        for node, reader in self._readers.items():
            running.instead[node] = reader.instead(found)
        running.instead |= dict.fromkeys(self._means, _mean)
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _at_once():
                labels, padding = between(
                    (targets, mask_of_all(inputs)), some.start, some.stop, size
                )
                total = self._job.summed(vmap(answer)(own, given), labels, padding, len(some))
            gradients = torch.autograd.grad(total, list(own.values()), allow_unused=True)
        finally:
            running.instead.clear()
        each_own = zip(own, gradients, strict=True)
        # Not in place: gradients of parameters that are added share memory.
        found |= {path: wide(g).square().sum(0) for path, g in each_own if g is not None}
        return finite(found, found.values())


def _is_mean(node: Node) -> bool:
    """Whether a call pools all places into one."""
    return node.kind == "adaptive_avg_pool2d" and list(node.argument("output_size")) == [1, 1]


def _mean(x: Tensor, size: Any) -> Tensor:
    """The same, which ``vmap`` knows in every memory format."""
    return x.mean((-2, -1), keepdim=True)


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


def finite(paths: Iterable[str], found: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Gradients by path, those that there are.

    Raises:
        DataError: one is not finite.
    """
    gradients = {p: g for p, g in zip(paths, found, strict=True) if g is not None}
    for path, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                WHERE,
                f"the gradient of the loss by {path} is NaN or infinite",
                "Check the data, the loss and that weight",
            )
    return gradients
