"""A report with plausible figures, shared by the tests of the reporting."""

from __future__ import annotations

from rarefy.types import Check, Latency, Report, Stage, Width


def stage(
    name: str, accuracy: float, size: int, median: float, notes: tuple[str, ...] = ()
) -> Stage:
    """A stage whose other figures follow from its size."""
    latency = Latency(median, 0.97 * median, 1.05 * median)
    return Stage(name, accuracy, size // 4, 36 * size, size, size, latency, 200, 2.5, notes)


def report(**changes: object) -> Report:
    """Four stages, three targets met; any field can be replaced."""
    fields: dict[str, object] = {
        "title": "Handwritten digits",
        "stages": (
            stage("teacher", 0.9944, 1_109_088, 2.31),
            stage("pruned", 0.9361, 489_000, 1.32, ("2 groups kept their width",)),
            stage("distilled", 0.9917, 489_000, 1.31),
            stage("quantized", 0.9914, 121_800, 0.718),
        ),
        "widths": (Width("stage1.0.conv1", 16, 8), Width("head", 10, 10)),
        "checks": (Check("at least 8x smaller", 9.106, 8, True),),
        "frozen": ("head: its outputs are the network's outputs",),
        "seed": 0,
        "seconds": 141.2,
        "environment": {"torch": "2.14.0"},
    }
    return Report(**(fields | changes))  # type: ignore[arg-type]
