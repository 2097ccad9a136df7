"""Sums of products, written by letter: one description of every matrix product.

``matmul`` of shapes (b, n, k) and (b, k, m) is the equation ``bnk, bkm -> bnm``. The rule that
carries labels, the question whether masked units give zero, and the count of multiply-accumulate
operations are each written once, for all of these operators, in terms of the letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from rarefy.graph.program import Node, Ref

Letters: TypeAlias = tuple[str, ...]
"""One letter per dimension; those of leading dimensions that broadcast are numbered from the
right: ``"...0"`` is the last of them."""

Rank: TypeAlias = Callable[[Ref], int]
"""Number of dimensions of an operand."""


@dataclass(frozen=True)
class Equation:
    """A sum of products: what each dimension of the operands and of the result is called.

    Attributes:
        operands: what is multiplied, each with its letters; letters that the result does not have
            are summed over.
        result: letters of the result.
        added: what is added to the sum, aligned with the last dimensions of the result.
        order: which two operands are multiplied first, and so on, as positions in the shrinking
            list of operands (a product goes to its end); empty for left to right.
        differs: whether it sums over a function of the operands that is zero only where all of
            them are, such as a difference, rather than over their product.
    """

    operands: tuple[tuple[Ref, Letters], ...]
    result: Letters
    added: Ref | None = None
    order: tuple[tuple[int, int], ...] = ()
    differs: bool = False

    @property
    def letters(self) -> tuple[str, ...]:
        """All letters, each once, those of the result first."""
        return tuple(dict.fromkeys((*self.result, *(x for _, ls in self.operands for x in ls))))


def equation(node: Node, rank: Rank) -> Equation | None:
    """The equation that a node computes; None for other operators and odd spellings."""
    make = EQUATIONS.get(node.kind.removesuffix("_"))
    return make(node, rank) if make else None


def sizes(found: Equation, shape: Callable[[Ref], Sequence[int]]) -> dict[str, int]:
    """Size of each letter; an operand of size 1 along it broadcasts."""
    size = dict.fromkeys(found.letters, 1)
    for operand, letters in found.operands:
        for letter, n in zip(letters, shape(operand), strict=True):
            size[letter] = n if size[letter] == 1 else size[letter]
    return size


def products(found: Equation, shape: Callable[[Ref], Sequence[int]]) -> int:
    """How many multiplications with an addition it takes, two operands at a time.

    What only one of the two has is summed over before they meet. A product in which nothing is
    summed over is a multiplication entry by entry, and not counted.
    """
    size = sizes(found, shape)
    left = [
        {x for x, n in zip(letters, shape(operand), strict=True) if n == size[x]}
        for operand, letters in found.operands
    ]
    total = 0
    for first, second in found.order or ((0, 1),) * (len(left) - 1):
        a, b = left[first], left[second]
        left = [s for i, s in enumerate(left) if i not in (first, second)]
        kept = set(found.result).union(*left)
        a, b = a & (b | kept), b & (a | kept)
        if (a & b) - kept:
            total += prod(size[letter] for letter in a | b)
        left.insert(len(left) if found.order else 0, (a | b) & kept)
    return total


def leading(count: int) -> Letters:
    """Letters of ``count`` dimensions that broadcast.

    Example:
        >>> leading(2)
        ('...1', '...0')
    """
    return tuple(f"...{i}" for i in reversed(range(count)))


def _longest(first: Letters, second: Letters) -> Letters:
    return first if len(first) >= len(second) else second


def _matrix_product(
    first: Ref, second: Ref, rank: Rank, added: Ref | None = None
) -> Equation | None:
    """``matmul``: vectors are sides without rows or columns; leading dimensions broadcast."""
    n, m = rank(first), rank(second)
    if n == 0 or m == 0:
        return None
    lead_a, lead_b = leading(max(n - 2, 0)), leading(max(m - 2, 0))
    row: Letters = ("n",) if n > 1 else ()
    column: Letters = ("m",) if m > 1 else ()
    operands = (first, (*lead_a, *row, "k")), (second, (*lead_b, "k", *column))
    return Equation(operands, (*_longest(lead_a, lead_b), *row, *column), added)


def _matmul(node: Node, rank: Rank) -> Equation | None:
    return _matrix_product(node.args[0], node.args[1], rank)


def _added_matmul(node: Node, rank: Rank) -> Equation | None:
    return _matrix_product(node.args[1], node.args[2], rank, node.args[0])


def _linear(node: Node, rank: Rank) -> Equation | None:
    x, weight, bias = node.args[0], node.args[1], node.argument("bias")
    lead = leading(rank(x) - 1)
    out: Letters = ("o",) if rank(weight) == 2 else ()
    operands = (x, (*lead, "k")), (weight, (*out, "k"))
    return Equation(operands, (*lead, *out), bias if isinstance(bias, Ref) else None)


def _bilinear(node: Node, rank: Rank) -> Equation | None:
    first, second, weight = node.args[:3]
    bias = node.argument("bias")
    lead = leading(rank(first) - 1)
    operands = (first, (*lead, "i")), (weight, ("o", "i", "j")), (second, (*lead, "j"))
    return Equation(operands, (*lead, "o"), bias if isinstance(bias, Ref) else None)


def _batches_summed(node: Node, rank: Rank) -> Equation | None:
    added, first, second = node.args[:3]
    return Equation(((first, ("b", "n", "k")), (second, ("b", "k", "m"))), ("n", "m"), added)


def _outer(node: Node, rank: Rank) -> Equation | None:
    return Equation(((node.args[0], ("n",)), (node.args[1], ("m",))), ("n", "m"))


def _added_outer(node: Node, rank: Rank) -> Equation | None:
    operands = (node.args[1], ("n",)), (node.args[2], ("m",))
    return Equation(operands, ("n", "m"), node.args[0])


def _inner(node: Node, rank: Rank) -> Equation | None:
    first, second = node.args[:2]
    if rank(first) == 0 or rank(second) == 0:
        return None
    rows = tuple(f"n{i}" for i in range(rank(first) - 1))
    columns = tuple(f"m{i}" for i in range(rank(second) - 1))
    return Equation(((first, (*rows, "k")), (second, (*columns, "k"))), (*rows, *columns))


def _tensordot(node: Node, rank: Rank) -> Equation | None:
    first, second, dims_a, dims_b = node.args[:4]
    a = [f"n{i}" for i in range(rank(first))]
    b = [f"m{i}" for i in range(rank(second))]
    for i, j in zip(dims_a, dims_b, strict=True):
        a[i] = b[j] = f"k{i % len(a)}"
    result = (*(x for x in a if x[0] == "n"), *(x for x in b if x[0] == "m"))
    return Equation(((first, tuple(a)), (second, tuple(b))), result)


def _vecdot(node: Node, rank: Rank) -> Equation | None:
    first, second = node.args[:2]
    lead = leading(max(rank(first), rank(second)))
    summed = lead[node.argument("dim")]
    operands = tuple((x, lead[len(lead) - rank(x) :]) for x in (first, second))
    result = tuple(x for x in lead if x != summed)
    return Equation(operands, result, differs=node.kind == "cosine_similarity")


def _distances(node: Node, rank: Rank) -> Equation | None:
    first, second = node.args[:2]
    lead_a, lead_b = leading(rank(first) - 2), leading(rank(second) - 2)
    operands = (first, (*lead_a, "n", "k")), (second, (*lead_b, "m", "k"))
    return Equation(operands, (*_longest(lead_a, lead_b), "n", "m"), differs=True)


def _chain(node: Node, rank: Rank) -> Equation | None:
    factors = node.args[0]
    if len(factors) < 2:
        return None
    operands = []
    for i, factor in enumerate(factors):
        both = (f"k{i}", f"k{i + 1}")
        operands.append((factor, both if rank(factor) == 2 else both[1:] if i == 0 else both[:1]))
    ends = (operands[0][1][:-1], operands[-1][1][1:])
    return Equation(tuple(operands), (*ends[0], *ends[1]))


def _einsum(node: Node, rank: Rank) -> Equation | None:
    text, given = node.args[0].replace(" ", ""), node.args[1]
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(given):
        return None
    spelled = [_spelled(t, rank(x)) for t, x in zip(terms, given, strict=True)]
    if any(letters is None for letters in spelled):
        return None
    known = [letters for letters in spelled if letters is not None]
    ellipsis = max((tuple(x for x in ls if x[0] == ".") for ls in known), key=len)
    result = _expanded(right, ellipsis) if arrow else (*ellipsis, *_once(left))
    path = node.argument("path") or ()
    order = tuple(zip(path[::2], path[1::2], strict=True))
    return Equation(tuple(zip(given, known, strict=True)), result, None, order)


def _spelled(term: str, rank: int) -> Letters | None:
    """Letters of one operand of rank ``rank``; None where they do not fit."""
    found = _expanded(term, leading(max(rank - len(term.replace("...", "")), 0)))
    return found if len(found) == rank else None


def _expanded(term: str, ellipsis: Letters) -> Letters:
    before, dots, after = term.partition("...")
    return (*before, *(ellipsis if dots else ()), *after)


def _once(left: str) -> list[str]:
    """Letters that occur once, in alphabetical order: the result where none is spelled out."""
    letters = left.replace("...", "").replace(",", "")
    return sorted(x for x in set(letters) if letters.count(x) == 1)


EQUATIONS: Mapping[str, Callable[[Node, Rank], Equation | None]] = {
    **dict.fromkeys("matmul mm bmm mv dot vdot linalg_matmul".split(), _matmul),
    **dict.fromkeys("addmm addmv baddbmm".split(), _added_matmul),
    **dict.fromkeys("outer ger".split(), _outer),
    **dict.fromkeys("chain_matmul linalg_multi_dot".split(), _chain),
    "addbmm": _batches_summed,
    "addr": _added_outer,
    "linear": _linear,
    "bilinear": _bilinear,
    "inner": _inner,
    "tensordot": _tensordot,
    **dict.fromkeys("linalg_vecdot cosine_similarity".split(), _vecdot),
    "cdist": _distances,
    "einsum": _einsum,
}
"""ATen operator -> its equation."""
