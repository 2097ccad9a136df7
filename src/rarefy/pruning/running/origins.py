"""What the rows of a value come from: which example, and a token of it or its padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rarefy.batches import batch_size, mask_of_all
from rarefy.errors import DataError
from rarefy.types import Inputs


@dataclass(frozen=True)
class Along:
    """Where the examples of a value lie.

    Attributes:
        dim: the dimension.
        before: size of what was merged with them (windows, heads, positions) and comes before them,
            so that all examples lie there as often.

    Example:
        >>> Along(0, before=2).examples(12, 3).tolist()
        [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    """

    dim: int
    before: int = 1

    def examples(self, size: int, count: int) -> Tensor:
        """The number of each entry's example along the dimension, shape (size,).

        Where it does not hold whole examples, they share it in their order: what is made of a pair
        is of the first of the two.

        Args:
            size: of the dimension.
            count: how many examples there are.
        """
        entry = torch.arange(size)
        behind, rest = divmod(size, self.before * count)
        return entry * count // size if rest or not behind else entry // behind % count


@dataclass(frozen=True)
class Origins:
    """Of all values of a network on one batch.

    Rows are told apart by some dimensions of a value, one of which the examples are along. Where it
    is not known, it is taken to be the first one of a multiple of their number, and without one the
    first; they come before what was merged with them then.

    Attributes:
        examples: how many.
        tokens: (examples, length), whether a position is no padding; None where all are none.
        dims: name of a value -> where its examples lie, where known.

    Example:
        >>> Origins(2, None, {"x": Along(1)}).examples_at("x", (4, 2, 8), (0, 1)).tolist()
        [0, 1, 0, 1, 0, 1, 0, 1]
    """

    examples: int
    tokens: Tensor | None = None
    dims: Mapping[str, Along] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, dims: Mapping[str, Along] | None = None) -> Origins:
        """Of a batch; the ``attention_mask`` of the inputs, shape (B, L), tells padding."""
        mask = mask_of_all(inputs)
        tokens = None if mask is None or bool(mask.all()) else mask.detach().bool().cpu()
        return cls(batch_size(inputs), tokens, dims or {})

    def examples_at(self, name: str, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
        """The number of each row's example, shape (rows,).

        Args:
            name: of the value.
            shape: of the value.
            dims: dimensions that rows are told apart by, in order.
        """
        if not dims:
            return torch.zeros(1, dtype=torch.int64)
        along = self._along(name, shape, dims)
        column = along.examples(shape[along.dim], self.examples)
        return _spread(column, shape, (along.dim,), dims)

    def tokens_at(self, name: str, shape: Sequence[int], dims: Sequence[int]) -> Tensor | None:
        """Whether each row is of a token, shape (rows,).

        Positions are along the first other dimension of the length of the sequences, or merged
        with the examples: before them, or behind all else.

        Args:
            name: of the value.
            shape: of the value.
            dims: dimensions that rows are told apart by, in order.

        Returns:
            None where all rows count: there is no padding, or none of the dimensions is of it.
        """
        if self.tokens is None or not dims:
            return None
        along, (examples, length) = self._along(name, shape, dims), self.tokens.shape
        size = shape[along.dim]
        behind, rest = divmod(size, along.before * examples)
        if rest:
            return None
        example = along.examples(size, examples)
        positions = [d for d in dims if shape[d] == length and d != along.dim]
        if positions:
            return _spread(self.tokens[example], shape, (along.dim, positions[0]), dims)
        if length not in (along.before, behind):
            return None
        entry = torch.arange(size)
        position = entry // (size // length) if along.before == length else entry % length
        return _spread(self.tokens[example, position], shape, (along.dim,), dims)

    def tokens_beside(self, name: str, shape: Sequence[int], dim: int) -> Tensor | None:
        """:meth:`tokens_at` all dimensions of a value but one, counted from the end if negative."""
        return self.tokens_at(name, shape, [d for d in range(len(shape)) if d != dim % len(shape)])

    def _along(self, name: str, shape: Sequence[int], dims: Sequence[int]) -> Along:
        """Where the examples lie."""
        if name in self.dims and self.dims[name].dim in dims:
            return self.dims[name]
        return Along(next((d for d in dims if shape[d] % self.examples == 0), dims[0]))


def _spread(table: Tensor, shape: Sequence[int], own: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Entries for two dimensions of a value, or for one, for all rows: flattened over ``dims``."""
    order = sorted(range(len(own)), key=lambda n: dims.index(own[n]))
    sizes = [shape[d] if d in own else 1 for d in dims]
    return table.permute(order).reshape(sizes).expand([shape[d] for d in dims]).reshape(-1)


def all_padding(where: str) -> DataError:
    """What is raised where no batch has a token; one that has none is passed over."""
    return DataError(
        where,
        "every position is padding: attention_mask is 0 everywhere",
        "Give masks that are 1 at tokens and 0 at padding",
    )


def counted(tensor: Tensor, tokens: Tensor | None) -> Tensor | bool:
    """What says which entries of a network's output count: of (B, L, ...), those of tokens.

    Args:
        tensor: the output.
        tokens: (B, L), True or not 0 at tokens.

    Returns:
        A tensor that broadcasts to the output; True where all count.
    """
    if tokens is None or tensor.ndim < 3 or tensor.shape[:2] != tokens.shape:
        return True
    return tokens.bool().to(tensor.device)[(..., *[None] * (tensor.ndim - 2))]
