"""Which arguments of a call state a size of its result: a table from calls to small functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from rarefy.graph.program import Spec, Value
from rarefy.pruning.structure.expressions import Apply
from rarefy.pruning.structure.sized import Sized, origin


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Value
    extents: Callable[[Tensor], list[int]]

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by position or by one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[n] for n in names if n in self.kwargs), default)

    @property
    def rank(self) -> int:
        """Number of dimensions of the result, or of its first part."""
        first = self.value[0] if isinstance(self.value, tuple) else self.value
        return len(first.shape) if isinstance(first, Spec) else 0


_Stated: TypeAlias = "Iterator[tuple[Any, int | None, int | str]]"
"""(size, part of the result, dimension or argument) of each size that a call states."""


def _flat(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _all_sizes(call: Call) -> _Stated:
    """view(x, sizes), reshape, expand: one size for each dimension of the result."""
    named = call.kwargs.get("shape", call.kwargs.get("size"))
    sizes = _flat(call.args[1:]) if named is None else named
    for back, size in enumerate(reversed(sizes)):
        yield size, None, call.rank - 1 - back


def _made_sizes(call: Call) -> _Stated:
    """zeros(sizes), x.new_zeros(sizes): the sizes come first."""
    given = call.args[1:] if call.args and isinstance(call.args[0], Tensor) else call.args
    nested = bool(given) and isinstance(given[0], tuple | list)
    sizes = call.kwargs.get("size") or _flat(given[:1] if nested else given)
    for dim, size in enumerate(sizes[: call.rank]):
        yield size, None, dim


def _unflattened(call: Call) -> _Stated:
    sizes = call.argument(2, "sizes")
    first = call.argument(1, "dim") % (call.rank - len(sizes) + 1)
    for offset, size in enumerate(sizes):
        yield size, None, first + offset


def _part_sizes(call: Call) -> _Stated:
    """split: a list of sizes, or one for all parts, of which the last may be smaller."""
    sizes = call.argument(1, "split_size_or_sections", "split_size", "split_sizes")
    dim = call.argument(2, "dim", default=0)
    assert isinstance(call.value, tuple)
    if isinstance(sizes, int):
        sizes = [sizes] * len(call.value)
    for part, size in enumerate(sizes):
        yield size, part, dim % call.rank


def _chunks(call: Call) -> _Stated:
    """chunk: all parts but perhaps the last have the size that the number of parts gives."""
    number, dim = call.argument(1, "chunks"), call.argument(2, "dim", default=0) % call.rank
    whole = call.extents(call.args[0])[dim]
    each = Apply("ceildiv", origin(whole), origin(number))
    assert isinstance(call.value, tuple)
    for part in range(len(call.value)):
        yield Sized.of(-(-int(whole) // int(number)), each), part, dim


def _normalized(call: Call) -> _Stated:
    shape = call.argument(1, "normalized_shape")
    shape = [shape] if isinstance(shape, int) else shape
    for offset, size in enumerate(shape):
        yield size, None, call.rank - len(shape) + offset


def _narrowed(call: Call) -> _Stated:
    yield call.argument(3, "length"), None, call.argument(1, "dim") % call.rank


def _indexed(call: Call) -> _Stated:
    """x[..., a:b]: the difference of bounds that are not negative."""
    items = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    consumed = sum(1 for i in items if i is not None and i is not Ellipsis)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += call.args[0].dim() - consumed
        elif isinstance(item, slice):
            start, stop = item.start or 0, item.stop
            plain = item.step in (None, 1) and isinstance(start, int) and isinstance(stop, int)
            if plain and start >= 0 and stop > 0:
                yield stop - start, None, dim
            dim += 1
        elif item is None:
            dim += 1
        elif not isinstance(item, int):
            return


def _convolved(call: Call) -> _Stated:
    yield call.argument(6, "groups", default=1), None, "groups"


def _group_normalized(call: Call) -> _Stated:
    yield call.argument(1, "num_groups"), None, "num_groups"


STATED: Mapping[str, Callable[[Call], _Stated]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _all_sizes),
    **dict.fromkeys(
        "zeros ones empty full new_zeros new_ones new_empty new_full".split(), _made_sizes
    ),
    "unflatten": _unflattened,
    "split": _part_sizes,
    "chunk": _chunks,
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "narrow": _narrowed,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    "group_norm": _group_normalized,
    "getitem": _indexed,
}
"""Kind of call -> the sizes that its arguments state."""
