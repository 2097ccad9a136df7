"""Recomputing a sample: in Python, and as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner, Result

from rarefy.cli import app
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.records import Dense, Outputs, Sampled, TopK, checksums
from rarefy.distillation.soft_labels.views import Replay
from rarefy.errors import DataError, FormatError, InputError
from soft_label_store import dataset, images, loader, teacher, write

JOB = """
from soft_label_store import loader, teacher

def job():
    return teacher(), loader()

def nothing():
    return None
"""


def changed(folder: Path, at: int, by: float) -> None:
    """One stored number is another, under a checksum that fits."""
    layout, salt = SoftLabels(folder).manifest.layout, SoftLabels(folder).manifest.salt
    (shard,) = folder.glob("*.records")
    records = SoftLabels(folder)._maps[0].copy()
    records["values"][at, 0, 0] += by
    records["checksum"] = checksums(records, torch.arange(len(records)).numpy(), salt)
    assert records.dtype == layout.dtype
    shard.write_bytes(records.tobytes())


@pytest.mark.parametrize("form", [Dense(), TopK(4), Sampled(9, 2.0), Outputs("float32")])
@pytest.mark.parametrize("batch_size", [16, 7])
def test_a_sound_store_has_no_error(tmp_path: Path, form, batch_size: int) -> None:
    write(tmp_path, form=form)
    found = SoftLabels(tmp_path).verify(teacher(), loader(batch_size=batch_size))
    assert found <= (0.12 if isinstance(form, Sampled) else 1e-3)


def test_an_error_of_a_record_is_found(tmp_path: Path) -> None:
    write(tmp_path, form=Outputs("float32"))
    changed(tmp_path, at=99, by=0.25)
    labels = SoftLabels(tmp_path)
    assert labels.verify(teacher(), loader()) == pytest.approx(0.25, abs=1e-5)
    assert labels.verify(teacher(), loader(), samples=1) < 1e-5
    assert labels.verify(teacher(), loader(), samples=1000) == pytest.approx(0.25, abs=1e-5)


def test_views_are_replayed(tmp_path: Path) -> None:
    replay = Replay(dataset(), lambda x: x + torch.randn_like(x))
    write(tmp_path, loader(replay), views=3)
    assert SoftLabels(tmp_path).verify(teacher(), loader(replay)) < 1e-3


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    labels = SoftLabels(tmp_path)
    with pytest.raises(InputError, match="weights"):
        labels.verify(torch.nn.Linear(3, 3), loader())
    with pytest.raises(InputError, match="at least 1"):
        labels.verify(teacher(), loader(), samples=0)
    x = images()
    x[1] += 1  # not among the inputs whose hashes the manifest holds
    with pytest.raises(DataError, match="id 1 is another"):
        labels.verify(teacher(), loader(TensorDataset(x)), samples=100)
    (shard,) = tmp_path.glob("*.records")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(FormatError):
        SoftLabels(tmp_path).verify(teacher(), loader())


# --- commands


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["soft-labels", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "soft_job.py"
    file.write_text(JOB)
    return str(file)


def test_the_command_reports_the_largest_error(tmp_path: Path, job: str) -> None:
    store = tmp_path / "store"
    write(store, form=Outputs("float32"))
    found = invoke("verify", store, "--job", f"{job}:job")
    assert found.exit_code == 0, found.output
    assert "64 records: largest error" in found.output
    changed(store, at=0, by=1.0)
    found = invoke("verify", store, "--job", f"{job}:job", "--samples", 5)
    assert found.exit_code == 1
    assert "5 records: largest error 1" in found.output
    assert "tolerance of 0.005" in found.output
    assert invoke("verify", store, "--job", f"{job}:job", "--tolerance", 2).exit_code == 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (":jobs", "Did you mean job"),
        (":nothing", "(teacher, data)"),
        ("", "my_network.py:"),
        (":", "a"),
    ],
)
def test_a_wrong_job_is_explained(tmp_path: Path, job: str, function: str, words: str) -> None:
    write(tmp_path / "store")
    found = invoke("verify", tmp_path / "store", "--job", job + function)
    assert found.exit_code == 2
    assert words in found.output


def test_the_command_shows_what_a_store_holds(tmp_path: Path) -> None:
    write(tmp_path)
    found = invoke("inspect", tmp_path)
    assert found.exit_code == 0
    assert "100, 1 view" in found.output
    (tmp_path / "manifest.json").write_text("{}")
    assert invoke("inspect", tmp_path).exit_code == 1
    assert invoke("inspect", tmp_path / "nowhere").exit_code == 2
