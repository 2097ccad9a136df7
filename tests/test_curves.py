"""Curves as a value: a table, a picture, a file, and losses in between."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.errors import FormatError, InputError, OutputError
from rarefy.graph.trace import trace
from rarefy.pruning.scoring.curves import Point, Sensitivity, labels

GROUPS = trace(
    nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)),
    torch.zeros(2, 3),
).groups
CURVES = Sensitivity(
    0.9,
    (
        Point("0", 0.25, 2, 8, 0.8),
        Point("0", 0.5, 4, 8, 0.85),
        Point("0", 0.75, 6, 8, 0.6),
        Point("2", 0.5, 2, 4, 0.95),
    ),
    "magnitude",
    True,
    "f",
)


def test_losses_never_fall_and_are_linear_in_between_and_beyond() -> None:
    losses = CURVES.losses(GROUPS)
    at = np.array([0, 0.125, 0.25, 0.5, 0.625, 0.75, 1])
    np.testing.assert_allclose(losses[0](at), [0, 0.05, 0.1, 0.1, 0.2, 0.3, 0.5])
    np.testing.assert_allclose(losses[1](at), 0)  # better than whole costs nothing


def test_of_a_loss_lower_is_better() -> None:
    lower = Sensitivity(0.9, CURVES.points, "magnitude", False, "f")
    assert lower.drop(CURVES.points[0]) == pytest.approx(-0.1)
    np.testing.assert_allclose(lower.losses(GROUPS)[1](np.array([0.5])), [0.05])


def test_the_table_has_a_row_for_each_group() -> None:
    assert str(CURVES).splitlines() == [
        "metric 0.9 whole, units chosen by magnitude",
        "group  units          25%        50%        75%",
        "0          8          0.8       0.85        0.6",
        "2          4                    0.95           ",
    ]


def test_the_picture_stands_alone_and_shows_every_point(tmp_path: Path) -> None:
    text = CURVES.plot(tmp_path / "curves.svg").read_text()
    root = ElementTree.fromstring(text)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == len(CURVES.points) + 2  # and the whole network in each
    assert "href" not in text


def test_a_file_gives_back_the_same_value(tmp_path: Path) -> None:
    assert Sensitivity.load(CURVES.save(tmp_path / "curves.json")) == CURVES


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"version": 2}', '{"version": 1, "points": [{"a": 1}]}',
             '{"version": 1, "points": [], "base": "x", "criterion": "", "higher_is_better": true, '
             '"fingerprint": ""}'],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="no sensitivity"):
        Sensitivity.load(path)


def test_places_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Sensitivity.load(tmp_path / "none.json")
    with pytest.raises(OutputError, match="cannot be written"):
        CURVES.save(tmp_path / "none" / "curves.json")


def test_groups_of_one_name_have_labels_of_their_own() -> None:
    assert labels([GROUPS[0], GROUPS[0], GROUPS[1]]) == ("0", "0 #2", "2")


def test_the_value_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        CURVES.base = 1.0
