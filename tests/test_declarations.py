"""What an operator's name stands for."""

import pytest

from rarefy.errors import FormatError
from rarefy.graph.declarations import is_random, is_view, kind, resolve, schema, writes


@pytest.mark.parametrize("op", ["os.system", "aten.nothing.default", "aten.relu", "torch.load", ""])
def test_other_operators_do_not_resolve(op) -> None:
    with pytest.raises(FormatError, match="operator"):
        resolve(op)
    assert schema(op) is None


@pytest.mark.parametrize(
    ("op", "view", "written", "random"),
    [
        ("aten.relu.default", False, False, False),
        ("aten.relu_.default", False, True, False),
        ("aten.view.default", True, False, False),
        ("aten.chunk.default", True, False, False),
        ("aten.copy_.default", False, True, False),
        ("aten.dropout.default", False, False, True),
        ("aten.add.out", False, True, False),
        ("operator.getitem", True, False, False),
        ("operator.add", False, False, False),
    ],
)
def test_what_declarations_say(op, view, written, random) -> None:
    assert (is_view(op), writes(op), is_random(op)) == (view, written, random)


def test_overloads_are_of_one_kind() -> None:
    assert {kind(f"aten.add.{overload}") for overload in ("Tensor", "Scalar", "out")} == {"add"}
