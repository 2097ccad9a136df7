"""Rewrites of an exported ONNX graph: what is constant is stored as the integers it stands for.

All functions change an ``onnx_ir.Model`` in place. They keep what the graph computes, up to the
rounding of biases to 32-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

SHIFT = 1e-30
"""What a BatchNorm adds that adds nothing: below every rounding of the sums that it is in."""


def rewrite(model: Any) -> None:
    """Apply all rewrites, in order."""
    fold_casts(model)
    fold_weights(model)
    fold_transposes(model)
    dynamic_products(model)
    merge_repeated(model)
    global_pools(model)
    integer_biases(model)
    norms_that_shift(model)
    strip(model)


def constant(value: Any) -> Array | None:
    """The array of an initializer, or None for a computed value."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return np.asarray(value.const_value.numpy())


def fold_casts(model: Any) -> None:
    """Store constants in the type that they are cast to, where it is no larger: the exporter leaves
    the Casts of large ones, such as the zero points of a layer with thousands of outputs."""
    import onnx_ir as ir

    for node in nodes(model, "Cast"):
        array = constant(node.inputs[0])
        if array is None:
            continue
        cast = array.astype(ir.DataType(int(number(node, "to", 1))).numpy())
        if cast.itemsize <= array.itemsize:
            replace(model, node, add_constant(model, f"{node.inputs[0].name}_cast", cast))


def fold_weights(model: Any) -> None:
    """Store constants behind a QuantizeLinear as its integers."""
    for node in nodes(model, "QuantizeLinear"):
        arrays = [constant(value) for value in node.inputs]
        if len(arrays) < 3 or any(array is None for array in arrays):
            continue
        x, scale, zero_point = (np.asarray(array) for array in arrays)
        axis = int(number(node, "axis", 1))
        shape = [1] * x.ndim
        if scale.ndim:
            shape[axis] = -1
        limits = np.iinfo(zero_point.dtype)
        q = np.rint(x / scale.reshape(shape)) + zero_point.reshape(shape).astype(np.float64)
        q = q.clip(limits.min, limits.max).astype(zero_point.dtype)
        replace(model, node, add_constant(model, f"{node.inputs[0].name}_quantized", q))


def fold_transposes(model: Any) -> None:
    """Store a transposed matrix of integers instead of transposing it at every call."""
    for node in nodes(model, "Transpose"):
        source = node.inputs[0].producer()
        perm = node.attributes.get("perm")
        if source is None or source.op_type != "DequantizeLinear" or perm is None:
            continue
        q, scale = constant(source.inputs[0]), constant(source.inputs[1])
        if q is None or scale is None or q.ndim != 2 or list(perm.as_ints()) != [1, 0]:
            continue
        name = f"{source.inputs[0].name}_transposed"
        transposed = add_constant(model, name, np.ascontiguousarray(q.T))
        axis = 1 - int(number(source, "axis", 1))
        inputs = [transposed, *source.inputs[1:]]
        replace(model, node, insert(model, node, "DequantizeLinear", inputs, {"axis": axis}))


def dynamic_products(model: Any) -> None:
    """Products of an activation whose range is found in the graph, as products of integers.

    DynamicQuantizeLinear makes the integers, MatMulInteger multiplies them, and one product with
    both scales makes real numbers of the sums.
    """
    made: dict[str, Any] = {}
    for node in [*nodes(model, "MatMul"), *nodes(model, "Gemm")]:
        x, weight = _ranged(node.inputs[0]), _matrix(node)
        if x is None or weight is None:
            continue
        if x.name not in made:
            before = _first_reader(model, x)
            made[x.name] = _insert_all(model, before, "DynamicQuantizeLinear", [x], 3)
        q, scale, zero_point = made[x.name]
        name = node.inputs[1].producer().inputs[0].name
        integers = add_constant(model, f"{name}_matrix", weight[0])
        steps = add_constant(model, f"{name}_steps", weight[1])
        sums = insert(model, node, "MatMulInteger", [q, integers, zero_point], {})
        real = insert(model, node, "Cast", [sums], {"to": 1})
        unit = insert(model, node, "Mul", [scale, steps], {})
        result = insert(model, node, "Mul", [real, unit], {})
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            result = insert(model, node, "Add", [result, node.inputs[2]], {})
        replace(model, node, result)
    if made:
        drop_unread(model)


def _ranged(value: Any) -> Any:
    """What is quantized to the range that it has at each call, or None."""
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        node = None if value is None else value.producer()
        if node is None or node.op_type != op_type:
            return None
        value, quantize = node.inputs[0], node
    x, scale = quantize.inputs[:2]
    return x if constant(scale) is None and _is_range(scale, x) else None


_RANGE_OPS = frozenset(
    "ReduceMin ReduceMax Min Max Clip Sub Div Cast Identity Reshape Squeeze Constant".split()
)


def _is_range(scale: Any, x: Any) -> bool:
    """Whether a scale is computed from the extremes of ``x`` alone, for 255 steps."""
    waiting, seen, by_levels = [scale], set(), False
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value is x or constant(value) is not None:
            continue
        if node is None or node.op_type not in _RANGE_OPS:
            return False
        seen.add(node.op_type)
        if node.op_type == "Div":
            divisor = _number_of(node.inputs[1])
            by_levels = by_levels or divisor == 255
        waiting += [v for v in node.inputs if v is not None]
    return by_levels and {"ReduceMin", "ReduceMax"} <= seen


def _number_of(value: Any) -> float | None:
    """The one number that a value holds, given as an initializer or by a Constant."""
    array = constant(value)
    if array is None and value.const_value is not None:
        array = np.asarray(value.const_value.numpy())
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _matrix(node: Any) -> tuple[Array, Array] | None:
    """Integers (inputs, outputs) and scales (outputs,) of a product's weight, or None."""
    source = None if node.inputs[1] is None else node.inputs[1].producer()
    if source is None or source.op_type != "DequantizeLinear":
        return None
    q, scale = constant(source.inputs[0]), constant(source.inputs[1])
    if q is None or scale is None or q.ndim != 2 or scale.ndim != 1 or q.dtype != np.int8:
        return None
    transposed = bool(number(node, "transB", 0))
    plain = all(number(node, name, 1) == 1 for name in ("alpha", "beta"))
    if not plain or number(node, "transA", 0):
        return None
    if int(number(source, "axis", 1)) % 2 != int(not transposed):
        return None
    return np.ascontiguousarray(q.T if transposed else q), scale


def _first_reader(model: Any, value: Any) -> Any:
    readers = {use.node for use in value.uses()}
    return next(node for node in model.graph if node in readers)


def drop_unread(model: Any) -> None:
    """Remove nodes whose results nothing reads."""
    for node in reversed(list(model.graph)):
        if not any(map(_is_read, node.outputs)):
            model.graph.remove(node, safe=True)


def merge_repeated(model: Any) -> None:
    """Remove a QuantizeLinear that quantizes what a DequantizeLinear with its numbers made."""
    for node in nodes(model, "QuantizeLinear"):
        source = node.inputs[0].producer()
        if source is None or source.op_type != "DequantizeLinear":
            continue
        ours, theirs = ([constant(v) for v in n.inputs[1:]] for n in (node, source))
        if len(ours) == len(theirs) and all(map(_same, ours, theirs)):
            replace(model, node, source.inputs[0])


def _same(a: Array | None, b: Array | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)


def global_pools(model: Any) -> None:
    """Means over all positions as GlobalAveragePool, which has an integer kernel."""
    for node in nodes(model, "ReduceMean"):
        x = node.inputs[0]
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or x.shape is None or len(x.shape) < 3:
            continue
        rank = len(x.shape)
        if sorted(int(a) % rank for a in axes.flatten()) != list(range(2, rank)):
            continue
        pooled = insert(model, node, "GlobalAveragePool", [x], {})
        if not number(node, "keepdims", 1):
            for grid in _quantizer_behind(node):
                q = insert(model, node, "QuantizeLinear", [pooled, *grid], {})
                pooled = insert(model, node, "DequantizeLinear", [q, *grid], {})
            pooled = insert(model, node, "Flatten", [pooled], {"axis": 1})
        replace(model, node, pooled)


def _quantizer_behind(node: Any) -> list[list[Any]]:
    """Scale and zero point of the QuantizeLinear that alone reads a node's result, or nothing."""
    readers = [use.node for use in node.outputs[0].uses()]
    return [list(r.inputs[1:]) for r in readers if r.op_type == "QuantizeLinear"][
        : 2 - len(readers)
    ]


def integer_biases(model: Any) -> None:
    """Biases of quantized layers as int32 in units of input scale times weight scale."""
    for node in [*nodes(model, "Conv"), *nodes(model, "Gemm")]:
        if len(node.inputs) < 3 or number(node, "alpha", 1) != 1:
            continue
        bias = constant(node.inputs[2])
        scales = [_scale(value) for value in node.inputs[:2]]
        if bias is None or scales[0] is None or scales[1] is None or scales[0].ndim:
            continue
        unit = np.asarray(scales[0] * scales[1], dtype=np.float32)
        limits = np.iinfo(np.int32)
        q = np.rint(bias.astype(np.float64) / unit).clip(limits.min, limits.max).astype(np.int32)
        name = f"{node.inputs[2].name}_{node.name}"
        inputs = [add_constant(model, f"{name}_quantized", q)]
        inputs.append(add_constant(model, f"{name}_scale", np.broadcast_to(unit, q.shape).copy()))
        dequantized = insert(model, node, "DequantizeLinear", inputs, {"axis": 0})
        node.replace_input_with(2, dequantized)


def norms_that_shift(model: Any) -> None:
    """Let every BatchNorm add something, if only the smallest number, in its first channel.

    Behind a join of values with different zero points, OpenVINO 2026.4 drops an addition of zeros
    and then cuts off at other zero points than those of the values: 8 % of the outputs of a
    DenseNet whose BatchNorms were not trained.
    """
    for node in nodes(model, "BatchNormalization"):
        bias, mean = (constant(node.inputs[i]) for i in (2, 3))
        if bias is None or mean is None or bias.any() or mean.any():
            continue
        shift = bias.copy()
        shift[:1] = SHIFT
        name = f"{node.inputs[2].name}_{node.name}_shift"
        node.replace_input_with(2, add_constant(model, name, shift))


def strip(model: Any) -> None:
    """Drop unused constants and everything that only describes where the graph came from."""
    drop_unused(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def drop_unused(model: Any) -> None:
    """Drop constants that nothing reads, in loops and branches neither."""
    for name, value in list(model.graph.initializers.items()):
        if not _is_read(value):
            del model.graph.initializers[name]


def add_constant(model: Any, name: str, array: Array) -> Any:
    """An initializer with these values: an equal one that the graph has already, or a new one."""
    import onnx_ir as ir

    held = model.graph.initializers
    if name in held:
        if _same(constant(held[name]), array):
            return held[name]
        name = f"{name}_{len(held)}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def _scale(value: Any) -> Array | None:
    """The constant scale of the DequantizeLinear that makes a value."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return constant(node.inputs[1])


def nodes(model: Any, op_type: str) -> Iterator[Any]:
    yield from [node for node in model.graph if node.op_type == op_type]


def number(node: Any, name: str, default: int) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def insert(
    model: Any, before: Any, op_type: str, inputs: list[Any], attributes: dict[str, Any]
) -> Any:
    """The result of a new node in front of another."""
    return _insert_all(model, before, op_type, inputs, 1, attributes)[0]


def _insert_all(
    model: Any,
    before: Any,
    op_type: str,
    inputs: list[Any],
    count: int,
    attributes: dict[str, Any] | None = None,
) -> list[Any]:
    """The results of a new node in front of another."""
    import onnx_ir as ir

    made = ir.node(op_type, inputs=inputs, attributes=attributes or {}, num_outputs=count)
    model.graph.insert_before(before, made)
    made.name = f"{op_type}_{made.outputs[0].name}"
    return list(made.outputs)


def replace(model: Any, node: Any, value: Any) -> None:
    """Let all readers of a node's result read ``value``, and drop the node."""
    result = node.outputs[0]
    name, is_output = result.name, result.is_graph_output()
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    if is_output:
        result.name, value.name = f"{name}_replaced", name
    source = [v.producer() for v in node.inputs if v is not None]
    model.graph.remove(node, safe=True)
    for producer in source:
        if producer is not None and not any(map(_is_read, producer.outputs)):
            model.graph.remove(producer, safe=True)


def _is_read(value: Any) -> bool:
    return bool(value.uses()) or value.is_graph_output()
