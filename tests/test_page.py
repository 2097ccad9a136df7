"""The page: what it says, that names cannot break it, and that a real browser shows it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rarefy.reporting import page, write
from rarefy.types import Check, Latency, Stage, Width
from report_example import report, stage

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Reader(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of one kind."""
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        """What a reader sees, on one line."""
        return " ".join(" ".join(self.words).split())


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_the_page_shows_every_figure() -> None:
    seen = read(page(report()))
    for text in (
        "9.1× smaller",  # noqa: RUF001
        "target met",
        "Quantized",
        "122 kB",
        "0.718 ms",
        "99.1 %",
        "2 groups kept their width",
        "stage1. 0. conv1",
        "1 of 2 layers are narrower: 26 output channels or features became 18",
        "head: its outputs are the network's outputs",
        "2.14.0",
        "2 min 21 s",
        "percentile",
    ):
        assert text in seen.text
    assert len(seen.all("table")) == 3
    panels = [svg for svg in seen.all("svg") if svg.get("role") == "img"]
    assert len(panels) == 3
    assert "Quantized" in seen.text
    assert "quantized 0.718 ms, 3.2" in str(panels[1]["aria-label"])


def test_the_page_asks_nothing_of_the_network_and_runs_nothing() -> None:
    html = page(report())
    seen = read(html)
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {key for _, attrs in seen.tags for key in attrs if key in ("src", "href", "style")}
    assert not re.search(r"url\(|@import|https?:|//\w", html)
    policy = next(m for m in seen.all("meta") if "http-equiv" in m)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_is_accessible() -> None:
    seen = read(page(report(widths=tuple(Width(f"l{i}", 8, 4) for i in range(99)))))
    assert seen.all("html")[0]["lang"] == "en"
    assert len(seen.all("h1")) == 1
    assert all(th.get("scope") in ("col", "row") for th in seen.all("th"))
    assert all(s.get("role") == "img" or s.get("aria-hidden") for s in seen.all("svg"))
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = [attrs["aria-labelledby"] for _, attrs in seen.tags if "aria-labelledby" in attrs]
    assert set(labels) <= set(ids)
    regions = [attrs for _, attrs in seen.tags if attrs.get("role") == "region"]
    assert len(regions) == 2
    assert all(attrs["tabindex"] == "0" for attrs in regions)


def test_what_was_missed_stands_before_the_verdict() -> None:
    bad = report(
        stages=(stage("teacher", 0.9, 1_000, 2.0), stage("pruned", 0.9, 1_500, 4.0)),
        checks=(Check("at least 8x smaller", 0.66, 8, False), Check("drop", 0, 0.01, True)),
    )
    text = read(page(bad)).text
    body = text[text.index("1 of 2 targets missed") :]
    assert body.index("measured 0.66, limit 8") < body.index("1.5× larger , 2.0× slower")  # noqa: RUF001
    assert "Pruned: 1.5× larger than teacher (file on disk)" in body  # noqa: RUF001
    assert "targets met" not in text


ATTACKS = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</title></style></svg><iframe src=//x>",
    "{title} %s {0}",
    "\x00\x1b[31m\ud800\u202e",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_names_cannot_break_out(attack: str, tmp_path: Path) -> None:
    plain = [tag for tag, _ in read(page(report())).tags if tag != "wbr"]
    first, *rest = report().stages
    hostile = report(
        title=attack,
        stages=(Stage(**{**vars(first), "name": attack}), *rest[:-1], _noted(rest[-1], attack)),
        widths=(Width(attack, 16, 8), Width("head", 10, 10)),
        checks=(Check(attack, 9, 8, True),),
        frozen=(attack,),
        environment={attack: attack},
    )
    seen = read(page(hostile))
    tags = [tag for tag, _ in seen.tags if tag != "wbr"]
    assert sorted(tags) == sorted([*plain, "li", "strong"])
    assert not [key for _, attrs in seen.tags for key in attrs if key.startswith("on")]
    html, _ = write(hostile, tmp_path)
    assert not re.search("[\x00\x1b\u202e]", html.read_text(encoding="utf-8"))


def _noted(last: Stage, note: str) -> Stage:
    return Stage(**{**vars(last), "notes": (note,)})


def test_empty_parts_and_missing_figures_still_make_a_page() -> None:
    unknown = Stage("q", math.nan, 0, 0, 0, 0, Latency(math.nan, math.nan, math.nan), 0, math.nan)
    for stages in ((unknown,), (unknown, unknown), (stage("t", 0.5, 10, 1.0), unknown)):
        bare = report(stages=stages, widths=(), checks=(), frozen=(), environment={})
        html = page(bare)
        read(html)
        assert "nan" not in html.split("</style>")[1]


def test_the_method_says_how_many_calls_were_timed() -> None:
    assert "the median of 200 calls, and" in read(page(report())).text
    few = replace(stage("teacher", 0.9, 1_000, 2.0), calls=7)
    text = read(page(report(stages=(few, *report().stages[1:])))).text
    assert "the median of 7\N{EN DASH}200 calls" in text


def test_many_layers_and_reasons_fold() -> None:
    seen = read(page(report(frozen=tuple(f"layer{i}: why" for i in range(50)))))
    assert seen.all("details")
    assert "All 50" in seen.text


# --- in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--dump-dom",
)


def browse(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The document as the browser holds it, and everything it wrote to its console."""
    assert CHROMIUM is not None
    run = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", path.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    log = run.stderr.decode(errors="replace").splitlines()
    return run.stdout.decode(), [line for line in log if "CONSOLE" in line]


browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@browser
def test_a_browser_shows_table_and_charts_without_an_error(tmp_path: Path) -> None:
    html, _ = write(report(title=ATTACKS[0]), tmp_path)
    dom, console = browse(html, tmp_path / "profile")
    assert console == []
    seen = read(dom)
    assert len(seen.all("table")) == 3
    assert len([svg for svg in seen.all("svg") if svg.get("role") == "img"]) == 3
    assert "Quantized" in seen.text
    assert not seen.all("script")


@browser
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("<script>nothing.at.all</script>", "ReferenceError"),
        ("<script>console.error('oh dear')</script>", "oh dear"),
    ],
)
def test_the_browser_test_can_fail(tmp_path: Path, fault: str, message: str) -> None:
    path = tmp_path / "broken.html"
    path.write_text(f"<!doctype html><title>x</title><table></table>{fault}")
    _, console = browse(path, tmp_path / "profile")
    assert any(message in line for line in console)


@browser
def test_the_policy_of_the_page_stops_scripts_and_requests(tmp_path: Path) -> None:
    html, _ = write(report(), tmp_path)
    fault = "<script>document.title = 'owned'</script><img src='x.png'></main>"
    html.write_text(html.read_text(encoding="utf-8").replace("</main>", fault), encoding="utf-8")
    dom, console = browse(html, tmp_path / "profile")
    assert "<title>owned" not in dom
    assert len([line for line in console if "Content Security Policy" in line]) == 2
