"""Numbers of examples that OpenVINO cannot take from between a layer and its rounding.

OpenVINO (2026.4) reads a free dimension from the nearest value that has it. Where that value lies
between a layer and the QuantizeLinear behind it, the two are not computed as one any more, and the
kernel that then rounds adds the first channel's bias to all channels. A quotient of an input's
number of elements says the same, and is not traced.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from rarefy.deployment.rewrite import add_constant, insert


def counted(model: Any) -> None:
    """Replace what reads the shapes of values by counts of inputs, in a graph that rounds values.

    Args:
        model: an ``onnx_ir.Model``, changed in place. Shapes with a dimension that no input has
            alone, free beside fixed ones, are left as they are.
    """
    graph = model.graph
    readers = [node for node in graph if node.op_type == "Shape"]
    if not readers or not any(node.op_type == "QuantizeLinear" for node in graph):
        return
    sources = dict(found for value in graph.inputs if (found := _source(value)) is not None)
    first, counts = next(iter(graph)), dict[str, Any]()
    for node in readers:
        dims = _read(node)
        names = {dim for dim in dims if isinstance(dim, str)}
        if not names or not names <= sources.keys():
            continue
        for name in names - counts.keys():
            counts[name] = _count(model, first, *sources[name])
        parts = [
            counts[dim]
            if isinstance(dim, str)
            else add_constant(model, f"size_{dim}", np.array([dim], np.int64))
            for dim in dims
        ]
        joined = parts[0]
        if len(parts) > 1:
            joined = insert(model, node, "Concat", parts, {"axis": 0})
        node.outputs[0].replace_all_uses_with(joined)
        graph.remove(node, safe=True)


def _dims(shape: Any) -> list[int | str | None]:
    """Sizes as numbers, free ones by their names, others None."""
    return [
        dim if isinstance(dim, int) else dim.value if isinstance(dim.value, str) else None
        for dim in shape
    ]


def _source(value: Any) -> tuple[str, tuple[Any, int]] | None:
    """The name of an input's one free dimension; the input, and its elements for each step of it.

    None where no dimension or several are free, have no name, or the input is empty.
    """
    dims = [] if value.shape is None else _dims(value.shape)
    free = [dim for dim in dims if not isinstance(dim, int)]
    each = prod(dim for dim in dims if isinstance(dim, int))
    return (free[0], (value, each)) if len(free) == 1 and free[0] is not None and each else None


def _read(node: Any) -> list[int | str | None]:
    """The dimensions that a Shape reads; none where they are not known or its result is shown."""
    shape = node.inputs[0].shape
    if shape is None or node.outputs[0].is_graph_output():
        return []
    given = [node.attributes.get(name) for name in ("start", "end")]
    return _dims(shape)[slice(*(None if bound is None else bound.value for bound in given))]


def _count(model: Any, before: Any, source: Any, each: int) -> Any:
    """The size of an input's free dimension, shape (1,)."""
    elements = insert(model, before, "Size", [source], {})
    divisor = add_constant(model, f"{source.name}_each", np.array([each], np.int64))
    return insert(model, before, "Div", [elements, divisor], {})
