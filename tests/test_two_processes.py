"""Training in two processes that average their gradients (gloo)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from several_processes import in_processes

SCRIPT = Path(__file__).with_name("two_processes.py")
SAME = ["even", "shuffled", "nan", "unread", "too_few", "penalized", "drawing", "divided"]
SAME += ["prepared", "resumed", "uneven", "unsent", "recomputing"]
ONE = {
    "occupied": (0, "OutputError", "holds checkpoints of an earlier run"),
    "unstorable": (0, "InputError", "a set is in the state"),
    "misnumbered": (1, "DataError", "label 99"),
    "unheard": (1, "DataError", "240"),
}
"""Cases in which one process finds the error: its rank, and what is said."""

CASES = [*SAME, *ONE, "elsewhere"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank, and a process alone, wrote of every case; and what the ranks showed."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [str(folder), *CASES]
    shown = in_processes(SCRIPT, *arguments)
    subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        timeout=280,
    )
    read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return read, shown


@pytest.mark.parametrize("case", SAME)
def test_both_return_the_same(found, case) -> None:
    first, second = (found[0][f"{case}-{rank}"] for rank in (0, 1))
    assert first == second


def test_two_processes_take_the_steps_of_one(found) -> None:
    two, one = found[0]["even-0"], found[0]["even-alone"]
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-6)
    for a, b in zip(two["history"], one["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert two["before"] == pytest.approx(one["before"], rel=1e-6)
    assert two["train"] == pytest.approx(one["train"], rel=1e-5)
    assert two["steps"] == one["steps"] == 6
    assert two["threads"] == 1


def test_parameters_that_no_loss_reads_stay_as_they_are(found) -> None:
    two, one = found[0]["unread-0"], found[0]["unread-alone"]
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-6)
    assert two["unread"] == one["unread"] == [1.0]


def test_a_penalty_reads_what_the_loss_does_not(found) -> None:
    two, one = found[0]["penalized-0"], found[0]["penalized-alone"]
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-6)
    assert two["unread"] == pytest.approx(one["unread"], abs=1e-6)
    assert two["unread"] != [1.0]


@pytest.mark.parametrize("case", ["divided", "prepared"])
def test_parts_that_the_processes_have_already_are_used_whole(found, case) -> None:
    assert found[0][f"{case}-0"]["steps"] == 2 * 5
    assert found[0][f"{case}-alone"]["steps"] == 2 * 10


def test_val_that_the_processes_share_already_counts_whole(found) -> None:
    two = found[0]["divided-0"]
    assert two["history"][-1][1] == pytest.approx(two["whole"])


@pytest.mark.parametrize("case", ONE)
def test_an_error_of_one_is_raised_on_both(found, case) -> None:
    rank, kind, text = ONE[case]
    own, other = (found[0][f"{case}-{number}"] for number in (rank, 1 - rank))
    assert own["type"] == other["type"] == kind
    assert text in own["error"]
    assert other["error"] == f"process {rank}: {own['error']}"


def test_networks_that_began_apart_resume(found) -> None:
    assert "error" not in found[0]["resumed-0"]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("elsewhere", "find other checkpoints"),
        ("uneven", "the processes have 1, 2 batches"),
        ("unsent", "processes cannot share it"),
        ("recomputing", "use_reentrant=False"),
    ],
)
def test_what_processes_cannot_do_is_named(found, case, text) -> None:
    for rank in (0, 1):
        assert text in found[0][f"{case}-{rank}"]["error"]


def test_fewer_batches_than_processes(found) -> None:
    assert found[0]["too_few-alone"]["steps"] == 2
    for rank in (0, 1):
        assert "1 batch for 2 processes" in found[0][f"too_few-{rank}"]["error"]


def test_shuffled_data_are_shared(found) -> None:
    assert found[0]["shuffled-0"]["steps"] == 2 * 3
    assert found[0]["shuffled-alone"]["steps"] == 2 * 7


def test_a_loss_that_is_not_finite_on_one_stops_both(found) -> None:
    for rank in (0, 1):
        assert "epoch 1, step 2: the loss is nan" in found[0][f"nan-{rank}"]["error"]


def test_only_the_first_shows(found) -> None:
    (_, first), (_, second) = found[1]
    assert "epoch 2/2" in first
    assert "epoch" not in second
