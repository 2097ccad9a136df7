"""Pictures are well-formed whatever the names and numbers are."""

import math
from xml.etree import ElementTree

import pytest

from rarefy.drawing import HEAD, HEIGHT, Panel, panels


@pytest.mark.parametrize(
    "points",
    [
        ((0.0, 1.0), (0.5, 0.2), (1.0, 0.9)),
        ((0.0, 1.0), (1.0, 1.0)),
        ((0.0, math.nan), (0.3, math.inf), (1.0, -2.0)),
        (),
    ],
)
def test_every_picture_is_well_formed(points) -> None:
    text = panels("a < b", [Panel('<&"' * 20, points)] * 5, 1.0)
    root = ElementTree.fromstring(text)
    drawn = sum(math.isfinite(y) for _, y in points)
    assert sum(e.tag.endswith("circle") for e in root.iter()) == 5 * drawn
    assert root.get("height") == str(HEAD + 2 * HEIGHT)
    assert "nan" not in text.partition("</title>")[2].partition("<title>")[0]


def test_better_is_higher_and_more_is_to_the_right() -> None:
    root = ElementTree.fromstring(panels("t", [Panel("p", ((0.0, 1.0), (1.0, 3.0)))], 1.0))
    first, last = (e for e in root.iter() if e.tag.endswith("circle"))
    assert float(first.get("cx")) < float(last.get("cx"))
    assert float(first.get("cy")) > float(last.get("cy"))
