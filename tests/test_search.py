"""The target search: bisection, impossible shares, and a target that is really reached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy.search
from rarefy.errors import BudgetError
from rarefy.pruning.prune import prune
from rarefy.pruning.request import Request
from rarefy.search import SHARES, reachable_budget
from rarefy.storage.format import save
from rarefy.types import Budget, Latency, Measurement, Target
from tiny_networks import perceptron

INPUTS = torch.zeros(2, 8)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency and size in proportion to the share; shares below 0.3 are impossible."""

    def small(asked: Request, budget: Budget) -> nn.Module:
        assert budget.macs is not None
        if budget.macs < 0.3:
            raise BudgetError("prune", "out of reach", "Keep more")
        network = nn.Linear(1, 1)
        network.share = budget.macs  # type: ignore[assignment]
        return network

    def written(trial: object, model: nn.Module, name: str) -> tuple[Path, int]:
        share = float(getattr(model, "share", 1.0))  # type: ignore[arg-type]
        return Path(f"{share}"), round(1e6 * share)

    def measured(paths: list[Path], *_: object, **__: object) -> list[Measurement]:
        times = [Latency(float(p.name), float(p.name), float(p.name)) for p in paths]
        return [Measurement(str(p), "", 1, 1, t, 1, 1) for p, t in zip(paths, times, strict=True)]

    monkeypatch.setattr(Request, "to", small)
    monkeypatch.setattr(rarefy.search._Trial, "_write", written)
    monkeypatch.setattr(rarefy.search, "compare", measured)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("target", "share", "outcome"),
    [
        (Target(size=1.1), 0.9, "found"),
        (Target(size=1.4), 0.7, "found"),
        (Target(size=2), 0.5, "found"),
        (Target(speedup=2), 0.35, "found"),  # 0.5 is twice as fast, but not by the margin
        (Target(size=1.1, speedup=1.2), 0.7, "found"),
        (Target(size=2.8), 0.35, "found"),
        (Target(size=3.4), 0.35, "none reaches"),
        (Target(size=1000), 0.35, "none reaches"),
    ],
)
def test_the_largest_share_that_reaches_the_target(
    target: Target, share: float, outcome: str
) -> None:
    found, note = reachable_budget(perceptron(), INPUTS, target, [INPUTS], None)
    assert found == share
    assert outcome in note
    assert f"budget of {share:g} of the MACs" in note


def test_where_no_share_is_possible_pruning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> nn.Module:
        raise BudgetError("prune", "out of reach", "Keep more")

    monkeypatch.setattr(Request, "to", refuse)
    share, note = reachable_budget(perceptron(), INPUTS, Target(size=2), [INPUTS], None)
    assert share == SHARES[0]
    assert "none reaches" in note


def test_a_size_is_really_reached(tmp_path: Path) -> None:
    model = perceptron()
    share, note = reachable_budget(model, INPUTS, Target(size=1.5), [INPUTS], None)
    small = prune(model, INPUTS, Budget(macs=share))
    before, after = (save(m, tmp_path / "m").stat().st_size for m in (model, small))
    assert before / after >= 1.5, note


def test_shares_are_tried_from_large_to_small() -> None:
    assert list(SHARES) == sorted(SHARES, reverse=True)
