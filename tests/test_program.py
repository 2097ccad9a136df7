"""Graphs as data."""

import pytest
import torch

from rarefy.errors import InputError
from rarefy.graph.program import Node, Ref, Spec, refs, substitute


def test_references_are_found_and_replaced_at_any_depth() -> None:
    nested = (Ref("a"), [Ref("b"), {"k": Ref("c")}], slice(Ref("d"), None), 3)
    assert [r.name for r in refs(nested)] == ["a", "b", "c", "d"]
    assert substitute(nested[:2], lambda r: r.name) == ("a", ["b", {"k": "c"}])


def test_nodes_answer_for_their_values() -> None:
    node = Node("y", "aten.relu.default", (Ref("x"),), value=Spec((2, 3), torch.float32))
    assert node.shape == (2, 3)
    assert node.inputs == ("x",)
    assert node.options == {}
    with pytest.raises(InputError, match="node y"):
        _ = Node("y", "aten.split.Tensor", value=(Spec((1,), torch.float32),)).shape
