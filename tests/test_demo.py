"""The demo as a user runs it: one run, and every promise that noise cannot break."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rarefy.deployment.runtimes import OnnxSession
from rarefy.metrics import top1
from rarefy.storage.format import load
from rarefy.tasks.vision import digits, resnet20
from rarefy.training.evaluate import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ["teacher", "pruned", "distilled", "quantized"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of the one run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    found = subprocess.run(
        [sys.executable, "-c", "from rarefy.cli import app; app()", "demo", "--out", folder],
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "Traceback" not in found.stderr
    assert "epoch 1/" in found.stderr  # progress
    return folder, found.stdout


@pytest.fixture(scope="module")
def report(demo: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((demo[0] / "report.json").read_text())
    return found


def test_all_files_are_there(demo: tuple[Path, str]) -> None:
    artifacts = {f"{name}.{suffix}" for name in NAMES for suffix in ("safetensors", "onnx")}
    assert {p.name for p in demo[0].iterdir()} == artifacts | {
        "report.html", "report.json", "run.json",
    }  # fmt: skip


def test_the_figures_have_the_form_that_was_promised(report: dict[str, Any]) -> None:
    assert [stage["name"] for stage in report["stages"]] == NAMES
    for stage in report["stages"]:
        assert 0 <= stage["accuracy"] <= 1
        assert all(isinstance(stage[key], int) for key in ("params", "macs", "bytes"))
        latency = stage["latency_ms"]
        assert 0 < latency["p10"] <= latency["median"] <= latency["p90"]
        assert stage["seconds"] > 0
    assert report["seed"] == 0
    assert {"torch", "onnxruntime", "python", "processor"} <= report["environment"].keys()


def test_the_figures_are_those_of_the_files(demo: tuple[Path, str], report: dict[str, Any]) -> None:
    folder, test = demo[0], digits().test
    for stage in report["stages"]:
        path = folder / f"{stage['name']}.safetensors"
        assert stage["bytes"] == path.stat().st_size
        assert stage["onnx_bytes"] == path.with_suffix(".onnx").stat().st_size
        network = load(path, resnet20())
        assert stage["params"] == sum(p.numel() for p in network.parameters())
    distilled = load(folder / "distilled.safetensors", resnet20())
    assert evaluate(distilled, test) == pytest.approx(report["stages"][2]["accuracy"], abs=0.003)
    quantized = OnnxSession(folder / "quantized.onnx")
    assert top1(lambda x: quantized(x)[0], test) == report["stages"][3]["accuracy"]


def test_the_network_became_what_was_promised(report: dict[str, Any]) -> None:
    teacher, pruned, distilled, quantized = report["stages"]
    assert teacher["accuracy"] > 0.95
    assert 2 * pruned["macs"] <= teacher["macs"]
    assert distilled["params"] == pruned["params"] < teacher["params"]
    assert teacher["accuracy"] - quantized["accuracy"] <= 0.01 + 1e-9
    assert 8 * quantized["bytes"] <= teacher["bytes"]
    assert any(width["after"] < width["before"] for width in report["widths"])


def test_checks_follow_from_the_figures(report: dict[str, Any]) -> None:
    first, last = report["stages"][0], report["stages"][-1]
    drop, size, speed = report["checks"]
    assert drop["value"] == pytest.approx(first["accuracy"] - last["accuracy"])
    assert size["value"] == pytest.approx(first["bytes"] / last["bytes"])
    ratios = [first["latency_ms"][q] / last["latency_ms"][q] for q in ("median", "p10")]
    assert speed["value"] == pytest.approx(min(ratios))
    assert [check["limit"] for check in (drop, size, speed)] == [0.01, 8, 2]
    assert drop["met"] == (drop["value"] <= 0.01 + 1e-12)
    assert size["met"] == (size["value"] >= 8)
    assert speed["met"] == (speed["value"] >= 2)


def test_the_page_opens_offline_and_shows_every_stage(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "report.html").read_text()
    assert all(name in page for name in NAMES)
    assert "<table" in page
    assert "<svg" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page


def test_the_terminal_ends_with_the_page(demo: tuple[Path, str]) -> None:
    folder, output = demo
    assert output.strip().endswith(str(folder / "report.html"))
    assert all(name in output for name in NAMES)
