"""One layer's solves against NumPy, optimality conditions and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.pruning.repairing import system
from rarefy.pruning.repairing.system import (
    Mean,
    Weights,
    conjugate_gradients,
    masked,
    ridge_for,
    solve,
)
from rarefy.pruning.sparsity.gram import Sums
from rarefy.pruning.sparsity.sparsegpt import ridged

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(x: Tensor, y: Tensor) -> Sums:
    sums = Sums.empty(len(x), x.shape[2], y.shape[2])
    sums.add(x, y)
    return sums


def weights(groups: int, outputs: int, unknowns: int, mean: Mean = Mean.BIAS, **more) -> Weights:
    zeros = torch.zeros(groups, 1, outputs, dtype=torch.float64)
    return Weights(torch.zeros(groups, outputs, unknowns).double(), zeros, mean, **more)


def regular(sums: Sums) -> Tensor:
    """The raw Gram matrix with its ridge."""
    gram = sums.raw().xx
    return ridged(gram, ridge_for(gram, sums))


@pytest.fixture
def exact(monkeypatch):
    """No regularization, so that NumPy's least squares are the same."""
    monkeypatch.setattr(system, "RIDGE", 0.0)
    monkeypatch.setattr(system, "FLOOR", 1e-14)
    monkeypatch.setattr(system, "NOISE", 0.0)


@pytest.mark.parametrize("mean", list(Mean))
def test_the_solution_is_that_of_numpy(mean, exact) -> None:
    x = randn(1, 200, 5) + 1
    y = x @ randn(1, 5, 3, seed=4) + randn(1, 200, 3, seed=1) + 2
    found = solve(gram(x[:, 40:], y[:, 40:]), gram(x[:, :40], y[:, :40]), weights(1, 3, 5, mean))
    a, b = x[0, 40:].numpy(), y[0, 40:].numpy()
    design = a if mean is Mean.NONE else np.hstack([a, np.ones((160, 1))])
    expected = np.linalg.lstsq(design, b, rcond=None)[0]
    np.testing.assert_allclose(found.values[0].numpy(), expected[:5].T, rtol=1e-7)
    offset = expected[5] if mean is Mean.BIAS else np.zeros(3)
    np.testing.assert_allclose(found.bias[0, 0].numpy(), offset, rtol=1e-7)
    rest = x[0, :40].numpy() @ expected[:5] + offset - y[0, :40].numpy()
    level = y[0, :40].numpy()
    if mean is Mean.NORM:
        rest, level = rest - rest.mean(0), level - level.mean(0)
    assert found.errors[1] == pytest.approx((rest**2).sum() / (level**2).sum())
    assert found.errors[0] == pytest.approx(1.0)


def test_groups_are_solved_one_by_one(exact) -> None:
    x, y = randn(2, 100, 3), randn(2, 100, 4, seed=1)
    parts = [(x[g : g + 1], y[g : g + 1]) for g in range(2)]
    whole, *single = (
        system.least_squares(sums.raw(), regular(sums), weights(len(a), 4, 3))
        for a, b in ((x, y), *parts)
        for sums in [gram(a, b)]
    )
    torch.testing.assert_close(whole, torch.cat(single))


def sparse_case(outputs: int, unknowns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(200, unknowns, seed=seed) @ randn(unknowns, unknowns, seed=seed + 1)
    y = randn(200, outputs, seed=seed + 2)
    generator = torch.Generator().manual_seed(seed)
    return x, y, torch.rand(outputs, unknowns, generator=generator) < 0.5


@pytest.mark.parametrize("direct", [0.0, float("inf")])
def test_sparse_rows_are_numpys_least_squares_over_what_they_keep(direct, exact, monkeypatch):
    monkeypatch.setattr(system, "DIRECT", direct)
    x, y, gone = sparse_case(4, 12, 3)
    sums = gram(x[None], y[None])
    given = weights(1, 4, 12, Mean.NONE, gone=gone[None])
    found = system.least_squares(sums.raw(), regular(sums), given)[0]
    for row in range(4):
        kept = (~gone[row]).nonzero().flatten()
        expected = np.linalg.lstsq(x[:, kept].numpy(), y[:, row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[row, kept].numpy(), expected, rtol=1e-4, atol=1e-7)
    assert not found[gone].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), direct=st.sampled_from([0.0, float("inf")]))
def test_the_gradient_vanishes_at_what_stays(seed, direct) -> None:
    """The optimality conditions of the masked problem, by whichever way it is solved."""
    x, y, gone = sparse_case(3, 8, seed)
    start = randn(1, 3, 8, seed=seed + 5).masked_fill(gone[None], 0.0)
    sums = gram(x[None], y[None]).raw()
    hessian = regular(sums)
    held = (system.DIRECT, direct)
    system.DIRECT = direct
    try:
        given = Weights(start, torch.zeros(1, 1, 3).double(), Mean.NONE, gone[None])
        found = system.least_squares(sums, hessian, given)
    finally:
        system.DIRECT = held[0]
    ridge = (hessian - sums.xx)[0].diagonal()
    gradient = (found[0] @ x.T - y.T) @ x + ridge * (found - start)[0]
    level = (start[0] @ x.T - y.T) @ x
    assert float(gradient[~gone].abs().max()) < 1e-4 * float(level.abs().max())
    assert not found[0][gone].any()


def test_stopping_early_is_between_the_start_and_the_optimum(monkeypatch) -> None:
    x, y, gone = sparse_case(4, 12, 7)
    sums = gram(x[None], y[None]).raw()
    hessian = regular(sums)
    start = randn(1, 4, 12, seed=9).masked_fill(gone[None], 0.0)
    optimum = system.moved(start, sums.xx, sums.xy, hessian)

    def costs(w: Tensor) -> Tensor:
        return (((w - optimum) @ hessian) * (w - optimum)).sum(2)

    last = costs(start)
    for steps in (1, 2, 4, 8):
        monkeypatch.setattr(system, "STEPS", steps)
        now = costs(conjugate_gradients(optimum, hessian, gone[None], start))
        assert bool((now <= last * (1 + 1e-9)).all())
        last = now
    best = costs(masked(optimum, hessian, gone[None], start))
    assert bool((best <= last * (1 + 1e-9)).all())


@pytest.mark.parametrize("kind", ["zero", "constant", "twice", "few", "one row"])
@pytest.mark.parametrize("mean", list(Mean))
@pytest.mark.parametrize("is_sparse", [False, True])
def test_systems_without_one_solution_are_solved_and_never_worse(kind, mean, is_sparse) -> None:
    x = {
        "zero": torch.zeros(1, 50, 6).double(),
        "constant": torch.full((1, 50, 6), 3.0).double(),
        "twice": randn(1, 50, 3).repeat(1, 1, 2),
        "few": randn(1, 4, 6),
        "one row": randn(1, 2, 6),
    }[kind]
    y = randn(1, x.shape[1], 2, seed=2)
    present = randn(1, 2, 6, seed=3)
    gone = torch.zeros(1, 2, 6, dtype=torch.bool)
    gone[:, :, ::2] = is_sparse
    present = present.masked_fill(gone, 0.0)
    start = Weights(present, torch.zeros(1, 1, 2).double(), mean, gone if is_sparse else None)
    half = max(x.shape[1] // 2, 1)
    check = gram(x[:, :half].float(), y[:, :half].float())
    found = solve(gram(x[:, half:].float(), y[:, half:].float()), check, start)
    assert torch.isfinite(found.values).all()
    assert found.errors[1] <= found.errors[0]
    assert found.is_better or torch.equal(found.values, present)
    assert not found.values[gone].any() or not is_sparse


def test_where_weights_do_not_help_the_bias_alone_is_corrected() -> None:
    """Few rows to fit say nothing of the weights, and much of the level."""
    x = randn(1, 400, 30)
    true = randn(1, 2, 30, seed=1)
    y = x @ true.transpose(1, 2) + 5
    y[:, :8] += 0.5 * randn(1, 8, 2, seed=2)
    given = Weights(true, torch.zeros(1, 1, 2).double(), Mean.BIAS)
    found = solve(gram(x[:, :8], y[:, :8]), gram(x[:, 8:], y[:, 8:]), given)
    assert torch.equal(found.values, true)
    torch.testing.assert_close(found.bias, torch.full((1, 1, 2), 5.0).double(), rtol=0.2, atol=0)
    assert found.is_better


def test_where_the_inputs_are_constant_the_bias_alone_is_corrected() -> None:
    """In single precision, sums less their means are not positive definite then."""
    x = randn(1, 1, 17).float().expand(1, 8192, 17)
    y = torch.full((1, 8192, 2), 3.0)
    given = Weights(randn(1, 2, 17, seed=1), torch.zeros(1, 1, 2).double(), Mean.BIAS)
    found = solve(gram(x, y), gram(x[:, :50], y[:, :50]), given)
    assert torch.equal(found.values, given.values)
    assert found.errors[1] < 1e-6


def test_sums_that_are_not_finite_are_refused_or_change_nothing() -> None:
    x, y = randn(1, 50, 4), randn(1, 50, 2, seed=1)
    broken = gram(x * torch.nan, y)
    given = weights(1, 2, 4)
    assert broken.error(given.values.transpose(1, 2), given.bias) == float("inf")
    try:
        found = solve(broken, gram(x, y), given)
    except RuntimeError:
        return
    assert torch.equal(found.values, given.values)


@pytest.mark.parametrize("level", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("unknowns", [5, 400])
def test_few_rows_that_hardly_differ_are_solved_in_single_precision(level, unknowns) -> None:
    scale = torch.logspace(-4, 0, unknowns, dtype=torch.float64)
    x = ((level + 1e-3 * randn(1, 20, unknowns)) * scale).float()
    w = randn(1, unknowns, 3, seed=1)
    y = x @ w.float()
    found = solve(gram(x[:, 5:], y[:, 5:]), gram(x[:, :5].double(), y[:, :5].double()),
                  weights(1, 3, unknowns))  # fmt: skip
    assert found.values.isfinite().all()
    assert found.errors[1] <= found.errors[0]


@pytest.mark.parametrize("mean", [Mean.BIAS, Mean.NORM])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_inputs_far_from_zero_are_solved_in_single_precision_as_in_double(mean, is_sparse) -> None:
    x = randn(1, 600, 6) @ randn(6, 6, seed=1) + 3000
    y = x @ randn(1, 6, 2, seed=2) + randn(1, 600, 2, seed=3)
    gone = (randn(1, 2, 6, seed=4) > 0.5) if is_sparse else None
    given = weights(1, 2, 6, mean, gone=gone)
    x, y = x.float(), y.float()  # the same rows for both
    check = gram(x[:, 500:].double(), y[:, 500:].double())
    found, expected = (
        solve(gram(x[:, :500].to(kind), y[:, :500].to(kind)), check, given)
        for kind in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=1e-4)
    assert found.errors[1] == pytest.approx(expected.errors[1], rel=1e-3)


def test_inputs_that_differ_by_rounding_alone_are_not_solved_on() -> None:
    """What is left of their spread is noise, which no weights are to be made of."""
    x = (1000 * (1 + torch.finfo(torch.float32).eps * randn(1, 400, 5))).float()
    y = 1e-3 * randn(1, 400, 2, seed=1).float() + 3
    present = randn(1, 2, 5, seed=2)
    given = Weights(present, torch.zeros(1, 1, 2).double(), Mean.BIAS)
    found = solve(gram(x[:, 80:], y[:, 80:]), gram(x[:, :80].double(), y[:, :80].double()), given)
    assert found.is_better
    assert float((found.values - present).abs().max()) < 0.1 * float(present.abs().max())


def test_a_matrix_that_cannot_be_factored_gets_a_larger_ridge(monkeypatch) -> None:
    x = randn(1, 300, 8)
    y = x @ randn(1, 8, 2, seed=1)
    plain = torch.linalg.cholesky
    calls: list[float] = []

    def strict(matrix: Tensor, **options: bool) -> Tensor:
        calls.append(float(matrix.diagonal(dim1=-2, dim2=-1).min()))
        if len(calls) < 3:
            raise torch.linalg.LinAlgError("the input is not positive-definite")
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky", strict)
    found = solve(gram(x[:, 60:], y[:, 60:]), gram(x[:, :60], y[:, :60]), weights(1, 2, 8))
    assert sorted(calls) == calls
    assert found.errors[1] < 0.05
