"""A graph is the same after JSON, and JSON that is no sound graph is refused."""

import collections
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from rarefy.errors import FormatError
from rarefy.graph.allowed import ALLOWED, check_operator
from rarefy.graph.capture import capture
from rarefy.graph.program import Graph, Node, Ref, Spec
from rarefy.graph.serialize import MAX_DEPTH, check_structure, from_json, to_json

IN = pytree.treespec_dumps(pytree.tree_flatten(((0,), {}))[1])
OUT = pytree.treespec_dumps(pytree.tree_flatten(0)[1])
LEAF = {"type": None, "context": None, "children_spec": []}


def graph_of(*calls: Node) -> Graph:
    last = calls[-1].name if calls else "x"
    nodes = (Node("x", "input"), *calls, Node("output", "output", ([Ref(last)],)))
    return Graph(nodes, IN, OUT)


def edited(change: Any) -> str:
    data = json.loads(to_json(graph_of(Node("y", "aten.relu.default", (Ref("x"),), {}))))
    change(data)
    return json.dumps(data)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = torch.relu(self.norm(self.conv(x)))
        parts = y.chunk(2, dim=1)
        return {"logits": parts[0].mean((2, 3)), "more": [parts[1].to(torch.float64), (y[:, 1:3],)]}


def test_a_captured_graph_is_the_same_after_json() -> None:
    graph = capture(Net(), torch.randn(2, 3, 8, 8)).graph
    assert from_json(to_json(graph)) == graph
    assert to_json(from_json(to_json(graph))) == to_json(graph)


@pytest.mark.parametrize(
    "value",
    [
        *(math.inf, -math.inf, -0.0, 1.0, 1, True, None, 2**63 - 1, "text", 1e-320),
        *((1, [2, (3,)]), [], (), {"a": (1,), "r": 2}, slice(1, None, Ref("x")), 1 + 2j),
        *(torch.float32, torch.strided, torch.channels_last, torch.device("cpu")),
        *(torch.device("cuda", 1), Ref("x"), [Ref("x"), None], Spec((0, 2), torch.bool)),
    ],
    ids=str,
)
def test_every_kind_of_argument_comes_back(value: Any) -> None:
    graph = graph_of(
        Node("y", "aten.relu.default", (value,), {"k": value}, source="a.py:1: \u2028")
    )
    found = from_json(to_json(graph)).nodes[1].args[0]
    assert type(found) is type(value)
    assert repr(found) == repr(value)


def test_nan_comes_back() -> None:
    graph = graph_of(Node("y", "aten.relu.default", (math.nan,)))
    assert math.isnan(from_json(to_json(graph)).nodes[1].args[0])


def test_an_argument_that_is_an_object_is_not_written() -> None:
    with pytest.raises(FormatError, match="a object"):
        to_json(graph_of(Node("y", "aten.relu.default", (object(),))))


def test_the_allow_list_names_operators_that_exist() -> None:
    assert [name for name in ALLOWED if not hasattr(torch.ops.aten, name)] == []


@pytest.mark.parametrize(
    "op",
    [
        *("aten.from_file.default", "aten.save.default", "aten.set_.source_Storage"),
        *("aten.resize_.default", "aten.as_strided.default", "aten.manual_seed.default"),
        *("aten.conv2d.nonsense", "aten.__class__.x", "os.system", "operator.call", "aten"),
        *("builtins.eval.default", "aten.add.out", "aten.add.t", "aten.empty.memory_format"),
        *("aten._embedding_bag.default", "aten.embedding_dense_backward.default", "", "..", "a.b."),
    ],
)
def test_operators_off_the_list_are_refused(op: str) -> None:
    with pytest.raises(FormatError):
        check_operator(op)
    with pytest.raises(FormatError):
        from_json(edited(lambda data: data["nodes"][1].__setitem__(1, op)))


@pytest.mark.parametrize(
    "change",
    {
        "no nodes": lambda d: d.update(nodes=[]),
        "nodes no list": lambda d: d.update(nodes={"a": 1}),
        "other keys": lambda d: d.update(more=1),
        "short node": lambda d: d["nodes"][1].pop(),
        "name repeats": lambda d: d["nodes"][1].__setitem__(0, "x"),
        "empty name": lambda d: d["nodes"][1].__setitem__(0, ""),
        "name no text": lambda d: d["nodes"][1].__setitem__(0, 7),
        "reads itself": lambda d: d["nodes"][1].__setitem__(2, [{"r": 0}]),
        "reads ahead": lambda d: d["nodes"][1].__setitem__(2, [{"r": -1}]),
        "reads before the start": lambda d: d["nodes"][1].__setitem__(2, [{"r": 2}]),
        "reference no integer": lambda d: d["nodes"][1].__setitem__(2, [{"r": True}]),
        "unknown tag": lambda d: d["nodes"][1].__setitem__(2, [{"q": 1}]),
        "two tags": lambda d: d["nodes"][1].__setitem__(2, [{"r": 1, "d": "float32"}]),
        "no dtype": lambda d: d["nodes"][1].__setitem__(2, [{"d": "load"}]),
        "dtype path": lambda d: d["nodes"][1].__setitem__(2, [{"d": "nn.Linear"}]),
        "no device": lambda d: d["nodes"][1].__setitem__(2, [{"v": "abc"}]),
        "no float": lambda d: d["nodes"][1].__setitem__(2, [{"f": "1e9"}]),
        "float list": lambda d: d["nodes"][1].__setitem__(2, [{"f": []}]),
        "complex": lambda d: d["nodes"][1].__setitem__(2, [{"c": [1, "a"]}]),
        "slice": lambda d: d["nodes"][1].__setitem__(2, [{"s": [1]}]),
        "big integer": lambda d: d["nodes"][1].__setitem__(2, [2**70]),
        "negative size": lambda d: d["nodes"][1].__setitem__(4, {"x": [[-1], "float32"]}),
        "value a text": lambda d: d["nodes"][1].__setitem__(4, "float32"),
        "output twice": lambda d: d["nodes"].insert(1, ["o", "output", [[]], {}, None, "", ""]),
        "output missing": lambda d: d["nodes"].pop(),
        "output no list": lambda d: d["nodes"][2].__setitem__(2, [1]),
        "outputs too many": lambda d: d["nodes"][2].__setitem__(2, [[{"r": 1}, {"r": 1}]]),
        "input has arguments": lambda d: d["nodes"][0].__setitem__(2, [1]),
        "input missing": lambda d: d["nodes"][0].__setitem__(1, "tensor"),
        "tensor path": lambda d: d["nodes"].insert(0, ["t", "tensor", ["a..b"], {}, None, "", ""]),
        "dunder": lambda d: d["nodes"].insert(0, ["t", "tensor", ["__x.y"], {}, None, "", ""]),
        "text to an operator": lambda d: (
            d["nodes"][1].__setitem__(1, "operator.mod"),
            d["nodes"][1].__setitem__(2, ["%9999999d", 1]),
        ),
        "specs swapped": lambda d: d.update(in_spec="[1, 2]"),
        "spec no text": lambda d: d.update(out_spec=[1]),
    }.items(),
    ids=lambda item: item[0],
)
def test_unsound_graphs_are_refused(change: tuple[str, Any]) -> None:
    with pytest.raises(FormatError):
        from_json(edited(change[1]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"nodes":NaN}',
        "1" * 10_000,
        '{"nodes":1e999}',
        "\ud800",
    ],
    ids=lambda text: text[:10].encode("ascii", "replace").decode(),
)
def test_text_that_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        from_json(text)


def test_arguments_may_not_nest_without_end() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH + 2):
        deep = [deep]
    with pytest.raises(FormatError, match="nest"):
        from_json(edited(lambda data: data["nodes"][1].__setitem__(2, [deep])))


def spec(kind: Any, context: Any, *children: Any) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": list(children)}])


def test_structures_of_plain_containers_pass() -> None:
    tree = ((1, [2, None]), {"a": (3,), "b": collections.OrderedDict(c=4)})
    found = pytree.tree_flatten(tree)[1]
    assert check_structure(pytree.treespec_dumps(found)) == found.num_leaves


def test_types_that_this_process_registered_pass() -> None:
    point = collections.namedtuple("point", "x y")
    pytree._register_namedtuple(point, serialized_type_name="tests.point")
    assert check_structure(pytree.treespec_dumps(pytree.tree_flatten(point(1, 2))[1])) == 2


@pytest.mark.parametrize(
    "text",
    [
        spec("builtins.tuple", '[{"__enum__": true, "fqn": "antigravity:x", "name": "y"}]'),
        spec("builtins.dict", '[{"__enum__": true, "fqn": "antigravity:x", "name": "y"}]', LEAF),
        spec("torch.Size", '{"\\u005f_enum__": true, "fqn": "antigravity:x", "name": "y"}'),
        spec(
            "collections.defaultdict",
            {"default_factory_module": "antigravity", "default_factory_name": "x"}
            | {"dict_context": []},
        ),
        spec("collections.namedtuple", "os.system"),
        spec("collections.namedtuple", "builtins.dict"),
        spec("collections.namedtuple", []),
        spec("NO_SERIALIZED_TYPE_NAME_FOUND", "null"),
        spec("os.system", "null"),
        spec("builtins.dict", '["a", "a"]', LEAF, LEAF),
        spec("builtins.dict", '["a"]'),
        spec("builtins.dict", "5"),
        spec("builtins.dict", None),
        spec(7, "null"),
        "[2, {}]",
        "[1, 2]",
        "[1]",
        "5",
        '[1, {"type": null}]',
        '[1, {"type": "builtins.tuple", "context": "null", "children_spec": 5}]',
    ],
)
def test_structures_that_name_code_or_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        check_structure(text)


def test_structures_may_not_nest_without_end() -> None:
    deep: Any = LEAF
    for _ in range(MAX_DEPTH + 2):
        deep = {"type": "builtins.list", "context": "null", "children_spec": [deep]}
    with pytest.raises(FormatError, match="nest"):
        check_structure(json.dumps([1, deep]))


def test_a_graph_with_an_unsound_order_is_not_written() -> None:
    graph = graph_of(Node("y", "aten.relu.default", (Ref("x"),)))
    nodes = (graph.nodes[1], graph.nodes[0], graph.nodes[2])
    with pytest.raises(FormatError, match="not computed before"):
        to_json(replace(graph, nodes=nodes))
