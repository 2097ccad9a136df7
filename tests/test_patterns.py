"""Single weights, N:M and blocks: what they remove, counted and ranked another way."""

from __future__ import annotations

import itertools
from math import ceil, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import BudgetError, InputError
from rarefy.pruning.sparsity.patterns import (
    NM,
    PATTERNS,
    Block,
    Unstructured,
    as_matrix,
    as_weight,
    counts,
    named,
    resolved_share,
    shorthand,
)

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int, ties: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator)
    return (values * 4).round() if ties else values


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 5)]), st.integers(1, 23), st.booleans())
def test_exactly_n_of_each_m_stay_and_they_are_the_largest(seed, nm, inputs, ties) -> None:
    n, m = nm
    scores = drawn(seed, 3, 2 * inputs, ties=ties)
    gone = NM(n, m).gone(scores, inputs)
    for row, stretch in itertools.product(range(3), range(2)):
        for start in range(0, inputs, m):
            columns = range(stretch * inputs + start, stretch * inputs + min(start + m, inputs))
            kept = [float(scores[row, c]) for c in columns if not gone[row, c]]
            went = [float(scores[row, c]) for c in columns if gone[row, c]]
            assert len(went) == (m - n if len(columns) == m else 0)
            assert not went or max(went) <= min(kept)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 11), st.integers(1, 11),
       st.floats(0, 1))  # fmt: skip
def test_blocks_go_as_wholes_and_those_of_the_smallest_means(seed, r, c, rows, cols, share) -> None:
    pattern, scores = Block(r, c), drawn(seed, rows, cols)
    count = floor(share * pattern.size(rows, cols))
    gone = pattern.gone(scores, count)
    means: dict[bool, list[float]] = {True: [], False: []}
    for i, j in itertools.product(range(ceil(rows / r)), range(ceil(cols / c))):
        cell = (slice(i * r, (i + 1) * r), slice(j * c, (j + 1) * c))
        assert gone[cell].all() or not gone[cell].any()
        means[bool(gone[cell].any())].append(float(scores[cell].mean()))
    assert len(means[True]) == count
    assert not count or not means[False] or max(means[True]) <= min(means[False]) + 1e-6


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1), st.booleans())
def test_counts_are_exact_within_and_across_matrices(seed, share, ties) -> None:
    scores = [drawn(seed, 3, 5, ties=ties), drawn(seed + 1, 4, 7, ties=ties)]
    pattern = Unstructured()
    assert counts(pattern, scores, share, together=False) == [
        floor(share * 15 + 1e-9), floor(share * 28 + 1e-9)
    ]  # fmt: skip
    both = counts(pattern, scores, share, together=True)
    assert sum(both) == floor(share * 43 + 1e-9)
    gone = [pattern.gone(s, n) for s, n in zip(scores, both, strict=True)]
    went = torch.cat([s[g] for s, g in zip(scores, gone, strict=True)])
    kept = torch.cat([s[~g] for s, g in zip(scores, gone, strict=True)])
    assert not len(went) or not len(kept) or went.max() <= kept.min()


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 2), (6, 4, 1, 2, 2)])
@pytest.mark.parametrize("input_dim", [0, 1])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_a_matrix_becomes_the_weight_again(shape, input_dim, pattern) -> None:
    weight = torch.arange(float(torch.Size(shape).numel())).view(shape)
    matrix = as_matrix(weight, input_dim, pattern)
    assert matrix.shape[0] == shape[1 - input_dim]
    assert torch.equal(as_weight(matrix, weight, input_dim, pattern), weight)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 4)])
def test_a_matrix_of_groups_has_a_row_for_every_output(pattern) -> None:
    weight = torch.rand(6, 4, 3)  # of a transposed convolution: 2 groups of 3 inputs, 4 outputs
    matrix = as_matrix(weight, 0, pattern, groups=2)
    expected = torch.cat([as_matrix(part, 0, pattern) for part in weight.chunk(2)])
    assert torch.equal(matrix, expected)
    assert torch.equal(as_weight(matrix, weight, 0, pattern, groups=2), weight)


def test_groups_of_a_convolution_run_over_input_channels() -> None:
    weight = torch.rand(3, 8, 3, 3)
    matrix = as_matrix(weight, 1, NM(2, 4))
    gone = as_weight(NM(2, 4).gone(matrix, 8), weight, 1, NM(2, 4))
    assert torch.equal((~gone).view(3, 2, 4, 3, 3).sum(2), torch.full((3, 2, 3, 3), 2))


def test_shorthands_say_what_they_are() -> None:
    for name, pattern in PATTERNS.items():
        assert named(name) == named(pattern) == pattern
        assert shorthand(pattern) == ("weight" if name == "unstructured" else name)
    with pytest.raises(InputError, match=r"'channel'.*'2:4'.*'16x16'"):
        named("2x")


@pytest.mark.parametrize("make", [lambda: NM(4, 4), lambda: NM(0, 4), lambda: Block(0, 4),
                                  lambda: Block(1, 2.0)])  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


def test_n_of_m_fixes_the_share() -> None:
    assert resolved_share(NM(1, 4), None, "") == resolved_share(NM(1, 4), 0.75, "") == 0.75
    with pytest.raises(BudgetError, match=r"0\.75 of the weights .* 0\.9 is asked"):
        resolved_share(NM(1, 4), 0.9, "")
    with pytest.raises(BudgetError, match="no sparsity"):
        resolved_share(Block(1, 4), None, "")
