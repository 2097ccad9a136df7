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
        inner: whether what was merged with them (windows, heads, positions) comes before them, so
            that the example is another at every step.
    """

    dim: int
    inner: bool = False


@dataclass(frozen=True)
class Origins:
    """Of all values of a network on one batch.

    Rows are told apart by some dimensions of a value, one of which the examples are along. Where it
    is not known, it is taken to be the first one of a multiple of their number, and without one the
    first is divided as if it were of examples; they come before what was merged with them then.

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
        own = self._along(name, shape, dims)
        column = torch.arange(shape[own])
        if self._inner(name, dims):
            column = column % self.examples
        else:
            column = column * self.examples // shape[own]
        return _spread(column, shape, (own,), dims)

    def tokens_at(self, name: str, shape: Sequence[int], dims: Sequence[int]) -> Tensor | None:
        """Whether each row is of a token, shape (rows,).

        Positions are along the first other dimension of the length of the sequences, or merged
        with the examples.

        Args:
            name: of the value.
            shape: of the value.
            dims: dimensions that rows are told apart by, in order.

        Returns:
            None where all rows count: there is no padding, or none of the dimensions is of it.
        """
        if self.tokens is None or not dims:
            return None
        own, (examples, length) = self._along(name, shape, dims), self.tokens.shape
        each, rest = divmod(shape[own], examples)
        if rest:
            return None
        positions = [d for d in dims if shape[d] == length and d != own]
        inner = self._inner(name, dims)
        if positions:
            again = self.tokens.repeat(each, 1)
            table = again if inner else self.tokens.repeat_interleave(each, 0)
            return _spread(table, shape, (own, positions[0]), dims)
        merged = (self.tokens.T if inner else self.tokens).flatten()
        return _spread(merged, shape, (own,), dims) if each == length else None

    def tokens_beside(self, name: str, shape: Sequence[int], dim: int) -> Tensor | None:
        """:meth:`tokens_at` all dimensions of a value but one, counted from the end if negative."""
        return self.tokens_at(name, shape, [d for d in range(len(shape)) if d != dim % len(shape)])

    def _along(self, name: str, shape: Sequence[int], dims: Sequence[int]) -> int:
        """The dimension of the examples."""
        if name in self.dims and self.dims[name].dim in dims:
            return self.dims[name].dim
        return next((d for d in dims if shape[d] % self.examples == 0), dims[0])

    def _inner(self, name: str, dims: Sequence[int]) -> bool:
        """Whether the examples come behind what was merged with them."""
        return name in self.dims and self.dims[name].dim in dims and self.dims[name].inner


def _spread(table: Tensor, shape: Sequence[int], own: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Entries for two dimensions of a value, or for one, for all rows: flattened over ``dims``."""
    order = sorted(range(len(own)), key=lambda n: dims.index(own[n]))
    sizes = [shape[d] if d in own else 1 for d in dims]
    return table.permute(order).reshape(sizes).expand([shape[d] for d in dims]).reshape(-1)


def has_tokens(inputs: Inputs) -> bool:
    """Whether a position of a batch is no padding."""
    mask = mask_of_all(inputs)
    return mask is None or bool(mask.any())


def all_padding(where: str) -> DataError:
    """What is raised where no batch :func:`has_tokens`; one that has none is passed over."""
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
