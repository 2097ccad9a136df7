"""Operators that PyTorch's exporter does not know, written as operators that ONNX has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def _any_rank(calls: Sequence[Node]) -> bool:
    """Whether the exporter refuses the rank of some attention, and all have a form known here."""
    values = [node.args[0].meta["val"] for node in calls]  # type: ignore[union-attr]
    return any(query.ndim != 4 for query in values) and all(map(_is_plain, calls))


def _is_plain(node: Node) -> bool:
    """Whether attention is neither causal nor of grouped queries, and its mask is added."""
    given: Any = (*node.args, *[None] * 6)
    mask: Any = node.kwargs.get("attn_mask", given[3])
    causal = node.kwargs.get("is_causal", given[5]) or node.kwargs.get("enable_gqa")
    added = mask is None or mask.meta["val"].is_floating_point()
    return added and not causal and given[0].meta["val"].dtype == torch.float32


_NEEDED: Mapping[str, Callable[[Sequence[Node]], bool]] = {
    "aten.scaled_dot_product_attention.default": _any_rank,
}
"""Operators that the exporter knows in part -> whether its calls need a translation."""


def translations(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """Those that a program needs, by operator, as ``torch.onnx.export`` takes them.

    An operator that the exporter knows in part is translated only where that does not suffice.
    """
    calls: dict[Any, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) in TRANSLATIONS:
            calls.setdefault(node.target, []).append(node)
    return {
        target: TRANSLATIONS[str(target)]
        for target, found in calls.items()
        if _NEEDED.get(str(target), bool)(found)
    }
