"""The largest network that reaches a target, found by measuring before any training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from rarefy.batches import Leading, take
from rarefy.deployment.export import export
from rarefy.deployment.measure import compare, speedup
from rarefy.errors import BudgetError
from rarefy.gains import quantize
from rarefy.pruning.prune import request
from rarefy.schemes import Half, Int8, WeightOnly
from rarefy.storage.format import save
from rarefy.types import Budget, Data, Inputs, Target

SHARES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
"""Shares of the MACs that are tried."""

CALIBRATION = 64
"""Examples that trials are quantized on."""

MARGIN = 1.1
"""How far a trial must exceed the target: the final measurement is another one."""


def reachable_budget(
    model: nn.Module,
    example_inputs: Inputs,
    target: Target,
    data: Data,
    scheme: Int8 | WeightOnly | Half | None,
) -> tuple[float, str]:
    """Share of the MACs to keep so that latency and size reach the target.

    Latency and size do not depend on what the weights are trained to, so each trial prunes,
    quantizes and exports the network as it is and measures it beside the original. Trials bisect
    :data:`SHARES`.

    Args:
        model: the trained network.
        example_inputs: what it is called with.
        target: a speed-up, a size, or both.
        data: batches to score units on, and to quantize on.
        scheme: how to quantize; None where the result stays in float.

    Returns:
        The share, and a sentence on how it was found.
    """
    with tempfile.TemporaryDirectory(prefix="rarefy-") as folder:
        trial = _Trial(model, example_inputs, target, data, scheme, Path(folder))
        found = _first(trial.reaches)
    reached = found < trial.possible
    share = SHARES[max(min(found, trial.possible - 1), 0)]
    tried = ", ".join(f"{share:g}: {text}" for share, text in trial.tried.items())
    outcome = "found by measuring" if reached else "is the smallest tried; none reaches the target"
    return share, f"budget of {share:g} of the MACs {outcome} ({tried})"


def _first(reaches: Callable[[int], bool]) -> int:
    """Position of the largest share that reaches the target, by bisection; their number if none."""
    low, high = 0, len(SHARES)
    while low < high:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle + 1
    return low


class _Trial:
    """Prunes to a share and measures against the original."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        target: Target,
        data: Data,
        scheme: Int8 | WeightOnly | Half | None,
        folder: Path,
    ) -> None:
        self.example_inputs, self.target = example_inputs, target
        self.scheme, self.folder = scheme, folder
        self.few = Leading(data, CALIBRATION, "compress(train)", labelled=False)
        self.tried: dict[float, str] = {}
        self.possible = len(SHARES)  # shares from this position on cannot be reached
        self.before = self._write(model, "before")
        self.asked = request(model, example_inputs, Budget(macs=SHARES[0]), data=data)

    def reaches(self, position: int) -> bool:
        share = SHARES[position]
        try:
            small = self.asked.to(Budget(macs=share))
        except BudgetError:
            self.tried[share] = "not possible"
            self.possible = min(self.possible, position)
            return True  # nor is any smaller share: look among the larger ones
        if self.scheme is not None:
            small = quantize(small, self.few, self.scheme)
        after = self._write(small, "after")
        one = take(self.example_inputs, 1)
        first, second = compare([self.before[0], after[0]], one, rounds=100)
        faster = speedup(first.latency_ms, second.latency_ms)
        size = self.before[1] / after[1]
        self.tried[share] = f"{faster:.1f}x faster, {size:.1f}x smaller"
        wanted = self.target
        return faster >= MARGIN * (wanted.speedup or 0) and size >= (wanted.size or 0)

    def _write(self, model: nn.Module, name: str) -> tuple[Path, int]:
        saved = save(model, self.folder / f"{name}.safetensors")
        onnx = export(model, self.folder / f"{name}.onnx", self.example_inputs)
        return onnx, saved.stat().st_size
