"""Charts as inline SVG: one small panel per figure, one row per stage, the same colors throughout.

Text inside a panel is drawn at the size of the page's text, because a panel is about as wide as
its view box at every width of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.reporting import figures
from rarefy.reporting.markup import safe
from rarefy.reporting.summary import faster, is_worse, smaller
from rarefy.types import Latency, Stage, Width

_WIDTH = 300
_ROW = 50
_BAR = 14
_AXIS_STARTS = (0.99, 0.98, 0.95, 0.9, 0.8, 0.5, 0.0)


@dataclass(frozen=True)
class _Row:
    """One stage in a panel: its mark in [0, 1] of the width, and its words."""

    name: str
    value: str
    compared: str | None
    mark: str
    tone: str


def sizes(stages: Sequence[Stage]) -> str:
    """Bars of the bytes on disk."""
    most = max((s.bytes for s in stages), default=0)
    rows = [
        _Row(s.name, figures.size(s.bytes), _compared(smaller(stages[0], s), i), bar, tone)
        for i, s in enumerate(stages)
        for tone in [_tone(i, len(stages), smaller(stages[0], s))]
        for bar in [_bar(s.bytes, most)]
    ]
    return _panel("File size by stage", rows)


def latencies(stages: Sequence[Stage]) -> str:
    """Bars of the median latency with whiskers from the 10th to the 90th percentile."""
    most = max((v for s in stages for v in _known(s.latency_ms)), default=0.0)
    rows = [
        _Row(
            s.name,
            figures.milliseconds(s.latency_ms.median),
            _compared(faster(stages[0], s), i),
            _bar(s.latency_ms.median, most) + _whisker(s.latency_ms, most),
            _tone(i, len(stages), faster(stages[0], s)),
        )
        for i, s in enumerate(stages)
    ]
    return _panel("Latency by stage", rows)


def accuracies(stages: Sequence[Stage]) -> str:
    """Dots on a line that starts where the differences can be seen; the line says where."""
    start = axis_start(stages)
    reference = _place(stages[0].accuracy, start)
    rows = [
        _Row(
            s.name,
            figures.percent(s.accuracy),
            figures.points(s.accuracy - stages[0].accuracy) if i else None,
            _dot(_place(s.accuracy, start), reference),
            _tone(i, len(stages), None),
        )
        for i, s in enumerate(stages)
    ]
    ends = figures.percent(start), figures.percent(1)
    return _panel("Accuracy by stage", rows, axis=ends)


def axis_start(stages: Sequence[Stage]) -> float:
    """The closest round share below all accuracies, with a little room."""
    least = min((s.accuracy for s in stages if math.isfinite(s.accuracy)), default=0.0)
    return next((s for s in _AXIS_STARTS if least >= s + 0.1 * (1 - s)), 0.0)


def width_bar(width: Width, most: int) -> str:
    """One layer: the original width as a track, what remains as the filled part."""
    before, after = (100 * w / most if most else 0 for w in (width.before, width.after))
    return (
        '<svg class="width" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="{before:.2f}" height="10"/>'
        f'<rect class="fill" width="{after:.2f}" height="10"/></svg>'
    )


def _panel(title: str, rows: Sequence[_Row], axis: tuple[str, str] | None = None) -> str:
    height = _ROW * len(rows) + (18 if axis else 0)
    said = "; ".join(
        f"{r.name} {r.value}" + (f", {r.compared}" if r.compared else "") for r in rows
    )
    body = "".join(
        f'<g class="{row.tone}" transform="translate(0 {_ROW * i})">{_label(row)}{row.mark}</g>'
        for i, row in enumerate(rows)
    )
    if axis:
        body += (
            f'<text class="axis" y="{height - 5}">{axis[0]}</text>'
            f'<text class="axis end" x="{_WIDTH}" y="{height - 5}">{axis[1]}</text>'
        )
    return (
        f'<svg class="panel" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{safe(f"{title}: {said}")}">{body}</svg>'
    )


def _label(row: _Row) -> str:
    compared = (
        f'<tspan class="compared">{safe(figures.typeset(row.compared))}</tspan>  '
        if row.compared
        else ""
    )
    return (
        f'<text class="name" y="15">{safe(figures.title(row.name))}</text>'
        f'<text class="value end" x="{_WIDTH}" y="15">{compared}{safe(row.value)}</text>'
    )


def _bar(value: float, most: float) -> str:
    length = _length(value, most)
    return f'<rect class="bar" y="23" width="{length:.1f}" height="{_BAR}" rx="3"/>'


def _whisker(latency: Latency, most: float) -> str:
    if len(_known(latency)) < 3:
        return ""
    low, high = _length(latency.p10, most), _length(latency.p90, most)
    y = 23 + _BAR / 2
    return (
        f'<path class="whisker" d="M{low:.1f} {y}H{high:.1f}'
        f'M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"/>'
    )


def _dot(place: float | None, reference: float | None) -> str:
    y = 23 + _BAR / 2
    line = f'<path class="rail" d="M0 {y}H{_WIDTH}"/>'
    if reference is not None:
        line += f'<path class="reference" d="M{reference:.1f} {y - 9}v18"/>'
    return line if place is None else f'{line}<circle class="dot" cx="{place:.1f}" cy="{y}" r="6"/>'


def _length(value: float, most: float) -> float:
    """Length of a bar; at least a visible sliver for anything above zero."""
    if not (math.isfinite(value) and value > 0 and most > 0):
        return 0
    return max(2, (_WIDTH - 2) * value / most)


def _place(share: float, start: float) -> float | None:
    """Where a share stands on the axis, kept clear of the edges by the dot's radius."""
    if not math.isfinite(share):
        return None
    return 7 + (_WIDTH - 14) * (share - start) / (1 - start)


def _known(latency: Latency) -> list[float]:
    return [v for v in (latency.median, latency.p10, latency.p90) if math.isfinite(v)]


def _compared(text: str | None, index: int) -> str | None:
    return text if index else None


def _tone(index: int, total: int, compared: str | None) -> str:
    """The color of a stage: the original is neutral, the last is strong, a loss is a warning."""
    if index == 0:
        return "original"
    if is_worse(compared):
        return "worse"
    return "final" if index == total - 1 else "between"
