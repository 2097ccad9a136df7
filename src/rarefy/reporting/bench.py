"""Files that were measured side by side, as a table for the terminal and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rarefy.deployment.bench import Bench


def bench_table(found: Bench) -> RenderableType:
    """A row for each file, and the notes below."""
    first = found.measured[0]
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    table = Table(
        title=f"{first.runtime}, {threads}, each file in turn, {first.calls} calls of each"
    )
    table.add_column("file")
    names = ["batch", "bytes", "median, ms", "p10 to p90", "examples/s", "of the first's latency"]
    if first.peak_mb is not None:
        names.append("peak, MB")
    for name in names:
        table.add_column(name, justify="right")
    for one in found.measured:
        ms = one.latency_ms
        cells = [
            str(one.batch),
            f"{one.bytes:,}",
            f"{ms.median:.3f}",
            f"{ms.p10:.3f} to {ms.p90:.3f}",
            f"{one.throughput:,.1f}",
            str(one.share or "1"),
        ]
        if first.peak_mb is not None:
            cells.append(f"{one.peak_mb:,.1f}" if one.peak_mb is not None else "")
        table.add_row(Text(Path(one.path).name), *cells)
    return Group(table, *(Text(note) for note in found.notes))


def bench_json(found: Bench) -> str:
    """All figures, with the unit in the name of each."""
    rows = [
        {**asdict(one), "throughput": one.throughput, "spread": one.spread}
        for one in found.measured
    ]
    return json.dumps({"measured": rows, "notes": found.notes}, indent=2)
