"""Equations: letters, sizes and the number of products, against PyTorch's own arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from rarefy.graph.equations import EQUATIONS, Equation, equation, leading, products, sizes
from rarefy.graph.program import Node, Ref

torch.set_num_threads(1)
A, B, C = Ref("a"), Ref("b"), Ref("c")


def found(op: str, args: tuple, ranks: dict[str, int], **options) -> Equation | None:
    return equation(Node("y", f"aten.{op}.default", args, options), lambda ref: ranks[ref.name])


SPELLED = {
    "matmul": (("matmul", (A, B), {"a": 2, "b": 2}), [("n", "k"), ("k", "m")], ("n", "m")),
    "of a vector": (("matmul", (A, B), {"a": 1, "b": 2}), [("k",), ("k", "m")], ("m",)),
    "with batches": (
        ("matmul", (A, B), {"a": 2, "b": 3}),
        [("n", "k"), ("...0", "k", "m")],
        ("...0", "n", "m"),
    ),
    "linear": (
        ("linear", (A, B), {"a": 3, "b": 2}),
        [("...1", "...0", "k"), ("o", "k")],
        ("...1", "...0", "o"),
    ),
    "einsum": (
        ("einsum", ("a b ,b c -> c a", [A, B]), {"a": 2, "b": 2}),
        [("a", "b"), ("b", "c")],
        ("c", "a"),
    ),
    "implicit": (("einsum", ("ib,Ba", [A, B]), {"a": 2, "b": 2}), None, ("B", "a", "b", "i")),
    "implicit ellipsis": (
        ("einsum", ("...i,i", [A, B]), {"a": 3, "b": 1}),
        [("...1", "...0", "i"), ("i",)],
        ("...1", "...0"),
    ),
    "ellipsis inside": (
        ("einsum", ("i...j,...->i...", [A, B]), {"a": 3, "b": 1}),
        [("i", "...0", "j"), ("...0",)],
        ("i", "...0"),
    ),
    "repeated": (("einsum", ("ii->i", [A]), {"a": 2}), [("i", "i")], ("i",)),
    "chain of vectors": (
        ("linalg_multi_dot", ([A, B, C],), {"a": 1, "b": 2, "c": 1}),
        [("k1",), ("k1", "k2"), ("k2",)],
        (),
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_letters_of_operands_and_result(name) -> None:
    (op, args, ranks), operands, result = SPELLED[name]
    got = found(op, args, ranks)
    assert got is not None
    assert got.result == result
    if operands is not None:
        assert [letters for _, letters in got.operands] == operands


@pytest.mark.parametrize(
    "case",
    [
        ("einsum", ("ij,jk", [A]), {"a": 2}),
        ("einsum", ("ijk->i", [A]), {"a": 2}),
        ("inner", (A, B), {"a": 0, "b": 2}),
        ("linalg_multi_dot", ([A],), {"a": 2}),
        ("relu", (A,), {"a": 2}),
    ],
)
def test_what_does_not_fit_has_no_equation(case) -> None:
    assert found(*case) is None


def test_every_row_names_an_operator() -> None:
    assert all(hasattr(torch.ops.aten, name) for name in EQUATIONS)


def test_a_path_says_which_operands_meet_first() -> None:
    shapes = {"a": (2, 3), "b": (3, 4), "c": (4, 5)}
    args = ("ij,jk,kl->il", [A, B, C])
    ranks = dict.fromkeys(shapes, 2)

    def total(**options) -> int:
        got = found("einsum", args, ranks, **options)
        assert got is not None
        return products(got, lambda ref: shapes[ref.name])

    assert total() == total(path=[0, 1, 0, 1]) == 2 * 3 * 4 + 2 * 4 * 5
    assert total(path=[1, 2, 0, 1]) == 3 * 4 * 5 + 2 * 3 * 5


def test_an_operand_of_size_one_broadcasts() -> None:
    got = found("matmul", (A, B), {"a": 3, "b": 3})
    assert got is not None
    shapes = {"a": (1, 2, 3), "b": (7, 3, 4)}
    assert sizes(got, lambda ref: shapes[ref.name]) == {"...0": 7, "n": 2, "m": 4, "k": 3}
    assert leading(0) == ()


SIZES = {"i": 2, "j": 3, "k": 4, "l": 5}


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_products_are_counted_as_einsum_makes_them(data) -> None:
    letters = st.lists(st.sampled_from("ijkl"), unique=True, max_size=4).map("".join)
    terms = data.draw(st.lists(letters, min_size=1, max_size=3))
    known = sorted(set("".join(terms)))
    result = "".join(data.draw(st.permutations(known))[: data.draw(st.integers(0, len(known)))])
    shapes = []
    for i, term in enumerate(terms):
        seen = "".join(terms[:i])  # whoever is first is not the one that broadcasts
        small = data.draw(st.sampled_from([*(set(term) & set(seen)), ""]))
        shapes.append(tuple(1 if x == small else SIZES[x] for x in term))
    text = f"{','.join(terms)}->{result}"
    operands = [torch.zeros(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        torch.einsum(text, operands)
    refs = [Ref(str(i)) for i in range(len(terms))]
    ranks = {ref.name: len(shape) for ref, shape in zip(refs, shapes, strict=True)}
    got = found("einsum", (text, refs), ranks)
    assert got is not None
    assert products(got, lambda ref: shapes[int(ref.name)]) == counter.get_total_flops() / 2
