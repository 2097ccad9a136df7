"""Records of the zoo -> a page in Markdown: a summary per family, then a row per network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
Faults: TypeAlias = Callable[[Record], list[str]]

PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
HALF = "prune 0.5"

FOLDERS = re.compile(r"(?<=\s)/\S*/")
"""What comes before the name of a file on this machine."""


def step(record: Record, name: str) -> dict[str, Any]:
    """What a step recorded; empty where it was not reached."""
    return dict(record["steps"].get(name, {}))


def passed(record: Record, name: str) -> bool:
    """Whether a step was reached and did not fail."""
    figures = step(record, name)
    return bool(figures) and "failed" not in figures


def kept(record: Record) -> bool:
    """Whether half of the network was removed and its class kept."""
    return passed(record, HALF) and step(record, HALF)["kind"] == "module"


def outcome(figures: Mapping[str, Any]) -> str:
    """One or two words on what Torch-Pruning did."""
    if not figures:
        return "-"
    failed = figures.get("failed", "")
    if not failed:
        return "runs"
    return "time out" if failed == "time limit" else "fails"


def share(count: int, total: int) -> str:
    """``"12 of 15"``, or a dash where there is nothing."""
    return f"{count} of {total}" if total else "-"


def middle(values: Iterable[float], form: str) -> str:
    """The median, formatted."""
    found = list(values)
    return format(median(found), form) if found else "-"


def summary(family: str, records: Sequence[Record]) -> list[str]:
    """The row of a family."""
    traced = [r for r in records if passed(r, "trace")]
    proven = [r for r in records if passed(r, HALF)]
    tried = [r for r in records if step(r, "torch-pruning")]
    onnx = [r for r in records if step(r, "onnx")]
    return [
        family,
        str(len(records)),
        str(len(traced)),
        str(len(proven)),
        share(sum(map(kept, proven)), len(proven)),
        share(sum(passed(r, "backward") for r in proven), len(proven)),
        share(sum(passed(r, "save and load") for r in proven), len(proven)),
        share(sum(passed(r, "onnx") for r in onnx), len(onnx)),
        middle((step(r, "trace")["prunable"] for r in traced), ".2f"),
        middle((step(r, "trace")["cpu_seconds"] for r in traced), ".1f"),
        format(max((step(r, HALF)["error"] for r in proven), default=0.0), ".0e"),
        share(sum(passed(r, "torch-pruning") for r in tried), len(tried)),
    ]


SUMMARY = (
    "family", "networks", "traced", "pruned with proof", "class kept", "trained a step",
    "saved and loaded", "ONNX equal", "median prunable share", "median CPU s to trace",
    "largest error", "Torch-Pruning runs",
)  # fmt: skip

COLUMNS = (
    "network", "parameters", "trace CPU s", "groups", "prunable", "removed at 0.25",
    "removed at 0.5", "error", "kind", "train", "file", "ONNX", "peak MB", "Torch-Pruning",
)  # fmt: skip


def row(record: Record) -> list[str]:
    """The row of a network."""
    trace, half = step(record, "trace"), step(record, HALF)

    def mark(name: str) -> str:
        return "-" if not step(record, name) else "ok" if passed(record, name) else "fails"

    def number(figures: Mapping[str, Any], key: str, form: str) -> str:
        return format(figures[key], form) if key in figures else "-"

    return [
        record["name"],
        number(step(record, "build"), "params", ","),
        number(trace, "cpu_seconds", ".1f"),
        number(trace, "groups", "d"),
        number(trace, "prunable", ".2f"),
        number(step(record, "prune 0.25"), "removed", ".2f"),
        number(half, "removed", ".2f"),
        number(half, "error", ".0e"),
        str(half.get("kind", mark(HALF))),
        mark("backward"),
        mark("save and load"),
        mark("onnx"),
        format(max((s.get("peak_mb", 0) for s in record["steps"].values()), default=0), "d"),
        outcome(step(record, "torch-pruning")),
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown; numbers stand to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def versions() -> str:
    """Of the packages that matter."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def open_points(records: Iterable[Record], faults: Faults) -> list[str]:
    """What is wrong, one line each, the most frequent step first."""
    lines = [(r["name"], line) for r in records for line in faults(r)]
    often = Counter(line.partition(":")[0] for _, line in lines)
    lines.sort(key=lambda pair: (-often[pair[1].partition(":")[0]], pair))
    return [f"- `{name}`: {_flat(line)[:400]}" for name, line in lines]


def commands(records: Iterable[Record]) -> list[str]:
    """The commands that made the records, each once."""
    return list(dict.fromkeys(r["command"] for r in records if "command" in r))


def refused(records: Iterable[Record]) -> list[str]:
    """Networks that rarefy does not take, a line each with its first reason."""
    found = []
    for record in records:
        clear = [s["failed"] for s in record["steps"].values() if s.get("clear")]
        if clear:
            found.append(f"- `{record['name']}`: {_flat(clear[0])[:400]}")
    return found


def _flat(line: str) -> str:
    return " ".join(line.split()).replace("|", "/").replace("<", "&lt;")


def page(records: Mapping[str, Record], faults: Faults) -> str:
    """The whole page."""
    families: dict[str, list[Record]] = {}
    for name in records:
        families.setdefault(name.partition("/")[0], []).append(records[name])
    every = list(records.values())
    rows = [summary(family, members) for family, members in families.items()]
    lines = [
        "# The zoo",
        "",
        f"Each network in a process of its own with one thread. {versions()}. Made by:",
        "",
        *(f"    {command}" for command in commands(every)),
        "",
        *table(SUMMARY, [*rows, summary("all", every)]),
        "",
        "- *pruned with proof*: half of the units of every group removed, the result equal to "
        "masking;",
        "- *class kept*: of these, those that are still the user's own class;",
        "- *prunable*: share of the parameters that belong to a removable unit;",
        "- *error*: largest difference from masking, relative to the outputs' sensitivity to the "
        "inputs;",
        "- *Torch-Pruning runs*: `MagnitudePruner`, ratio 0.5, the last layer ignored, at most 60 "
        "s; something was removed and a forward pass runs afterwards. Whether it equals masking "
        "is not checked.",
        "",
        "## Networks",
        "",
        *table(COLUMNS, map(row, sorted(every, key=lambda r: str(r["name"])))),
        "",
        "## Refused with a reason",
        "",
        *(refused(every) or ["None."]),
        "",
        "## What is wrong",
        "",
        *(open_points(every, faults) or ["Nothing."]),
        "",
    ]
    return FOLDERS.sub("", "\n".join(lines))
