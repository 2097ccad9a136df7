"""Paths that users name, and what errors say of those that nothing has."""

from __future__ import annotations

import pytest
from torch import nn

from rarefy.errors import InputError
from rarefy.paths import SHOWN, excluded, matching, paths, remedy, within

NET = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))


def test_patterns_find_modules_and_parameters() -> None:
    known = paths(NET)
    assert matching("1.*", known, "exclude") == {"1.0", "1.1", "1.1.weight", "1.1.bias"}
    assert matching("0", known, "exclude") == {"0"}


def test_a_near_name_is_offered() -> None:
    with pytest.raises(InputError, match=r"no module .* '1.1.wieght'.*Did you mean 1.1.weight"):
        matching("1.1.wieght", paths(NET), "exclude")


def test_where_no_name_is_near_some_are_shown() -> None:
    assert remedy("encoder", {"0", "1"}) == "There are 0, 1; see model.named_modules()"
    many = remedy("encoder", {str(n) for n in range(10, 10 + 2 * SHOWN)})
    assert many.count(",") == SHOWN
    assert "..." in many
    assert remedy("encoder", ()) == "See model.named_modules()"


def test_within_is_of_whole_names() -> None:
    assert within("layer1.0", {"layer1"})
    assert within("layer1", {"layer1"})
    assert not within("layer10", {"layer1"})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("1.0", "exclude=...: a str was given"),
        (None, "a NoneType was given"),
        ([0], "it holds a int"),
        (["0", "one"], r"exclude=\['one'\]: no module"),
    ],
)
def test_what_is_no_list_of_names_is_not_excluded(names, message) -> None:
    with pytest.raises(InputError, match=message):
        excluded(names, paths(NET))


def test_all_that_any_of_the_names_means_is_excluded() -> None:
    assert excluded(("0", "1.1.*"), paths(NET)) == {"0", "1.1.weight", "1.1.bias"}
    assert excluded((), paths(NET)) == frozenset()
