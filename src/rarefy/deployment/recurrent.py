"""LSTMs whose weights are integers, as the operator of onnxruntime that computes with integers.

``DynamicQuantizeLSTM`` (domain ``com.microsoft``) rounds inputs and hidden states to 8 bits at each
call, in the ranges that they have. With a DequantizeLinear in front of an LSTM instead, onnxruntime
would make floats of the weights at each call, which is slower than floats in the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rarefy.deployment.rewrite import Array, add_constant, constant, drop_unread, strip

DOMAIN = "com.microsoft"
"""Of operators that onnxruntime adds to ONNX."""


def integer_lstms(model: Any) -> None:
    """Let LSTMs of an ``onnx_ir.Model`` compute with the integers that their weights are made of.

    Changed in place; LSTMs with weights in float stay as they are.
    """
    found = [node for node in model.graph if node.op_type == "LSTM" and not node.domain]
    changed = [_as_integers(model, node) for node in found]
    if any(changed):
        model.opset_imports[DOMAIN] = 1
        drop_unread(model)
        strip(model)


def _as_integers(model: Any, node: Any) -> bool:
    """Put the operator on integers in the place of an LSTM, if both its weights are integers."""
    import onnx_ir as ir

    weights = [found for found in map(_rows, node.inputs[1:3]) if found is not None]
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if len(weights) < 2 or options.pop("layout", 0):
        return False
    quantized: list[Any] = []
    for value, (codes, scales) in zip(node.inputs[1:3], weights, strict=True):
        turned = np.ascontiguousarray(codes.transpose(0, 2, 1))  # (directions, inputs, gates)
        parts = {"codes": turned, "scale": scales, "zero_point": np.zeros(scales.shape, np.int8)}
        quantized.append([add_constant(model, f"{value.name}_{k}", v) for k, v in parts.items()])
    (w, *w_grid), (r, *r_grid) = quantized
    others = [*node.inputs[3:], *[None] * (8 - len(node.inputs))]
    made = ir.node(
        "DynamicQuantizeLSTM",
        inputs=[node.inputs[0], w, r, *others, *w_grid, *r_grid],
        attributes=options,
        num_outputs=len(node.outputs),
        domain=DOMAIN,
    )
    model.graph.insert_before(node, made)
    made.name = f"integer_{node.name}"
    for old, new in zip(node.outputs, made.outputs, strict=True):
        name, is_output, new.shape, new.type = old.name, old.is_graph_output(), old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if is_output:
            old.name, new.name = f"{name}_replaced", name
    model.graph.remove(node, safe=True)
    return True


def _rows(value: Any) -> tuple[Array, Array] | None:
    """Integers (directions, gates, inputs) and scales (directions, gates) of a weight, or None."""
    found = _moved(value)
    if found is None or found[0].ndim != 3 or found[0].dtype != np.int8:
        return None
    codes, scales = found
    if not np.array_equal(scales, np.broadcast_to(scales[..., :1], scales.shape)):
        return None
    return codes, np.ascontiguousarray(scales[..., 0])


def _moved(value: Any) -> tuple[Array, Array] | None:
    """Integers and scales, each of a value's shape, that are only cut and joined on their way."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return _dequantized(node)
    if node.op_type == "Concat":
        axis = int(node.attributes["axis"].value)
        parts = [part for part in map(_moved, node.inputs) if part is not None]
        if len(parts) < len(node.inputs):
            return None
        return np.concatenate([q for q, _ in parts], axis), np.concatenate(
            [s for _, s in parts], axis
        )
    found = _moved(node.inputs[0]) if node.op_type in ("Slice", "Unsqueeze") else None
    numbers = [given for given in map(_numbers, node.inputs[1:]) if given is not None]
    if found is None or len(numbers) < len(node.inputs) - 1:
        return None
    codes, scales = found
    if node.op_type == "Unsqueeze":
        return np.expand_dims(codes, numbers[0]), np.expand_dims(scales, numbers[0])
    starts, ends, *rest = numbers
    axes = rest[0] if rest else tuple(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else (1,) * len(axes)
    index = [slice(None)] * codes.ndim
    for place, axis in enumerate(axes):
        index[axis] = slice(starts[place], ends[place], steps[place])
    return codes[tuple(index)], scales[tuple(index)]


def _dequantized(node: Any) -> tuple[Array, Array] | None:
    """Integers and scales of a DequantizeLinear of constants around 0."""
    codes, scale, *zero = (constant(value) for value in node.inputs)
    if codes is None or scale is None or any(z is None or z.any() for z in zero):
        return None
    axis = int(node.attributes["axis"].value) if "axis" in node.attributes else 1
    shape = [1] * codes.ndim
    if scale.ndim:
        shape[axis] = -1
    return codes, np.broadcast_to(scale.reshape(shape), codes.shape)


def _numbers(value: Any) -> tuple[int, ...] | None:
    """The whole numbers of an initializer or a Constant."""
    if value is None or value.const_value is None:
        return None
    return tuple(int(number) for number in np.asarray(value.const_value.numpy()).flatten())
