"""A report as one sentence, as JSON, as a terminal table; numbers as text."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rarefy.errors import InputError, OutputError
from rarefy.reporting import as_dict, concerns, figures, terminal, verdict, write
from rarefy.types import Check, Latency, Stage
from report_example import report, stage


def test_the_verdict_follows_from_the_figures() -> None:
    assert verdict(report()) == "9.1× smaller, 3.2× faster, accuracy -0.3 points"  # noqa: RUF001


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (stage("q", 0.9, 1_000, 2.0), "same size, same speed, accuracy unchanged"),
        (stage("q", 0.95, 2_000, 3.0), "2.0× larger, 1.5× slower, accuracy +5.0 points"),  # noqa: RUF001
        (stage("q", 0.8996, 999, 1.995), "same size, same speed, accuracy -0.04 points"),
        (stage("q", math.nan, 500, math.nan), "2.0× smaller, accuracy not measured"),  # noqa: RUF001
        (stage("q", 0.9, 0, 1.0), "2.0× faster, accuracy unchanged"),  # noqa: RUF001
    ],
)
def test_losses_and_gaps_are_said(last: Stage, expected: str) -> None:
    assert verdict(report(stages=(stage("t", 0.9, 1_000, 2.0), last))) == expected


def test_a_report_of_one_stage_claims_nothing() -> None:
    alone = report(stages=(stage("teacher", 0.9, 1_000, 2.0),))
    assert verdict(alone) == "Measured: teacher, nothing was compressed"
    assert concerns(alone) == []


def test_a_report_without_stages_is_refused(tmp_path: Path) -> None:
    for use in (verdict, concerns, terminal, lambda r: write(r, tmp_path)):
        with pytest.raises(InputError, match="no stage"):
            use(report(stages=()))
    assert list(tmp_path.iterdir()) == []


def test_a_good_report_raises_no_concern() -> None:
    assert concerns(report()) == []


def test_missed_targets_and_losses_come_first() -> None:
    bad = report(
        stages=(
            stage("teacher", 0.9, 1_000, 2.0),
            stage("pruned", 0.9, 1_500, 2.5),
            stage("quantized", 0.9, 500, 1.95),
        ),
        checks=(Check("at least 8x smaller", 7.9996, 8, False), Check("fine", 1, 1, True)),
    )
    found = concerns(bad)
    assert found[0] == "Target missed: at least 8x smaller (measured 7.9996, limit 8)"
    assert [text.split(":")[0] for text in found[1:]] == ["pruned"] * 3 + ["quantized"]
    assert "larger than teacher (file on disk)" in found[1]
    assert "slower than teacher" in found[3]
    assert "overlaps" in found[4]


def test_few_timed_calls_are_a_concern() -> None:
    def timed(calls: int) -> list[str]:
        stages = tuple(replace(s, calls=calls) for s in report().stages)
        return [text for text in concerns(report(stages=stages)) if text.startswith("latency")]

    assert timed(20) == []
    assert len(timed(19)) == 1
    assert "only 19 calls of each file were timed" in timed(19)[0]


def test_json_has_the_documented_keys() -> None:
    values = as_dict(report())
    assert list(values) == [
        "title",
        "stages",
        "widths",
        "checks",
        "frozen",
        "seed",
        "seconds",
        "environment",
    ]
    assert [s["name"] for s in values["stages"]] == ["teacher", "pruned", "distilled", "quantized"]
    assert set(values["stages"][0]) == {
        "name",
        "accuracy",
        "params",
        "macs",
        "bytes",
        "onnx_bytes",
        "latency_ms",
        "calls",
        "seconds",
        "notes",
    }
    assert set(values["stages"][0]["latency_ms"]) == {"median", "p10", "p90"}
    assert values["widths"][0] == {"layer": "stage1.0.conv1", "before": 16, "after": 8}


def test_json_is_strict_where_a_figure_is_missing(tmp_path: Path) -> None:
    gap = stage("teacher", math.nan, 1_000, math.inf)
    _, path = write(report(stages=(gap,)), tmp_path)
    values = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert values["stages"][0]["accuracy"] is None
    assert values["stages"][0]["latency_ms"]["median"] is None


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "place"
    for _ in range(2):
        html, data = write(report(), folder)
    assert html == folder / "report.html"
    assert data == folder / "report.json"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads(data.read_text()) == as_dict(report())


def test_a_failed_write_keeps_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html, _ = write(report(), tmp_path)
    before = html.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write(report(title="another"), tmp_path)
    assert html.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write(report(), tmp_path / "file")


def printed(width: int, **changes: object) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal(report(**changes)))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_terminal_shows_every_stage_within_80_columns() -> None:
    text = printed(80)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("teacher", "quantized", "1.11 MB", "0.718 ms", "smaller", "Target met"):
        assert word in text
    assert "2 groups kept their width" in text


def test_the_terminal_takes_no_markup_from_names() -> None:
    text = printed(80, stages=(stage("[red]x[/nothing]", 0.9, 1_000, 2.0, ("[bold]n",)),))
    assert "[red]x[/nothing]" in text
    assert "[bold]n" in text


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (figures.size(0), "0 B"),
        (figures.size(999), "999 B"),
        (figures.size(1_000), "1.00 kB"),
        (figures.size(999_999), "1.00 MB"),
        (figures.size(121_800), "122 kB"),
        (figures.size(99_960), "100 kB"),
        (figures.size(2_500_000_000), "2.50 GB"),
        (figures.count(272_186), "272 k"),
        (figures.count(40_551_000), "40.6 M"),
        (figures.count(12), "12"),
        (figures.milliseconds(2.314), "2.31 ms"),
        (figures.milliseconds(0.718), "0.718 ms"),
        (figures.milliseconds(0.0085), "8.50 µs"),
        (figures.milliseconds(1500), "1.50 s"),
        (figures.milliseconds(math.nan), figures.DASH),
        (figures.spread(2.24, 2.4), f"2.24{figures.DASH}2.40 ms"),
        (figures.spread(math.nan, math.nan), figures.DASH),
        (figures.seconds(0.44), "0.4 s"),
        (figures.seconds(59.7), "1 min 0 s"),
        (figures.seconds(4_800), "1 h 20 min"),
        (figures.percent(0.9944), "99.4 %"),
        (figures.percent(1), "100 %"),
        (figures.percent(0.99999), "99.999 %"),
        (figures.pair(7.9996, 8), ("7.9996", "8")),
        (figures.pair(8, 8), ("8", "8")),
    ],
)
def test_numbers_read_well(made: object, expected: object) -> None:
    assert made == expected


def test_savings_are_never_rounded_up() -> None:
    size = figures.factor(7_999, 1_000, "smaller", "larger", "same")
    assert size == f"7.9{figures.TIMES} smaller"


def test_a_latency_without_spread_is_no_overlap() -> None:
    unknown = Latency(1.0, math.nan, math.nan)
    stages = [stage("t", 0.9, 1_000, 2.0), stage("q", 0.9, 500, 1.0)]
    object.__setattr__(stages[1], "latency_ms", unknown)
    assert concerns(report(stages=tuple(stages))) == []
