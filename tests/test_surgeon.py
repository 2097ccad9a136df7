"""The surgeon against constrained least squares on the rows themselves."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.pruning.scoring.surgeon import RIDGE, Columns, Reader, adapted, order, regular, solved

SEEDS = st.integers(0, 10_000)
ROWS, OUTPUTS = 40, 3


def problem(seed: int, unknowns: int) -> tuple[np.ndarray, np.ndarray, Reader]:
    """Rows, with the ridge as further rows, and the reader that stands for them."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(ROWS, unknowns)) @ generator.normal(size=(unknowns, unknowns))
    w = generator.normal(size=(OUTPUTS, unknowns))
    gram = x.T @ x / ROWS
    ridge = np.sqrt(RIDGE * np.trace(gram) / unknowns) * np.eye(unknowns)
    reader = Reader(torch.from_numpy(w), torch.from_numpy(gram), {})
    return np.vstack([x / np.sqrt(ROWS), ridge]), w, reader


def columns(units: int, each: int) -> Columns:
    return Columns(torch.arange(units), torch.arange(units * each).view(units, each))


def loss(x: np.ndarray, w: np.ndarray, gone: list[int]) -> float:
    """What the outputs lose at least without these columns."""
    kept = np.setdiff1d(np.arange(x.shape[1]), gone)
    target = x @ w.T
    found = np.linalg.lstsq(x[:, kept], target, rcond=None)[0] if len(kept) else np.zeros((0, 3))
    return float(np.square(x[:, kept] @ found - target).sum())


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([(5, 1), (4, 2), (3, 3)]))
def test_units_go_in_the_order_of_recomputed_least_squares(seed, shape) -> None:
    units, each = shape
    x, w, reader = problem(seed, units * each)
    found = order([(reader, columns(units, each))], units).tolist()
    index = np.arange(units * each).reshape(units, each)
    gone: list[int] = []
    for unit in found[:-1]:
        held = [loss(x, w, index[[*gone, u]].ravel().tolist()) for u in range(units)]
        rest = [held[u] for u in range(units) if u not in gone]
        assert held[unit] <= min(rest) * (1 + 1e-6) + 1e-9
        gone.append(unit)
    assert sorted(found) == list(range(units))


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_costs_of_two_layers_add_up(seed) -> None:
    (x, w, one), (y, v, two) = problem(seed, 4), problem(seed + 1, 8)
    found = order([(one, columns(4, 1)), (two, columns(4, 2))], 4)
    both = [loss(x, w, [u]) + loss(y, v, [2 * u, 2 * u + 1]) for u in range(4)]
    assert both[found[0]] <= min(both) * (1 + 1e-6)


def test_adapted_weights_are_those_of_least_squares_for_all_subsets() -> None:
    for each in (1, 2):
        x, w, reader = problem(each, 4 * each)
        x = x[:ROWS]
        index = np.arange(4 * each).reshape(4, each)
        for size in range(1, 5):
            for gone in combinations(range(4), size):
                found = adapted(reader, columns(4, each), np.array(gone)).numpy()
                lost = index[list(gone)].ravel()
                kept = np.setdiff1d(np.arange(4 * each), lost)
                assert not found[:, lost].any()
                if not len(kept):
                    continue
                ridge = RIDGE * np.square(x[:, kept]).sum() / len(kept)
                more = np.vstack([x[:, kept], np.sqrt(ridge) * np.eye(len(kept))])
                target = np.vstack([x @ w.T, np.sqrt(ridge) * w[:, kept].T])
                expected = np.linalg.lstsq(more, target, rcond=None)[0].T
                np.testing.assert_allclose(found[:, kept], expected, rtol=1e-6, atol=1e-8)


def test_units_that_no_layer_reads_go_first() -> None:
    _, _, reader = problem(0, 3)
    some = Columns(torch.tensor([1, 2, 4]), torch.arange(3)[:, None])
    assert set(order([(reader, some)], 5)[:2].tolist()) == {0, 3}


def test_many_unknowns_go_a_share_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr("rarefy.pruning.scoring.surgeon.EXACT", 8)
    reader = Reader(torch.arange(1.0, 33.0)[None].double(), torch.eye(32).double(), {})
    assert order([(reader, columns(32, 1))], 32).tolist() == list(range(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices_without_full_rank_are_solved(dtype) -> None:
    ones = torch.ones(4, 4, dtype=dtype)
    reader = Reader(torch.ones(2, 4).double(), ones, {})
    found = adapted(reader, columns(4, 1), np.array([0]))
    torch.testing.assert_close(found[:, 1:].sum(1), torch.full((2,), 4.0).double(), rtol=1e-2,
                               atol=0)  # fmt: skip
    assert sorted(order([(reader, columns(4, 1))], 4).tolist()) == [0, 1, 2, 3]
    nothing = Reader(torch.ones(2, 4).double(), torch.zeros(4, 4, dtype=dtype), {})
    assert torch.isfinite(adapted(nothing, columns(4, 1), np.array([2]))).all()
    assert regular(ones).dtype is torch.float64


def test_a_matrix_that_is_not_positive_definite_is_solved_all_the_same() -> None:
    gram, right = torch.diag(torch.tensor([1.0, -2.0])).double(), torch.ones(2, 1).double()
    torch.testing.assert_close(gram @ solved(gram, right), right)
