"""Operators that PyTorch's exporter does not know, written as operators that ONNX has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node


def _grouped_product(rows: Any, weight: Any, ends: Any) -> Any:
    """Rows (S, I), sorted by expert, times the weight (E, I, O) of their expert -> (S, O).

    ``ends`` (E,) says where the rows of each expert end.
    """
    from onnxscript import opset18

    op: Any = opset18
    int64 = 7  # of onnx.TensorProto.DataType
    ends, start, products = op.Cast(ends, to=int64), op.Constant(value_ints=[0]), []
    for expert in range(weight.shape[0]):
        first, last = op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1])
        end = op.Slice(ends, first, last)
        own = op.Slice(rows, start, end, op.Constant(value_ints=[0]))
        matrix = op.Gather(weight, op.Constant(value_int=expert), axis=0)
        products.append(op.MatMul(own, matrix))
        start = end
    return op.Concat(*products, axis=0)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention (..., L, E), (..., S, E), (..., S, V) -> (..., L, V) of any rank, not causal."""
    from onnxscript import opset18

    op: Any = opset18
    rank = len(key.shape)
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    size = query.shape[-1]
    factor = op.Constant(value_float=float(size**-0.5 if scale is None else scale))
    scores = op.MatMul(op.Mul(query, factor), turned)
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    "transformers.grouped_mm_fallback.default": _grouped_product,
    "aten.scaled_dot_product_attention.default": _attention,
}
"""Name of an operator -> what writes it with onnxscript, called with its arguments."""


def _is_plain(node: Node) -> bool:
    """Whether attention has a rank that the exporter refuses, and a form that is known here."""
    given: Any = (*node.args, *[None] * 6)
    query = given[0].meta["val"]
    causal = node.kwargs.get("is_causal", given[5])
    mask: Any = node.kwargs.get("attn_mask", given[3])
    real = mask is None or mask.meta["val"].is_floating_point()
    single = query.dtype == torch.float32
    return query.ndim != 4 and real and single and not causal and not node.kwargs.get("enable_gqa")


_NEEDED: Mapping[str, Callable[[Node], bool]] = {
    "aten.scaled_dot_product_attention.default": _is_plain,
}
"""Operators that the exporter knows in part -> whether a call is one that it does not."""


def translations(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """Those that a program needs, by operator, as ``torch.onnx.export`` takes them.

    An operator that the exporter knows in part is translated only where it knows none of its calls.
    """
    calls: dict[Any, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) in TRANSLATIONS:
            calls.setdefault(node.target, []).append(node)
    return {
        target: TRANSLATIONS[str(target)]
        for target, found in calls.items()
        if all(map(_NEEDED.get(str(target), lambda _: True), found))
    }
