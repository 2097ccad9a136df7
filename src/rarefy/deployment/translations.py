"""Operators that PyTorch's exporter does not know, written as operators that ONNX has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.export import ExportedProgram


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


TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    "transformers.grouped_mm_fallback.default": _grouped_product,
}
"""Name of an operator -> what writes it with onnxscript, called with its arguments."""


def translations(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """Those that a program needs, by operator, as ``torch.onnx.export`` takes them."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return {t: TRANSLATIONS[str(t)] for t in targets if str(t) in TRANSLATIONS}
