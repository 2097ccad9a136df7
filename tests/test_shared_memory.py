"""Which values lie in the same memory."""

import pytest
import torch
from torch import nn

from rarefy.graph.capture import capture
from rarefy.graph.declarations import writes
from rarefy.graph.memory import Memory, sharing
from rarefy.graph.program import Graph, Node, Ref

A, B, C = Ref("a"), Ref("b"), Ref("c")


@pytest.mark.parametrize(
    ("op", "args", "shared"),
    [
        ("aten.relu.default", (A,), ()),
        ("aten.relu_.default", (A,), ("a",)),
        ("aten.reshape.default", (A, [B, 3]), ("a",)),
        ("aten.chunk.default", (A, 2), ("a",)),
        ("aten.dropout.default", (A, 0.5, False), ("a",)),
        ("aten.view_as.default", (A, B), ("a",)),
        ("aten.type_as.default", (A, B), ("a",)),
        ("aten.broadcast_tensors.default", ([A, B],), ("a", "b")),
        ("aten._foreach_mul_.Scalar", ([A, B], 2), ("a", "b")),
        ("operator.getitem", (A, 1), ("a",)),
        ("aten.conv2d.default", (A, B, C), ()),
        ("aten.copy_.default", (A, B), ("a",)),
        ("output", ([A, B],), ()),
        ("aten.zeros.default", ([2],), ()),
    ],
)
def test_in_whose_memory_a_result_may_lie(op, args, shared) -> None:
    assert sharing(Node("y", op, args)) == shared


def test_out_is_written_wherever_it_stands() -> None:
    assert sharing(Node("y", "aten.add.out", (A, B), {"out": C})) == ("c",)


class Writes(nn.Module):
    """A value that is read, written through another and read again."""

    def __init__(self, write) -> None:
        super().__init__()
        self.write = write

    def forward(self, x, y):
        before = y * 2
        self.write(x, y)
        return before, y * 3


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: torch.broadcast_tensors(x, y)[1].mul_(2),
        lambda x, y: torch.atleast_2d(x, y)[1].mul_(2),
        lambda x, y: torch.add(x, 1, out=y),
        lambda x, y: torch._foreach_mul_([x, y], 2),
        lambda x, y: y[:, :1].mul_(2),
    ],
)
def test_what_is_written_is_known_by_all_of_its_names(write) -> None:
    graph = capture(Writes(write), (torch.randn(3, 2), torch.randn(3, 2))).graph
    memory = Memory(graph)
    (written,) = (node for node in graph.calls if writes(node.op))
    before, after = (node for node in graph.calls if node.op == "aten.mul.Tensor")
    assert after.name in memory.effects[written.name]
    assert before in memory.readers[memory.owner[written.name]]
    assert graph.output.name in memory.effects[written.name]


def graph(*calls: Node) -> Graph:
    return Graph((Node("x", "input"), *calls, Node("out", "output", ([Ref("x")],))), "", "")


def test_views_of_views_have_one_owner() -> None:
    memory = Memory(
        graph(
            Node("y", "aten.relu.default", (Ref("x"),)),
            Node("v", "aten.view.default", (Ref("y"), [2])),
            Node("w", "aten.transpose.int", (Ref("v"), 0, 1)),
        )
    )
    assert memory.owner == {"x": "x", "y": "y", "v": "y", "w": "y", "out": "out"}
    assert not memory.written


def test_values_that_may_be_one_have_one_owner_also_under_earlier_names() -> None:
    memory = Memory(
        graph(
            Node("y", "aten.relu.default", (Ref("x"),)),
            Node("v", "aten.view.default", (Ref("y"), [2])),
            Node("both", "aten.broadcast_tensors.default", ([Ref("x"), Ref("y")],)),
        )
    )
    assert len({memory.owner[name] for name in ("x", "y", "v", "both")}) == 1


@pytest.mark.parametrize(
    ("op", "args", "written"),
    [
        ("aten.add_.Scalar", (1,), {"y", "v", "w"}),
        ("aten.dropout_.default", (0.5, True), {"y", "v", "w"}),
        ("aten.dropout_.default", (0.5, False), set()),
    ],
)
def test_what_is_written_has_all_of_its_names(op, args, written) -> None:
    memory = Memory(
        graph(
            Node("y", "aten.relu.default", (Ref("x"),)),
            Node("v", "aten.view.default", (Ref("y"), [2])),
            Node("w", op, (Ref("v"), *args)),
            Node("z", "aten.relu.default", (Ref("w"),)),
        )
    )
    assert memory.written == written
