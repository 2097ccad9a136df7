"""Curves as a self-contained SVG picture: one small panel per curve, all with the same axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLUMNS = 4
WIDTH, HEIGHT = 200, 110
LEFT, TOP, RIGHT, BOTTOM = 40, 26, 10, 18
HEAD = 34
"""Pixels: of a panel, of its margins around the plot, of the title."""

STYLE = """
text{font:11px system-ui,sans-serif;fill:#444}.title{font-size:15px;fill:#222}.end{text-anchor:end}
.name{font-weight:600;fill:#222}.axis{stroke:#bbb;fill:none}.whole{stroke:#999;stroke-dasharray:3 3}
.curve{stroke:#1769aa;stroke-width:2;fill:none}.dot{fill:#1769aa}
@media(prefers-color-scheme:dark){text{fill:#bbb}.title,.name{fill:#eee}.axis{stroke:#555}
.curve{stroke:#6cb6f0}.dot{fill:#6cb6f0}}
"""


@dataclass(frozen=True)
class Panel:
    """One curve: its name and its points (x in [0, 1], y), x ascending."""

    name: str
    points: tuple[tuple[float, float], ...]


def panels(title: str, drawn: Sequence[Panel], level: float) -> str:
    """An SVG picture of all curves.

    Args:
        title: above them.
        drawn: the curves; values that are not finite are left out.
        level: a value that a dashed line marks in each panel.

    Example:
        >>> panels("Loss", [Panel("conv", ((0, 1), (1, 3)))], 1)[:4]
        '<svg'
    """
    values = [y for panel in drawn for _, y in panel.points if math.isfinite(y)]
    low, high = min([level, *values]), max([level, *values])
    if high == low:
        low, high = low - 0.5, high + 0.5
    rows = math.ceil(len(drawn) / COLUMNS)
    wide, tall = COLUMNS * WIDTH, HEAD + rows * HEIGHT
    body = "".join(
        f'<g transform="translate({i % COLUMNS * WIDTH} {HEAD + i // COLUMNS * HEIGHT})">'
        f"{_panel(panel, level, low, high)}</g>"
        for i, panel in enumerate(drawn)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" '
        f'height="{tall}" role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>{body}</svg>\n'
    )


def _panel(panel: Panel, level: float, low: float, high: float) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x * (right - LEFT),
            bottom - (y - low) / (high - low) * (bottom - TOP),
        )

    places = [place(x, y) for x, y in panel.points if math.isfinite(y)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    at = place(0, level)[1]
    said = "; ".join(f"{x:.0%}: {y:.4g}" for x, y in panel.points)
    return (
        f"<title>{escape(f'{panel.name}: {said}')}</title>"
        f'<text class="name" x="{LEFT}" y="{TOP - 9}">{escape(_short(panel.name))}</text>'
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
        f'<path class="whole" d="M{LEFT} {at:.1f}H{right}"/>'
        f'<polyline class="curve" points="{line}"/>{dots}'
        f'<text class="end" x="{LEFT - 5}" y="{TOP + 6}">{high:.3g}</text>'
        f'<text class="end" x="{LEFT - 5}" y="{bottom}">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">0%</text>'
        f'<text class="end" x="{right}" y="{HEIGHT - 4}">100%</text>'
    )


def _short(name: str, most: int = 26) -> str:
    """The end of a name: paths differ there."""
    return name if len(name) <= most else f"\N{HORIZONTAL ELLIPSIS}{name[1 - most :]}"
