"""The record of a training, and how it is shown."""

import torch
from torch import nn

from rarefy.training.distill import distill
from rarefy.training.record import Fit
from rarefy.training.train import train

DATA = [(torch.eye(4).repeat(4, 1), torch.arange(4).repeat(4)) for _ in range(2)]


def test_the_gap_is_train_against_val() -> None:
    assert Fit(0.75, 0.5).gap == 0.25
    assert Fit(None, 0.5).gap is None


def test_a_training_is_shown_as_a_table() -> None:
    net = train(nn.Linear(4, 4), DATA, epochs=3, val=DATA, progress=False)
    lines = str(net.trained).splitlines()
    assert lines[0].split() == ["epoch", "loss", "lr", "top-1", "s"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert lines[1].split()[1] == f"{net.trained.epochs[0].loss:.4f}"
    assert lines[4].startswith("6 steps in")
    assert f"best epoch {net.trained.best}" in lines[4]
    assert lines[5].startswith("network: top-1 on val")
    assert lines[5].endswith("gap +0.0000")


def test_teacher_and_student_are_named() -> None:
    net = distill(nn.Linear(4, 4), nn.Linear(4, 4), DATA, epochs=1, val=DATA, progress=False)
    shown = str(net.trained)
    assert "student: top-1" in shown
    assert "teacher: top-1" in shown


def test_what_was_not_measured_is_left_out() -> None:
    shown = str(train(nn.Linear(4, 4), DATA, epochs=1, progress=False).trained)
    assert "best" not in shown
    assert "val" not in shown
