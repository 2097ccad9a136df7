"""Options refuse values that mean nothing."""

import json
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest

from rarefy.distillation.soft_labels.records import Sampled, TopK
from rarefy.errors import BudgetError, InputError
from rarefy.pruning.scoring.compensated import Compensated
from rarefy.pruning.sparsity.elements import SparseGPT
from rarefy.pruning.sparsity.patterns import NM, Block
from rarefy.schemes import Int8
from rarefy.types import Budget, Limit, Target, is_count


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"macs": 0.5, "params": 0.5},
        {"macs": 0},
        {"macs": 1.01},
        {"macs": float("nan")},
        {"params": -1},
        {"sparsity": 1},
        {"sparsity": -0.1},
        {"macs": 0.5, "scope": "layer"},
        {"macs": 0.5, "min_keep": 0},
        {"macs": 0.5, "round_to": 0},
        {"macs": 0.5, "max_drop": 0},
        {"macs": 0.5, "max_drop": 1.5},
        {"bytes": 1.5},
        {"latency": 0},
        {"latency": 0.5, "bytes": 0.5},
        {"macs": 0.5, "layers": {"a": None}},
        {"macs": 0.5, "layers": {"a": True}},
        {"macs": 0.5, "layers": {1: 0.5}},
        {"macs": 0.5, "layers": ["a"]},
        {"macs": 0.5, "layers": 0.5},
    ],
)
def test_a_budget_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(BudgetError, match="Budget"):
        Budget(**wrong)


@pytest.mark.parametrize("name", ["min_keep", "max_drop", "round_to"])
def test_a_limit_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(BudgetError, match=rf"{name}=None.*Leave it out"):
        Budget(macs=0.5, **{name: None})


def test_a_max_drop_is_told_to_be_a_share_that_goes() -> None:
    with pytest.raises(BudgetError, match="may go"):
        Budget(macs=0.5, max_drop=0)


@pytest.mark.parametrize("wrong", ["0.5", True, float("inf"), [0.5]])
def test_what_is_no_number_is_refused(wrong: object) -> None:
    for make in (
        lambda: Budget(macs=wrong),
        lambda: Budget(macs=0.5, round_to=wrong),
        lambda: Target(speedup=wrong),
        lambda: Int8("percentile", percentile=wrong),
    ):
        with pytest.raises(InputError, match="number"):
            make()


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"sparsity": 0.5, "min_keep": 3},
        {"sparsity": 1},
        {"min_keep": 0},
        {"max_drop": 1.1},
        {"max_drop": -0.1},
        {"min_keep": 2.5},
        {"max_drop": "half"},
    ],
)
def test_a_limit_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(BudgetError, match="Limit"):
        Limit(**wrong)


def test_a_share_for_a_layer_out_of_range_is_refused() -> None:
    with pytest.raises(BudgetError, match="Limit"):
        Budget(macs=0.5, layers={"a": 1.5})


def test_limits_of_layers_are_values() -> None:
    budget = Budget(macs=0.5, layers={"a": 0.25, "b": Limit(max_drop=0)})
    assert budget.limits == (("a", Limit(sparsity=0.25)), ("b", Limit(max_drop=0)))
    assert hash(budget) == hash(replace(budget, macs=0.5))
    assert replace(budget, macs=None, params=0.5).limits == budget.limits
    assert (budget.kind, budget.share) == ("macs", 0.5)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    assert Budget(latency=1, round_to="auto").kind == "latency"
    assert Budget(macs=1, max_drop=1).macs == 1
    assert Budget(sparsity=0).sparsity == 0
    assert Target(speedup=1, size=1, max_drop=0).size == 1
    assert Int8(observer="percentile", percentile=1).percentile == 1


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Budget(macs=0.5).macs = 0.4


@pytest.mark.parametrize("wrong", [{"observer": "max"}, {"percentile": 0.5}, {"percentile": 2}])
def test_an_int8_option_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match="Int8"):
        Int8(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"speedup": 0.5}, {"size": 0}, {"max_drop": -1}, {"max_drop": 2}]
)
def test_a_target_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match="Target"):
        Target(**wrong)


def test_numbers_of_numpy_are_taken_and_kept_as_pythons() -> None:
    budget = Budget(macs=np.float32(0.5), min_keep=np.int64(4), layers={"a": np.float32(0.25)})
    assert budget == Budget(macs=0.5, min_keep=4, layers={"a": 0.25})
    assert type(budget.macs) is float
    assert type(budget.min_keep) is int
    with pytest.raises(BudgetError, match="finite"):
        Budget(macs=np.float64("nan"))
    with pytest.raises(BudgetError, match="finite"):
        Budget(macs=np.bool_(True))


@pytest.mark.parametrize("value", [1, 512, np.int64(3), np.uint8(1)])
def test_whole_numbers_count(value) -> None:
    assert is_count(value)


@pytest.mark.parametrize("value", [0, -1, True, np.bool_(True), 2.0, np.float32(2), "3", None])
def test_all_else_does_not_count(value) -> None:
    assert not is_count(value)


COUNTED = [
    lambda value: NM(value, 64),
    lambda value: Block(value, 4).rows,
    lambda value: TopK(value).k,
    lambda value: Sampled(value).draws,
    lambda value: SparseGPT(samples=value).samples,
    lambda value: Compensated(shown=value).shown,
]


@pytest.mark.parametrize("make", COUNTED)
def test_options_that_count(make) -> None:
    assert make(np.int64(3)) == make(3)
    assert json.dumps(asdict(NM(np.int64(2), np.int64(4)))) == '{"n": 2, "m": 4}'
    for value in (0, 2.0, True, "3", None):
        with pytest.raises(InputError, match=r"whole number, at least 1. Write \w+=\d+"):
            make(value)
