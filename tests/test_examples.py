"""Every example runs as a reader would run it, in a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip()


@pytest.mark.slow
def test_the_textbook_example_keeps_its_promise(tmp_path: Path) -> None:
    """The share of zeros is the one asked for, the loaded file is smaller and as accurate."""
    command = [sys.executable, EXAMPLES[0].parent / "lenet_l1_unstructured.py", "--sparsity", "0.8"]
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=True
    )
    rows = {line.split()[0]: line for line in found.stdout.splitlines()}
    dense, tuned, loaded = (number(rows[n], "%") for n in ("dense", "fine-tuned", "loaded"))
    before, after = (number(rows[name], " bytes") for name in ("dense", "loaded"))
    assert "sparsity 0.8000" in rows["sparsity"]
    assert before > 3 * after
    assert loaded == tuned > dense - 10


def number(line: str, unit: str) -> float:
    """The number before a unit."""
    return float(re.findall(rf"([\d.,]+){unit}", line)[0].replace(",", ""))
