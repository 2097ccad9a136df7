"""A :class:`~rarefy.graph.program.Graph` as JSON, and back with everything checked.

The text is ``{"nodes": [...], "in_spec": ..., "out_spec": ...}``. A node is the list ``[name, op,
args, kwargs, value, scope, source]``. Numbers, strings, booleans, null and lists stand for
themselves; any other value is an object with one key:

    {"r": 1}              the value of the node that many places before
    {"t": [...]}          a tuple
    {"k": {...}}          a mapping with string keys
    {"s": [a, b, c]}      a slice
    {"f": "inf"}          a float that is not finite: "inf", "-inf" or "nan"
    {"c": [1.0, 0.5]}     a complex number
    {"d": "float32"}      a dtype of torch; likewise "l" a layout and "m" a memory format
    {"v": "cpu"}          a device
    {"x": [[2, 3], "float32"]}   shape and dtype of a tensor

Nothing read back is executed: operators come from an allow-list, and the pytree structures may
only name types that are registered already.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from rarefy.errors import FormatError
from rarefy.graph.allowed import check_operator
from rarefy.graph.declarations import SCALAR_OPS
from rarefy.graph.program import Graph, Node, Ref, Spec

MAX_DEPTH = 32
"""How deep arguments and pytree structures may nest."""

MAX_NAME = 512
"""Longest name, path or type name."""


def to_json(graph: Graph) -> str:
    """Write a graph as JSON; equal graphs give equal text.

    Raises:
        FormatError: the graph holds a value, an operator or a structure that a file may not hold.

    Example:
        >>> from_json(to_json(graph)) == graph  # doctest: +SKIP
        True
    """
    check(graph)
    places = {node.name: place for place, node in enumerate(graph.nodes)}
    nodes = [_encode_node(node, places) for node in graph.nodes]
    data = {"nodes": nodes, "in_spec": graph.in_spec, "out_spec": graph.out_spec}
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> Graph:
    """Read a graph and check all of it.

    Args:
        text: what :func:`to_json` wrote.

    Raises:
        FormatError: the text is not such a graph, or asks for something that is not allowed.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(data, dict) or data.keys() != {"nodes", "in_spec", "out_spec"}:
            _fail("graph", "its keys are not nodes, in_spec and out_spec")
        nodes: list[Node] = []
        for fields in _typed(list, data["nodes"], "nodes"):
            nodes.append(_decode_node(fields, nodes))
        specs = (_typed(str, data[key], key) for key in ("in_spec", "out_spec"))
        graph = Graph(tuple(nodes), *specs)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        _fail("graph", f"it is not JSON of a graph ({type(error).__name__})")
    check(graph)
    return graph


def _fail(where: str, what: str) -> NoReturn:
    raise FormatError(
        where, what, "The file is damaged or was not written by rarefy; get it again or save anew"
    )


def _refuse_constant(name: str) -> NoReturn:
    _fail("graph", f"it holds the bare number {name}")


def _typed(kind: type | tuple[type, ...], value: Any, what: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        _fail(f"graph {what}", f"it is a {type(value).__name__}, not a {kind}")
    return value


# --- nodes -------------------------------------------------------------------------------------


def _encode_node(node: Node, places: Mapping[str, int]) -> list[Any]:
    def encode(value: Any) -> Any:
        return _encode(value, lambda ref: places[node.name] - places[ref.name], node.name)

    args = [encode(arg) for arg in node.args]
    kwargs = None if node.kwargs is None else {k: encode(v) for k, v in node.kwargs.items()}
    return [node.name, node.op, args, kwargs, encode(node.value), node.scope, node.source]


def _decode_node(fields: Any, before: list[Node]) -> Node:
    if len(_typed(list, fields, "node")) != 7:
        _fail("graph node", f"it has {len(fields)} fields, not 7")
    name, op, args, kwargs, value, scope, source = fields
    for text in (name, op, scope, source):
        _typed(str, text, "node")

    def decode(item: Any) -> Any:
        return _decode(item, before, 0)

    decoded = None
    if kwargs is not None:
        decoded = {k: decode(v) for k, v in _typed(dict, kwargs, "kwargs").items()}
    arguments = tuple(decode(arg) for arg in _typed(list, args, "args"))
    return Node(name, op, arguments, decoded, _value(decode(value), op), scope, source)


def _value(value: Any, op: str) -> Any:
    """A node's value holds specs and numbers only, that of an argument may be text."""
    if isinstance(value, tuple):
        return tuple(_value(item, op) for item in value)
    if isinstance(value, str) and op == "input":
        return value
    return _typed((Spec, int, float, type(None)), value, "value")


# --- values ------------------------------------------------------------------------------------


def _torch_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

_ENCODERS: Mapping[type, Callable[[Any], Any]] = {
    complex: lambda value: {"c": [value.real, value.imag]},
    torch.dtype: lambda value: {"d": _torch_name(value)},
    torch.layout: lambda value: {"l": _torch_name(value)},
    torch.memory_format: lambda value: {"m": _torch_name(value)},
    torch.device: lambda value: {"v": str(value)},
    Spec: lambda value: {"x": [list(value.shape), _torch_name(value.dtype)]},
}


def _encode(value: Any, distance: Callable[[Ref], int], where: str) -> Any:
    def inner(item: Any) -> Any:
        return _encode(item, distance, where)

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"f": str(value)}
    if isinstance(value, Ref):
        return {"r": distance(value)}
    if isinstance(value, list):
        return [inner(item) for item in value]
    if isinstance(value, tuple):
        return {"t": [inner(item) for item in value]}
    if isinstance(value, slice):
        return {"s": [inner(value.start), inner(value.stop), inner(value.step)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"k": {key: inner(item) for key, item in value.items()}}
    encoder = _ENCODERS.get(type(value))
    if encoder is None:
        raise FormatError(
            f"node {where}",
            f"its argument is a {type(value).__name__}, which a file cannot hold",
            "Use numbers, strings, dtypes, devices and tensors as arguments",
        )
    return encoder(value)


def _decode(value: Any, before: list[Node], depth: int) -> Any:
    if depth > MAX_DEPTH:
        _fail("graph", "arguments nest too deep")
    if isinstance(value, list):
        return [_decode(item, before, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value if not isinstance(value, int) else _integer(value)
    if len(value) != 1:
        _fail("graph", f"a value has {len(value)} keys, not 1")
    ((tag, content),) = value.items()
    if tag in _NESTED:
        kind, build = _NESTED[tag]
        _typed(kind, content, f"value {tag!r}")
        items = content.values() if isinstance(content, dict) else content
        return build(content, [_decode(item, before, depth + 1) for item in items])
    if tag == "r":
        return _ref(_typed(int, content, "reference"), before)
    if tag not in _DECODERS:
        _fail("graph", f"a value has the unknown tag {tag[:20]!r}")
    return _DECODERS[tag](content)


def _integer(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        _fail("graph", "an integer has more than 64 bits")
    return value


def _ref(distance: int, before: list[Node]) -> Ref:
    if not 1 <= distance <= len(before):
        _fail("graph", f"node {len(before)} reads the value of a node {distance} places before it")
    return Ref(before[-distance].name)


def _slice(_: Any, parts: list[Any]) -> slice:
    if len(parts) != 3:
        _fail("graph", "a slice has not three parts")
    return slice(*parts)


_NESTED: Mapping[str, tuple[type, Callable[[Any, list[Any]], Any]]] = {
    "t": (list, lambda _, items: tuple(items)),
    "k": (dict, lambda content, items: dict(zip(content, items, strict=True))),
    "s": (list, _slice),
}


def _named(kind: type) -> Callable[[Any], Any]:
    def find(name: Any) -> Any:
        text = _typed(str, name, kind.__name__)
        found = getattr(torch, text, None) if re.fullmatch(r"[a-z_0-9]+", text) else None
        if not isinstance(found, kind):
            _fail("graph", f"torch has no {kind.__name__} named {text[:40]!r}")
        return found

    return find


def _non_finite(name: Any) -> float:
    if not isinstance(name, str) or name not in _NON_FINITE:
        _fail("graph", "a float is neither inf, -inf nor nan")
    return _NON_FINITE[name]


def _complex(parts: Any) -> complex:
    if len(_typed(list, parts, "complex number")) != 2:
        _fail("graph", "a complex number has not two parts")
    real, imaginary = (_typed((int, float), part, "complex number") for part in parts)
    return complex(real, imaginary)


def _device(name: Any) -> torch.device:
    if not re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", _typed(str, name, "device")):
        _fail("graph", "a device has no valid name")
    try:
        return torch.device(name)
    except RuntimeError:
        _fail("graph", f"torch has no device {name!r}")


def _spec(content: Any) -> Spec:
    if len(_typed(list, content, "shape and dtype")) != 2:
        _fail("graph", "a tensor's value is not a shape and a dtype")
    sizes, dtype = _typed(list, content[0], "shape"), _named(torch.dtype)(content[1])
    for size in sizes:
        if not 0 <= _typed(int, size, "shape") < 2**48:
            _fail("graph", f"a tensor's value has a dimension of {size}")
    return Spec(tuple(sizes), dtype)


_DECODERS: Mapping[str, Callable[[Any], Any]] = {
    "f": _non_finite,
    "c": _complex,
    "d": _named(torch.dtype),
    "l": _named(torch.layout),
    "m": _named(torch.memory_format),
    "v": _device,
    "x": _spec,
}


# --- checks ------------------------------------------------------------------------------------


def check(graph: Graph) -> None:
    """Pass where a graph may stand in a file.

    Raises:
        FormatError: names repeat, a value is read before it is computed, an operator is not
            allowed, the output is not last, or inputs and outputs do not fit their structures.
    """
    seen: set[str] = set()
    for place, node in enumerate(graph.nodes):
        if node.name in seen or not 0 < len(node.name) <= MAX_NAME:
            _fail("graph", f"the node name {node.name[:40]!r} repeats, is empty or too long")
        if not seen.issuperset(node.inputs):
            _fail(f"node {node.name}", "it reads a value that is not computed before it")
        if (node.op == "output") != (place == len(graph.nodes) - 1):
            _fail(f"node {node.name}", "the output is not the last node")
        _SHAPES.get(node.op, _check_call)(node)
        seen.add(node.name)
    if not graph.nodes:
        _fail("graph", "it has no nodes")
    given = sum(node.op == "input" for node in graph.nodes)
    if given != check_structure(graph.in_spec):
        _fail("graph", f"its {given} inputs do not fit the structure of its arguments")
    if len(graph.output.args[0]) != check_structure(graph.out_spec):
        _fail("graph", "its outputs do not fit the structure of its result")


def _check_input(node: Node) -> None:
    if node.args or node.kwargs:
        _fail(f"node {node.name}", "an input has arguments")


def _check_tensor(node: Node) -> None:
    if len(node.args) != 1 or node.kwargs or not valid_path(node.args[0]):
        _fail(f"node {node.name}", "it names no valid path of a parameter or buffer")


def _check_output(node: Node) -> None:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], list | tuple):
        _fail(f"node {node.name}", "the output is not one list")


def _check_call(node: Node) -> None:
    check_operator(node.op)
    numbers = all(isinstance(arg, Ref | int | float) for arg in node.args)
    if node.op in SCALAR_OPS and (node.kwargs or not numbers):
        _fail(f"node {node.name}", f"{node.op} takes values and numbers only")


_SHAPES: Mapping[str, Callable[[Node], None]] = {
    "input": _check_input,
    "tensor": _check_tensor,
    "output": _check_output,
}


def valid_path(path: Any) -> bool:
    """Whether ``path`` can be that of a parameter or buffer: dotted, no empty or dunder part."""
    return (
        isinstance(path, str)
        and len(path) <= MAX_NAME
        and path.isprintable()
        and all(part and not part.startswith("__") for part in path.split("."))
    )


# --- pytree structures -------------------------------------------------------------------------

_SEQUENCES = ("builtins.tuple", "builtins.list", "torch.fx.immutable_collections.immutable_list")
_MAPPINGS = (
    "builtins.dict",
    "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_dict",
)
_REFUSED = ("collections.defaultdict", "NO_SERIALIZED_TYPE_NAME_FOUND")


def check_structure(spec: str) -> int:
    """Number of leaves of a serialized pytree structure, which is checked but not built.

    ``torch.utils._pytree.treespec_loads`` imports the module of any enum or default factory that
    the text names, which runs that module. So only plain containers, named tuples and types that
    are registered in this process pass, and none of them with a context that names a module.

    Raises:
        FormatError: the text is not such a structure.
    """
    try:
        protocol, schema = json.loads(spec)
        if protocol != 1:
            _fail("pytree structure", f"it has the unknown protocol {protocol!r:.20}")
        return _leaves(schema, 0)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        _fail("pytree structure", f"it is not what PyTorch writes ({type(error).__name__})")


def _leaves(schema: Mapping[str, Any], depth: int) -> int:
    if depth > MAX_DEPTH:
        _fail("pytree structure", "it nests too deep")
    if _typed(dict, schema, "pytree structure").keys() != {"type", "context", "children_spec"}:
        _fail("pytree structure", "a level has other keys than type, context and children_spec")
    name, context = schema["type"], schema["context"]
    children = _typed(list, schema["children_spec"], "pytree structure")
    if name is None and context is None and not children:
        return 1
    if not _fits(_typed(str, name, "pytree type"), context, len(children)):
        _fail("pytree structure", f"{name[:80]!r} with {len(children)} parts is not allowed here")
    return sum(_leaves(child, depth + 1) for child in children)


def _fits(name: str, context: Any, parts: int) -> bool:
    if name in _SEQUENCES:
        return bool(context == "null")
    if name in _MAPPINGS:
        keys = json.loads(context)
        plain = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
        return plain and len(set(keys)) == len(keys) == parts
    if name == "collections.namedtuple":
        kind = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(context)
        fields = getattr(kind, "_fields", ())
        return isinstance(kind, type) and issubclass(kind, tuple) and len(fields) == parts
    return _fits_registered(name, context)


def _fits_registered(name: str, context: Any) -> bool:
    """A type that this process registered itself, with a context of plain data."""
    kind = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    if kind is None or name in _REFUSED:
        return False
    definition = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    if definition is None or definition.from_dumpable_context is not None:
        return False
    return "__enum__" not in context and _plain(json.loads(context))


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return "__enum__" not in value and all(_plain(item) for item in value.values())
    return True
