"""Quantized weights of an exported program as integers, and the operators that decode them.

A weight is stored as a matrix with a row for each channel, whose columns are parted into blocks
that share a scale. The operators are ordinary ones of PyTorch, so that any PyTorch loads the file.
What they make is equal to the weight, bit for bit; a weight for which it is not stays in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from rarefy.deployment.editing import Editor
from rarefy.grid import Grid, as_matrix, columns
from rarefy.storage.adapt import Held
from rarefy.storage.codes import dequantize
from rarefy.storage.grids import Quantized, shortest

_aten: Any = torch.ops.aten

Run = Callable[..., Any]
"""(operator, arguments) -> its result: a tensor, or a node of a graph."""


@dataclass(frozen=True)
class Codes:
    """A weight as integers.

    Attributes:
        codes: int8 or uint8, shape (channels, blocks, columns of a block), the last block filled up
            with zeros; or, of 4 bits, two to a byte, the first in the low half, flat.
        scale: float32, or float16 where that is exact; broadcasts against the blocks.
        offset: what is added to a code, float32, likewise; None for 0.
        blocks: the shape (channels, blocks, columns of a block).
        shape: of the weight.
        axis: its dimension that the channels are.
        dtype: its dtype.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    blocks: tuple[int, int, int]
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype

    @classmethod
    def of(cls, values: Tensor, grid: Grid) -> Codes:
        """The codes of values that lie on a grid."""
        shape = tuple(values.shape)
        count = columns(shape, grid.axis)
        size = min(grid.group or count, count)
        blocks = (shape[grid.axis], -(-count // size), size)
        zero = grid.zero_point.to(torch.int32)
        codes = grid.steps(values) + grid.spread(zero, shape)
        matrix = as_matrix(codes, grid.axis)
        first = grid.low if grid.bits else 0
        padded = torch.full((blocks[0], blocks[1] * size), first, dtype=torch.int32)
        padded[:, :count] = matrix
        stored = (padded - first).to(torch.uint8 if grid.bits or grid.low >= 0 else torch.int8)
        offset = first - _against_blocks(zero)
        return cls(
            codes=_paired(stored) if grid.bits else stored.reshape(blocks),
            scale=_against_blocks(shortest(grid.scale)),
            offset=offset.float() if bool(offset.any()) else None,
            blocks=blocks,
            shape=shape,
            axis=grid.axis,
            dtype=values.dtype,
        )

    def decoded(self, run: Run, codes: Any, scale: Any, offset: Any) -> Any:
        """The weight, by operators on the three tensors or on nodes that stand for them."""
        whole = codes
        if self.is_paired:
            halves = [
                run(_aten.bitwise_and.Scalar, codes, 15),
                run(_aten.__rshift__.Scalar, codes, 4),
            ]
            whole = run(_aten.view.default, run(_aten.stack.default, halves, -1), [-1])
            whole = run(_aten.slice.Tensor, whole, 0, 0, prod(self.blocks))
            whole = run(_aten.view.default, whole, list(self.blocks))
        whole = run(_aten.to.dtype, whole, torch.float32)
        if offset is not None:
            whole = run(_aten.add.Tensor, whole, offset)
        if self.scale.dtype != torch.float32:
            scale = run(_aten.to.dtype, scale, torch.float32)
        whole = run(_aten.mul.Tensor, whole, scale)
        channels, count = self.blocks[0], columns(self.shape, self.axis)
        whole = run(_aten.view.default, whole, [channels, -1])
        if prod(self.blocks[1:]) != count:
            whole = run(_aten.slice.Tensor, whole, 1, 0, count)
        others = [size for dim, size in enumerate(self.shape) if dim != self.axis]
        whole = run(_aten.reshape.default, whole, [channels, *others])
        if self.axis:
            order = [*range(1, self.axis + 1), 0, *range(self.axis + 1, len(self.shape))]
            whole = run(_aten.permute.default, whole, order)
        return whole if self.dtype == torch.float32 else run(_aten.to.dtype, whole, self.dtype)

    @property
    def is_paired(self) -> bool:
        """Whether two codes share a byte."""
        return self.codes.ndim == 1


def _paired(codes: Tensor) -> Tensor:
    """Codes below 16, two to a byte, the first in the low half."""
    flat = codes.reshape(-1)
    flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    return flat[::2] | flat[1::2] << 4


def _against_blocks(values: Tensor) -> Tensor:
    """Scales or zero points of shape (), (channels,) or (channels, blocks) against the blocks."""
    return values.reshape(*values.shape, *[1] * (3 - values.ndim)) if values.ndim else values


def store_codes(program: ExportedProgram, weights: Mapping[str, Quantized], held: Held) -> None:
    """Let a program decode these weights, in place.

    Args:
        program: of a network.
        weights: by the path in ``held``.
        held: the network's tensors, with the other paths of shared ones.
    """
    editor = Editor(program)
    for node, path in editor.tensors():
        source = held.aliases.get(path, path)
        if source not in weights or not node.users:
            continue
        values = _values(weights[source], held.tensors[source])
        codes = Codes.of(values, weights[source].grid)
        found = codes.decoded(lambda op, *args: op(*args), codes.codes, codes.scale, codes.offset)
        if found.dtype == values.dtype and torch.equal(found, values):
            _replace(editor, node, path, codes, values)
    editor.finish()


def _values(quantized: Quantized, tensor: Tensor) -> Tensor:
    """What the codes stand for, which under a quantizer may be another tensor than the weight."""
    found = dequantize(quantized.codes.copy(), tuple(tensor.shape), quantized.grid)
    return found.to(tensor.dtype)


def _replace(editor: Editor, node: Node, path: str, codes: Codes, values: Tensor) -> None:
    """Let all that reads a tensor read what is decoded, and forget the tensor."""
    parts = {"codes": codes.codes, "step": codes.scale, "offset": codes.offset}
    given = [
        None if t is None else editor.add_input(node, f"{path}_{n}", t) for n, t in parts.items()
    ]
    first = next(other for other in editor.graph.nodes if other in node.users)
    with editor.graph.inserting_before(first):
        decoded = codes.decoded(editor.call, *given)
    readers = list(node.users)
    node.replace_all_uses_with(decoded)
    editor.forget(node)
    for reader in readers:
        _skip(editor, reader, decoded, values)


def _skip(editor: Editor, reader: Node, decoded: Node, values: Tensor) -> None:
    """Take out a quantizer that leaves the decoded weight as it is."""
    quantizer: Any = reader.target
    if "fake_quantize" not in str(quantizer) or reader.args[0] is not decoded:
        return
    held = [editor.value(a) if isinstance(a, Node) else a for a in reader.args[1:]]
    if any(a is None for a in held) or not torch.equal(quantizer(values, *held), values):
        return
    reader.replace_all_uses_with(decoded)
    editor.erase(reader)
