"""A report as one self-contained page: no script, no request, readable offline and on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

from rarefy.reporting import charts, figures
from rarefy.reporting.markup import figure, safe
from rarefy.reporting.summary import (
    calls_text,
    concerns,
    ends,
    faster,
    is_worse,
    smaller,
    smaller_onnx,
    verdict,
)
from rarefy.types import Check, Report, Stage, Width

_MANY = 12
_TALL = 40

# The policy makes the promise of the first line binding: a browser refuses every script and every
# request, whatever a title or the name of a layer may hold.
_SKELETON = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="generator" content="rarefy">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Made by rarefy. The same figures, for programs, are in <code>report.json</code>.</footer>
</body>
</html>
"""


def page(report: Report) -> str:
    """The page of a report as HTML.

    Raises:
        InputError: the report has no stage.

    Example:
        >>> page(report)[:15]  # doctest: +SKIP
        '<!doctype html>'
    """
    style = files("rarefy.reporting").joinpath("page.css").read_text(encoding="utf-8")
    sections = (_header, _checks, _stages, _charts, _widths, _frozen, _method, _environment)
    body = "\n".join(part for section in sections if (part := section(report)))
    title = safe(f"{report.title}: {verdict(report)}")
    return _SKELETON.format(title=title, style=style, body=body)


def _section(name: str, title: str, content: str) -> str:
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{content}\n</section>'
    )


# --- header -----------------------------------------------------------------------------------


def _header(report: Report) -> str:
    parts = verdict(report).split(", ")
    missed = not all(check.met for check in report.checks)
    headline = ", ".join(
        f'<span class="{"worse" if is_worse(part) else "lead" if i == 0 and not missed else ""}">'
        f"{figure(part) if len(parts) > 1 else safe(part)}</span>"
        for i, part in enumerate(parts)
    ).replace(' class=""', "")
    kicker = f'<p class="kicker">{safe(report.title)}{_promise(report.checks)}</p>'
    return (
        f"<header>\n{_warning(report)}{kicker}\n<h1>{headline}</h1>\n"
        f"{_tiles(*ends(report))}\n</header>"
    )


def _promise(checks: Sequence[Check]) -> str:
    if not checks or not all(check.met for check in checks):
        return ""
    text = "target met" if len(checks) == 1 else f"all {len(checks)} targets met"
    return f' <span aria-hidden="true">&middot;</span> <span class="met">{text}</span>'


def _warning(report: Report) -> str:
    texts = concerns(report)
    if not texts:
        return ""
    missed, total = sum(not check.met for check in report.checks), len(report.checks)
    head = f"{missed} of {total} targets missed" if missed else "Before you use these figures"
    items = "".join(f"<li>{safe(figures.title(text))}.</li>" for text in texts)
    return f'<div class="note bad" role="note"><strong>{head}</strong><ul>{items}</ul></div>\n'


def _tiles(teacher: Stage, last: Stage) -> str:
    rows = (
        ("File on disk", figures.size, teacher.bytes, last.bytes),
        ("Latency", figures.milliseconds, teacher.latency_ms.median, last.latency_ms.median),
        ("Accuracy", figures.percent, teacher.accuracy, last.accuracy),
        ("MACs per example", figures.count, teacher.macs, last.macs),
    )
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{figure(show(after))}"
        f'<span class="from">from {figure(show(before))}</span></dd></div>'
        for name, show, before, after in rows
    )
    return f'<dl class="tiles">{tiles}</dl>'


# --- stages -----------------------------------------------------------------------------------

_COLUMNS = (
    "Accuracy",
    "File",
    "ONNX file",
    "Latency <small>median, p10\N{EN DASH}p90</small>",
    "Parameters",
    "MACs",
    "Made in",
)


def _stages(report: Report) -> str:
    teacher = report.stages[0]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Stage", *_COLUMNS))
    rows = "\n".join(_row(teacher, stage) for stage in report.stages)
    table = (
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="stages">'
        f'<table class="stages"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )
    remarks = "".join(
        f"<li><strong>{safe(figures.title(stage.name))}</strong> {safe(note)}</li>"
        for stage in report.stages
        for note in stage.notes
    )
    remarks = f'<ul class="remarks">{remarks}</ul>' if remarks else ""
    return _section("stages", "Stage by stage", f'<div class="card">{table}{remarks}</div>')


def _row(teacher: Stage, stage: Stage) -> str:
    first = stage is teacher
    latency = stage.latency_ms
    cells = (
        (figures.percent(stage.accuracy), figures.points(stage.accuracy - teacher.accuracy)),
        (figures.size(stage.bytes), smaller(teacher, stage)),
        (figures.size(stage.onnx_bytes), smaller_onnx(teacher, stage)),
        (figures.milliseconds(latency.median), faster(teacher, stage)),
        (figures.count(stage.params), _fewer(teacher.params, stage.params)),
        (figures.count(stage.macs), _fewer(teacher.macs, stage.macs)),
        (figures.seconds(stage.seconds), None),
    )
    spreads = {3: f"<small>{figure(figures.spread(latency.p10, latency.p90))}</small>"}
    return (
        f'<tr><th scope="row">{safe(figures.title(stage.name))}</th>'
        + "".join(
            f"<td>{figure(value)}{'' if first else _compared(text)}{spreads.get(i, '')}</td>"
            for i, (value, text) in enumerate(cells)
        )
        + "</tr>"
    )


def _fewer(before: float, after: float) -> str | None:
    return figures.factor(before, after, "fewer", "more", "same")


def _compared(text: str | None) -> str:
    if not text:
        return ""
    kind = ' class="worse"' if is_worse(text) else ""
    return f"<small{kind}>{figure(text)}</small>"


# --- charts -----------------------------------------------------------------------------------


def _charts(report: Report) -> str:
    start = figures.percent(charts.axis_start(report.stages))
    panels = (
        ("File size", "Bytes on disk of the safetensors file", charts.sizes),
        ("Latency", "Median of one call; whiskers from 10th to 90th percentile", charts.latencies),
        ("Accuracy", f"Axis from {start}; dashes mark the first stage", charts.accuracies),
    )
    drawn = "\n".join(
        f"<figure><figcaption><h3>{name}</h3><span>{text}</span></figcaption>"
        f"{draw(report.stages)}</figure>"
        for name, text, draw in panels
    )
    return _section("charts", "Size, latency, accuracy", f'<div class="charts">{drawn}</div>')


# --- targets ----------------------------------------------------------------------------------


def _checks(report: Report) -> str:
    if not report.checks:
        return ""
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Target", "Measured", "Limit", "Result")
    )
    rows = "".join(_check(check) for check in report.checks)
    table = f'<table class="targets"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return _section("targets", "Targets", f'<div class="card scroll">{table}</div>')


def _check(check: Check) -> str:
    word, kind = ("Met", "met") if check.met else ("Missed", "missed")
    value, limit = figures.pair(check.value, check.limit)
    return (
        f'<tr><th scope="row">{safe(check.claim)}</th><td>{figure(value)}</td>'
        f'<td>{figure(limit)}</td><td class="{kind}">{word}</td></tr>'
    )


# --- widths and what was frozen ---------------------------------------------------------------


def _widths(report: Report) -> str:
    if not report.widths:
        return ""
    most = max(width.before for width in report.widths)
    narrower = sum(width.after < width.before for width in report.widths)
    before, after = (sum(getattr(w, n) for w in report.widths) for n in ("before", "after"))
    text = (
        f"<p>{narrower} of {len(report.widths)} layers are narrower: "
        f"{before:,} output channels or features became {after:,}.</p>"
    )
    rows = "\n".join(_width(width, most) for width in report.widths)
    columns = ("Layer", "Before", "After", "Kept")
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    tall = ' class="tall" role="region" tabindex="0" aria-labelledby="widths"'
    table = (
        f'<div class="card"><div{tall if len(report.widths) > _TALL else ""}>'
        f'<table class="widths"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div></div>"
    )
    return _section("widths", "Width of every layer", text + table)


def _width(width: Width, most: int) -> str:
    kind = ' class="same"' if width.after == width.before else ""
    layer = safe(width.layer).replace(".", ".<wbr>")
    return (
        f'<tr{kind}><th scope="row"><code>{layer}</code></th><td>{width.before}</td>'
        f"<td>{width.after}</td><td>{charts.width_bar(width, most)}</td></tr>"
    )


def _frozen(report: Report) -> str:
    if not report.frozen:
        return _section(
            "frozen", "Left alone", "<p>Nothing: every layer could be made smaller.</p>"
        )
    items = "".join(f"<li>{safe(text)}</li>" for text in report.frozen)
    listed = f'<ul class="frozen">{items}</ul>'
    if len(report.frozen) > _MANY:
        listed = f"<details><summary>All {len(report.frozen)}</summary>{listed}</details>"
    text = "<p>What could not be made smaller, and why.</p>"
    return _section("frozen", "Left alone", text + listed)


# --- method and environment -------------------------------------------------------------------

_METHOD = (
    (
        "Accuracy",
        "Share of test examples whose highest output is the right class, computed by the "
        "artifact after it was reloaded from disk, not by the network in memory.",
    ),
    ("File", "Bytes on disk of the safetensors file, everything in it included."),
    ("ONNX file", "Bytes on disk of the exported ONNX file."),
    (
        "Latency",
        "Time of one call of the ONNX file in onnxruntime: the median of {calls}, and the 10th "
        "and 90th percentile as its spread.",
    ),
    ("MACs", "Multiply-accumulate operations of one example, counted on the network's graph."),
    ("Ratios", "Against the first stage, from the figures shown, never rounded in favor."),
)


def _method(report: Report) -> str:
    calls = calls_text(report)
    facts = _facts((name, text.format(calls=calls)) for name, text in _METHOD)
    return _section("method", "How each figure was measured", facts)


def _environment(report: Report) -> str:
    run = (("Seed", report.seed), ("Total time", figures.seconds(report.seconds)))
    return _section("environment", "Environment", _facts([*run, *report.environment.items()]))


def _facts(pairs: Iterable[tuple[object, object]]) -> str:
    items = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'
