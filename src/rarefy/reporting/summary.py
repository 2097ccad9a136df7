"""A report in one sentence, as JSON-ready values, and as a table for the terminal."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rarefy.deployment.measure import speedup
from rarefy.errors import InputError
from rarefy.reporting import figures
from rarefy.types import Check, Report, Stage

FEW_CALLS = 20
"""Timed calls below which the 10th and 90th percentile are hardly more than single calls."""


def verdict(report: Report) -> str:
    r"""What the last stage achieved against the first, in one line.

    Raises:
        InputError: the report has no stage.

    Example:
        >>> print(verdict(report).replace("\N{MULTIPLICATION SIGN}", "x"))  # doctest: +SKIP
        9.1x smaller, 3.2x faster, accuracy -0.3 points
    """
    teacher, last = ends(report)
    if len(report.stages) == 1:
        return f"Measured: {last.name}, nothing was compressed"
    change = figures.points(last.accuracy - teacher.accuracy)
    if math.isnan(last.accuracy - teacher.accuracy):
        change = "not measured"
    parts = [smaller(teacher, last), faster(teacher, last), f"accuracy {change or 'unchanged'}"]
    return ", ".join(part for part in parts if part)


def ends(report: Report) -> tuple[Stage, Stage]:
    """The first stage, which all are compared with, and the last, which the user ships.

    Raises:
        InputError: the report has no stage.
    """
    if not report.stages:
        raise InputError("report", "it has no stage", "Measure at least the original network")
    return report.stages[0], report.stages[-1]


def smaller(teacher: Stage, stage: Stage) -> str | None:
    """How the stage's file compares with the teacher's."""
    return figures.factor(teacher.bytes, stage.bytes, "smaller", "larger", "same size")


def smaller_onnx(teacher: Stage, stage: Stage) -> str | None:
    """How the stage's ONNX file compares with the teacher's."""
    return figures.factor(teacher.onnx_bytes, stage.onnx_bytes, "smaller", "larger", "same size")


def faster(teacher: Stage, stage: Stage) -> str | None:
    """How the stage's latency compares with the teacher's."""
    ratio = speedup(teacher.latency_ms, stage.latency_ms)
    return figures.factor(ratio, 1.0, "faster", "slower", "same speed")


def is_worse(compared: str | None) -> bool:
    """Whether a comparison made by :func:`smaller` or :func:`faster` is a loss."""
    return compared is not None and compared.endswith(("larger", "slower"))


def concerns(report: Report) -> list[str]:
    """Everything that a reader must know first: checks missed, stages larger or slower, noise.

    Raises:
        InputError: the report has no stage.
    """
    teacher, last = ends(report)
    found = [f"Target missed: {check_text(check)}" for check in report.checks if not check.met]
    for stage in report.stages[1:]:
        found += [
            f"{stage.name}: {text} than {teacher.name}{what}"
            for text, what in (
                (smaller(teacher, stage), " (file on disk)"),
                (smaller_onnx(teacher, stage), " (ONNX file)"),
                (faster(teacher, stage), ""),
            )
            if is_worse(text)
        ]
    if last is not teacher and _overlap(teacher, last):
        found.append(
            f"{last.name}: its latency's spread overlaps that of {teacher.name} "
            "(10th to 90th percentile), so the difference may be noise"
        )
    fewest = min(stage.calls for stage in report.stages)
    if fewest < FEW_CALLS:
        found.append(
            f"latency: only {calls_text(report)} of each file were timed, so its median and "
            "percentiles are rough"
        )
    return found


def calls_text(report: Report) -> str:
    """How many calls every latency was timed over, such as ``"200 calls"``.

    Example:
        >>> calls_text(report)  # doctest: +SKIP
        '200 calls'
    """
    calls = sorted({stage.calls for stage in report.stages})
    return f"{figures.DASH.join(str(n) for n in (calls[0], calls[-1])[: len(calls)])} calls"


def check_text(check: Check) -> str:
    """A check with the figures that decided it."""
    value, limit = figures.pair(check.value, check.limit)
    return f"{check.claim} (measured {value}, limit {limit})"


def _overlap(one: Stage, other: Stage) -> bool:
    a, b = one.latency_ms, other.latency_ms
    return a.p10 <= b.p90 and b.p10 <= a.p90


def as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON-ready values; figures that are not finite become None.

    Example:
        >>> as_dict(report)["stages"][-1]["latency_ms"]["median"]  # doctest: +SKIP
        0.72
    """
    plain: dict[str, Any] = _plain(asdict(report))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def terminal(report: Report) -> RenderableType:
    """Verdict, concerns, table and notes, to be printed with rich.

    Raises:
        InputError: the report has no stage.
    """
    parts: list[RenderableType] = [Text(verdict(report), style="bold")]
    parts += [Text(f"! {text}", style="yellow") for text in concerns(report)]
    met = sum(check.met for check in report.checks)
    if report.checks and met == len(report.checks):
        text = "Target met" if met == 1 else f"All {met} targets met"
        parts.append(Text(text, style="green"))
    parts.append(table(report))
    parts += [Text(f"{s.name}: {note}", style="dim") for s in report.stages for note in s.notes]
    return Group(*parts)


def table(report: Report) -> Table:
    """The stages with their figures and how they compare with the first.

    Raises:
        InputError: the report has no stage.
    """
    teacher, _ = ends(report)
    result = Table(box=None, pad_edge=False, header_style="dim")
    result.add_column("stage")
    for name in ("accuracy", "file", "latency", "params", "MACs", "made in"):
        result.add_column(name, justify="right")
    for stage in report.stages:
        change = figures.points(stage.accuracy - teacher.accuracy)
        result.add_row(
            Text(stage.name),
            _cell(figures.percent(stage.accuracy), change and change.split()[0]),
            _cell(figures.size(stage.bytes), smaller(teacher, stage)),
            _cell(figures.milliseconds(stage.latency_ms.median), faster(teacher, stage)),
            figures.count(stage.params),
            figures.count(stage.macs),
            figures.seconds(stage.seconds),
        )
    return result


def _cell(value: str, compared: str | None) -> Text:
    """A value, and under it how it compares, in words."""
    if not compared or compared.startswith("same"):
        return Text(value)
    style = "yellow" if is_worse(compared) else "dim"
    return Text.assemble(value, "\n", (compared, style))
