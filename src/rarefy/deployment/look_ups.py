"""Tables of integers in an ONNX graph: rows are looked up first, and only they become real numbers.

A DequantizeLinear in front of a Gather computes the whole table at every call in onnxruntime: of a
vocabulary of 30,000 words, ten times as long as the rest of a small network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rarefy.deployment.rewrite import (
    Array,
    add_constant,
    constant,
    drop_unused,
    insert,
    nodes,
    number,
    replace,
)


def look_ups(model: Any) -> None:
    """Let every Gather of rows that a DequantizeLinear makes of constants read the integers.

    Runtimes look up no integers of less than a byte, so that two of 4 bits share one, and floats,
    which every runtime computes with alike, take them apart. A table that a layer shares is stored
    once, as the layer reads it.
    Left as they are: tables of other than two dimensions, and those whose last block is shorter
    than the others, or whose blocks of 4-bit numbers have an odd length.
    """
    for node in nodes(model, "Gather"):
        table = None if number(node, "axis", 0) else _Table.of(node.inputs[0])
        if table is not None and node.inputs[1].shape is not None:
            replace(model, node, _looked_up(model, node, table))
    drop_unused(model)


@dataclass(frozen=True)
class _Table:
    """A matrix of integers of one byte.

    Attributes:
        source: the initializer.
        codes: shape (rows, columns), or (rows, blocks, columns of a block) where blocks of a row
            have scales of their own.
        scale: likewise with one column, or () where it is the same everywhere.
        zero: likewise; of the type of the codes.
        packed: whether the codes are 0 to 15.
    """

    source: Any
    codes: Array
    scale: Array
    zero: Array
    packed: bool

    @classmethod
    def of(cls, value: Any) -> _Table | None:
        """The table that a DequantizeLinear of constants makes, or None."""
        source = None if value is None else value.producer()
        if source is None or source.op_type != "DequantizeLinear":
            return None
        codes, scale = (constant(given) for given in source.inputs[:2])
        if codes is None or scale is None or codes.ndim != 2:
            return None
        zero = constant(source.inputs[2]) if len(source.inputs) > 2 else codes.dtype.type(0)
        rows, columns = codes.shape
        axis, block = int(number(source, "axis", 1)) % 2, int(number(source, "block_size", 0))
        if zero is None or scale.ndim == 2 - axis or (scale.ndim == 2 and columns % block):
            return None
        shape = (rows, scale.shape[1], -1) if scale.ndim == 2 else (rows, -1)
        packed = codes.dtype.name in ("int4", "uint4")
        if packed:
            least = -8 if codes.dtype.name == "int4" else 0
            codes, zero = (
                (held.astype(np.int32) - least).astype(np.uint8) for held in (codes, zero)
            )
        codes, scale, zero = (h.reshape(shape) if h.ndim else h for h in (codes, scale, zero))
        if packed and codes.shape[-1] % 2:
            return None
        return cls(source.inputs[0], codes, scale, zero, packed)


def _looked_up(model: Any, node: Any, table: _Table) -> Any:
    """The rows that a Gather reads, as real numbers."""
    index, zero = node.inputs[1], table.zero
    rank = len(index.shape)

    def add(op_type: str, *inputs: Any, **attributes: Any) -> Any:
        return insert(model, node, op_type, list(inputs), attributes)

    def held(suffix: str, array: Array) -> Any:
        return add_constant(model, f"{table.source.name}_{suffix}", np.ascontiguousarray(array))

    def rows(suffix: str, array: Array) -> Any:
        whole = held(suffix, array)
        return add("Gather", whole, index, axis=0) if array.ndim else whole

    if table.packed:
        both = add("Cast", rows("pairs", _paired(table.codes)), to=1)
        sixteenth = add("Mul", both, held("sixteenth", np.asarray(1 / 16, np.float32)))
        second = add("Floor", sixteenth)
        upper = add("Mul", second, held("sixteen", np.asarray(16, np.float32)))
        real = add("Concat", add("Sub", both, upper), second, axis=-1)
    else:
        turned = _turned(model, table.codes)
        if turned is not None:
            last = add("Gather", turned, index, axis=1)
            found = add("Transpose", last, perm=[*range(1, rank + 1), 0])
        elif table.codes.ndim == 2:
            found = add("Gather", table.source, index, axis=0)
        else:
            found = rows("rows", table.codes)
        real = add("Cast", found, to=1)
    if zero.any():
        alike = (zero == zero.flat[0]).all()
        shift = rows("zeros", zero.flat[:1].astype(np.float32).reshape(()) if alike else zero)
        real = add("Sub", real, shift if alike else add("Cast", shift, to=1))
    real = add("Mul", real, rows("scales", table.scale))
    if table.codes.ndim == 2:
        return real
    sizes = np.asarray([0] * rank + [table.codes[0].size], np.int64)
    return add("Reshape", real, held(f"sizes_{rank}", sizes))


def _turned(model: Any, codes: Array) -> Any:
    """The constant that is the same table turned, which a layer that shares it multiplies with."""
    for value in model.graph.initializers.values():
        array = constant(value) if value.uses() else None
        if array is None or array.dtype != codes.dtype or array.shape != codes.shape[::-1]:
            continue
        if codes.ndim == 2 and np.array_equal(array, codes.T):
            return value
    return None


def _paired(codes: Array) -> Array:
    """Two halves of each block in one byte, the first in its lower bits."""
    half = codes.shape[-1] // 2
    packed: Array = codes[..., :half] | codes[..., half:] << 4
    return packed
