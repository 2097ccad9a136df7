"""Removal with reconstruction, against constrained least squares on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.pruning.sparsity import sparsegpt
from rarefy.pruning.sparsity.patterns import NM, Block, Unstructured
from rarefy.pruning.sparsity.sparsegpt import (
    Selection,
    moved,
    regularized,
    ridge_of,
    ridged,
    solved,
    sweep,
)

SEEDS = st.integers(0, 10_000)
COLUMNS, ROWS, OUTPUTS = 6, 40, 3
RIDGE = 0.3


def problem(seed: int, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Correlated rows with the ridge as further rows, weights, and the Hessian."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(ROWS, columns)) @ generator.normal(size=(columns, columns))
    x = np.vstack([x, np.sqrt(RIDGE) * np.eye(columns)])
    return x, generator.normal(size=(OUTPUTS, columns)), torch.from_numpy(x.T @ x)[None]


def refit(x: np.ndarray, w: np.ndarray, target: np.ndarray, free: list[int]) -> np.ndarray:
    """``w`` with its free entries solved so that ``x w`` is nearest to ``target``."""
    found = w.copy()
    found[free] = 0
    if free:
        found[free] = np.linalg.lstsq(x[:, free], target - x @ found, rcond=None)[0]
    return found


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 17), st.sampled_from([1, 2, 128]))
def test_the_sweep_is_exact_removal_one_weight_at_a_time(seed, count, block) -> None:
    x, w, hessian = problem(seed)
    found, gone = sweep(
        torch.from_numpy(w)[None], hessian, Selection(Unstructured(), count, 6, block)
    )
    assert int(gone.sum()) == count
    for row in range(OUTPUTS):
        expected, target = w[row].copy(), x @ w[row]
        for column in range(COLUMNS):
            if gone[0, row, column]:
                expected[column] = 0
                expected = refit(x, expected, target, list(range(column + 1, COLUMNS)))
        np.testing.assert_allclose(found[0, row].numpy(), expected, rtol=1e-6, atol=1e-8)
        assert not found[0, row][gone[0, row]].any()


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_the_weight_that_goes_first_is_the_one_whose_removal_costs_least(seed) -> None:
    x, w, hessian = problem(seed)
    _, gone = sweep(torch.from_numpy(w)[None], hessian, Selection(Unstructured(), 1, 6, 128))
    costs = np.zeros_like(w)
    for row in range(OUTPUTS):
        for column in range(COLUMNS):
            without = w[row].copy()
            without[column] = 0
            target = x @ w[row]
            without = refit(x, without, target, list(range(column + 1, COLUMNS)))
            costs[row, column] = ((x @ without - target) ** 2).sum()
    assert gone[0].nonzero().tolist() == [list(np.unravel_index(costs.argmin(), costs.shape))]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(0, 18))
def test_the_solve_is_least_squares_over_what_stays(seed, count) -> None:
    x, w, hessian = problem(seed)
    order = np.random.default_rng(seed).permutation(w.size)[:count]
    gone = torch.zeros(w.size, dtype=torch.bool)
    gone[torch.from_numpy(order)] = True
    gone = gone.view(1, *w.shape)
    found = solved(torch.from_numpy(w)[None], hessian, gone)
    assert found is not None
    for row in range(OUTPUTS):
        free = [c for c in range(COLUMNS) if not gone[0, row, c]]
        expected = refit(x, np.zeros(COLUMNS), x @ w[row], free)
        np.testing.assert_allclose(found[0, row].numpy(), expected, rtol=1e-6, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_weights_move_to_where_the_wanted_outputs_are(seed) -> None:
    generator = np.random.default_rng(seed)
    x, w = generator.normal(size=(ROWS, COLUMNS)), generator.normal(size=(OUTPUTS, COLUMNS))
    y = generator.normal(size=(ROWS, OUTPUTS))
    gram = torch.from_numpy(x.T @ x)[None]
    hessian = gram + RIDGE * torch.eye(COLUMNS, dtype=torch.float64)
    found = moved(torch.from_numpy(w)[None], gram, torch.from_numpy(x.T @ y)[None], hessian)
    stacked = np.vstack([x, np.sqrt(RIDGE) * np.eye(COLUMNS)])
    wanted = np.vstack([y, np.sqrt(RIDGE) * w.T])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize("inputs", [6, 8, 3])
def test_groups_of_n_of_m_within_the_sweep(inputs) -> None:
    _, w, hessian = problem(0, 2 * inputs)
    _, gone = sweep(torch.from_numpy(w)[None], hessian, Selection(NM(2, 4), 0, inputs, 8))
    full = inputs // 4 * 4
    parts = gone[0].view(OUTPUTS, 2, inputs)
    assert (parts[..., :full].reshape(OUTPUTS, 2, -1, 4).sum(-1) == 2).all()
    assert not parts[..., full:].any()


def test_blocks_within_the_sweep() -> None:
    _, w, hessian = problem(1, 11)
    _, gone = sweep(torch.from_numpy(w)[None], hessian, Selection(Block(2, 3), 5, 11, 4))
    cells = [gone[0, i : i + 2, j : j + 3] for i in (0, 2) for j in (0, 3, 6, 9)]
    assert all(cell.all() or not cell.any() for cell in cells)
    assert sum(bool(cell.any()) for cell in cells) == 5


def test_a_gram_matrix_without_rank_gets_one() -> None:
    x = torch.ones(5, 3, dtype=torch.float64)
    gram, nothing = (x.T @ x)[None], torch.zeros(1, 3, 3)
    assert torch.linalg.matrix_rank(ridged(gram, ridge_of(gram, 0.01))) == 3
    assert torch.equal(ridged(nothing, ridge_of(nothing, 0.01))[0], torch.eye(3))


def test_the_ridge_grows_until_the_matrix_is_positive_definite() -> None:
    x = torch.randn(1, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x.transpose(1, 2) @ x
    shift = 1e-6 * float(gram.diagonal(dim1=1, dim2=2).sum())
    gram = gram - shift * torch.eye(40)
    tried: list[float] = []

    def solve(hessian: torch.Tensor) -> torch.Tensor:
        tried.append(float((hessian - gram)[0].trace()) / 40)
        return torch.linalg.cholesky(hessian)

    factor = regularized(gram, torch.tensor([1e-30]).double(), solve)
    assert shift < tried[-1] <= 10 * shift
    assert len(tried) < 15
    torch.testing.assert_close(
        factor @ factor.transpose(1, 2), gram + tried[-1] * torch.eye(40).double()
    )


@pytest.mark.parametrize("entry", [torch.nan, torch.inf])
def test_what_no_ridge_makes_positive_definite_is_refused(entry) -> None:
    gram = torch.eye(3, dtype=torch.float64)[None]
    gram[0, 1, 1] = entry
    with pytest.raises(torch.linalg.LinAlgError):
        regularized(gram, ridge_of(gram, 0.01), torch.linalg.cholesky)
    with pytest.raises(torch.linalg.LinAlgError):
        regularized(-torch.eye(3)[None], torch.ones(1), torch.linalg.cholesky)


def test_a_solve_that_would_take_too_long_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(sparsegpt, "MAX_SOLVE", 1)
    _, w, hessian = problem(0)
    optimum = torch.from_numpy(w)[None]
    assert solved(optimum, hessian, torch.zeros_like(optimum, dtype=torch.bool)) is None
