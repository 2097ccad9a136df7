"""Curves of the user's metric: exact, resumable, kept when the evaluation fails, used to select."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rarefy.copies import fingerprint
from rarefy.errors import BudgetError, FormatError, InputError, OutputError
from rarefy.graph.groups import Group
from rarefy.graph.trace import trace
from rarefy.pruning.prune import prune
from rarefy.pruning.scoring.criteria import CRITERIA, scored
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.sensitivity import EvaluationError, sensitivity
from rarefy.types import Budget
from tiny_networks import perceptron

torch.set_num_threads(1)
DATA = [torch.randn(6, 8, generator=torch.Generator().manual_seed(3))]
RATIOS = (0.25, 0.5)


def distance(model: nn.Module) -> float:
    """How far the outputs are from the whole network's: a loss with a known value."""
    with torch.no_grad():
        return float((model(DATA[0]) - NET(DATA[0])).square().mean())


NET = perceptron().eval()
LOSS = {"ratios": RATIOS, "higher_is_better": False, "progress": False}


def test_each_point_is_the_metric_of_the_network_with_those_units_zeroed() -> None:
    curves = sensitivity(NET, DATA, distance, **LOSS)
    assert curves.base == 0
    assert [(p.group, p.ratio, p.removed, p.units) for p in curves.points] == [
        ("0", 0.25, 6, 24), ("0", 0.5, 12, 24), ("3", 0.25, 6, 24), ("3", 0.5, 12, 24),
    ]  # fmt: skip
    groups = trace(NET, DATA[0]).groups
    parameters = dict(NET.named_parameters())
    for point in curves.points:
        group = next(g for g in groups if g.name == point.group)
        gone = scored(group, Evidence(parameters), CRITERIA["magnitude"]).argsort()[: point.removed]
        small = perceptron().eval()
        with torch.no_grad():
            small[int(point.group)].weight[gone] = 0
            small[int(point.group)].bias[gone] = 0
        assert point.metric == pytest.approx(distance(small))


def test_nothing_of_the_user_changes() -> None:
    net = perceptron().train()

    def ruins(model: nn.Module) -> float:
        assert not model.training
        nn.init.zeros_(model[0].weight)
        return float(torch.rand(()))

    before, state = fingerprint(net), torch.get_rng_state()
    curves = sensitivity(net, DATA, ruins, progress=False)
    assert fingerprint(net) == before
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert len({p.metric for p in curves.points} | {curves.base}) == 1  # the same numbers each time


def test_a_network_is_measured_in_its_own_class_and_ratios_take_at_least_a_unit() -> None:
    seen = []
    curves = sensitivity(
        NET, DATA, lambda m: seen.append(type(m)) or 1.0, ratios=(0.01, 0.99), progress=False
    )
    assert set(seen) == {nn.Sequential}
    assert {p.removed for p in curves.points} == {1, 23}


class Counted:
    """An evaluation that fails at some call."""

    def __init__(self, fails_at: int = 0) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of coffee")
        return distance(model)


def test_a_failing_evaluation_names_where_and_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    with pytest.raises(EvaluationError, match=r"group 0 at ratio 0\.5.*out of coffee") as caught:
        sensitivity(NET, DATA, Counted(3), path=path, **LOSS)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [p.ratio for p in caught.value.measured.points] == [0.25]
    again = Counted()
    curves = sensitivity(NET, DATA, again, path=path, **LOSS)
    assert again.calls == 3
    assert curves == sensitivity(NET, DATA, distance, **LOSS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(EvaluationError, match="the whole network: it returned"):
        sensitivity(NET, DATA, lambda _: value, progress=False)


def test_more_ratios_are_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    sensitivity(NET, DATA, distance, path=path, **LOSS)
    more = Counted()
    curves = sensitivity(NET, DATA, more, path=path, **{**LOSS, "ratios": (0.25, 0.5, 0.75)})
    assert more.calls == 2
    assert len(curves.points) == 6


@pytest.mark.parametrize(
    "other",
    [
        {"model": perceptron(seed=1)},
        {"criterion": "l1"},
        {"higher_is_better": True},
        {"seed": 1},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, other: dict) -> None:
    path = tmp_path / "curves.jsonl"
    sensitivity(NET, DATA, distance, path=path, **LOSS)
    kept = path.read_bytes()
    with pytest.raises(OutputError, match="another network"):
        sensitivity(other.pop("model", NET), DATA, distance, path=path, **{**LOSS, **other})
    assert path.read_bytes() == kept


def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    for text in ("notes\n", '{"format": "other"}\n', "[1]\n", "notes without an end"):
        path.write_text(text)
        with pytest.raises(FormatError, match="no measurements"):
            sensitivity(NET, DATA, distance, path=path, **LOSS)
        assert path.read_text() == text


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_sensitivity import DATA, LOSS, NET, distance
from rarefy.pruning.sensitivity import sensitivity
calls = []
def evaluate(model):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return distance(model)
sensitivity(NET, DATA, evaluate, path={path!r}, **LOSS)
"""


def test_a_kill_loses_one_measurement_at_most(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write('{"group": "3", "ra')  # killed while it wrote
    again = Counted()
    curves = sensitivity(NET, DATA, again, path=path, **LOSS)
    assert again.calls == 2
    assert curves == sensitivity(NET, DATA, distance, **LOSS)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def one_sided(model: nn.Module) -> float:
    """Suffers from whatever the first layer loses, and from nothing else."""
    return -float((model[0].weight == 0).all(1).sum())


@pytest.mark.parametrize("kind", ["params", "macs", "sparsity"])
def test_groups_that_hurt_are_cut_less(kind: str) -> None:
    curves = sensitivity(NET, DATA, one_sided, ratios=(0.25, 0.5, 0.75), progress=False)
    budget = Budget(**{kind: 0.3 if kind == "sparsity" else 0.6})
    small = prune(NET, DATA[0], budget, sensitivity=curves)
    plain = prune(NET, DATA[0], budget)
    assert small[0].out_features > 20 > small[3].out_features
    assert plain[0].out_features < small[0].out_features
    before, after = (sum(p.numel() for p in m.parameters()) for m in (NET, small))
    assert kind != "params" or 0.58 <= after / before <= 0.6


def test_groups_that_were_not_measured_stay_whole() -> None:
    curves = sensitivity(NET, DATA, one_sided, exclude=["3"], progress=False)
    assert curves.groups == ("0",)
    small = prune(NET, DATA[0], Budget(params=0.7), sensitivity=curves)
    assert small[3].out_features == 24
    with pytest.raises(BudgetError, match="smallest share"):
        prune(NET, DATA[0], Budget(params=0.01), sensitivity=curves)


def test_curves_of_another_network_are_refused() -> None:
    curves = sensitivity(NET, DATA, one_sided, progress=False)
    other = nn.Sequential(nn.Linear(8, 23), nn.ReLU(), nn.Linear(23, 3))
    with pytest.raises(InputError, match="measured on another network"):
        prune(other, DATA[0], Budget(macs=0.5), sensitivity=curves)


def test_a_file_instead_of_curves_is_refused() -> None:
    with pytest.raises(InputError, match=r"it is a str.*Sensitivity\.load\(path\)"):
        prune(NET, DATA[0], Budget(macs=0.5), sensitivity="curves.json")


def test_what_is_excluded_is_no_part_of_curves_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    every = sensitivity(NET, DATA, distance, path=path, **LOSS)
    fewer = sensitivity(NET, DATA, distance, path=path, exclude=["0"], **LOSS)
    assert set(fewer.groups) == set(every.groups) - {"0"}
    assert sensitivity(NET, DATA, distance, path=path, **LOSS) == every


def test_shares_that_are_the_same_units_leave_the_slope_beyond_them() -> None:
    def losses(*ratios: float) -> np.ndarray:
        curves = sensitivity(NET, DATA, distance, **{**LOSS, "ratios": ratios})
        (found, *_) = curves.losses(trace(NET, DATA[0]).groups).values()
        return found(np.array([0.25, 0.5, 0.9]))

    assert losses(0.25, 0.5, 0.501, 0.5) == pytest.approx(losses(0.25, 0.5))
    assert losses(0.25, 0.5)[2] > losses(0.25, 0.5)[1]


@pytest.mark.parametrize(
    "value", [None, {"accuracy": 0.5}, torch.ones(2), np.ones(2), 1j, torch.tensor(1j)]
)
def test_what_is_not_one_number_is_refused(value: object) -> None:
    with pytest.raises(EvaluationError, match=r"it returned a \w+ that is not one number"):
        sensitivity(NET, DATA, lambda _: value, progress=False)


def test_ratios_may_be_an_array() -> None:
    shares = np.array([0.25, 0.5])
    found = sensitivity(NET, DATA, distance, **{**LOSS, "ratios": shares})
    assert found == sensitivity(NET, DATA, distance, **{**LOSS, "ratios": tuple(shares.tolist())})


@pytest.mark.parametrize("ratios", [(), (0.5, 1.0), (0,), (True,), ("half",), 0.5])
def test_ratios_that_are_none_are_refused(ratios: tuple) -> None:
    with pytest.raises(InputError, match="ratios"):
        sensitivity(NET, DATA, distance, ratios=ratios)


def test_an_evaluation_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be called"):
        sensitivity(NET, DATA, 0.9)


def test_units_of_weight_normed_layers_are_masked_and_not_divided_by_zero() -> None:
    def in_order(group: Group, evidence: Evidence) -> torch.Tensor:
        return torch.arange(len(group), dtype=torch.float64)

    def first() -> list[float]:
        curves = sensitivity(net, DATA, lambda m: m(DATA[0]).mean(), criterion=in_order, **LOSS)
        return [p.metric for p in curves.points if p.group == "0"]

    net = perceptron().eval()
    expected = first()
    weight_norm(net[0])
    assert first() == pytest.approx(expected, rel=1e-4)


def test_a_metric_with_a_gradient_is_its_value() -> None:
    with_gradient = sensitivity(NET, DATA, lambda m: m(DATA[0]).square().mean(), **LOSS)
    plain = sensitivity(NET, DATA, lambda m: m(DATA[0]).square().mean().item(), **LOSS)
    assert with_gradient.points == plain.points


def test_data_that_can_be_read_once_are_refused() -> None:
    with pytest.raises(InputError, match=r"sensitivity\(data\).*only once"):
        sensitivity(NET, iter(DATA), lambda net: 0.0, progress=False)


def test_columns_of_small_numbers_stand_apart() -> None:
    found = sensitivity(NET, DATA, lambda net: -1.2345678e-5, progress=False)
    cells = str(found).splitlines()[-1].split()
    assert cells[2:] == ["-1.235e-05"] * (len(cells) - 2)
    assert len(cells) > 4


def test_what_a_criterion_keeps_is_left_as_it_is() -> None:
    group = trace(NET, DATA[0][0]).groups[0]
    held = torch.arange(len(group), dtype=torch.float64)
    scored(group, Evidence(dict(NET.named_parameters())), lambda *_: held)[:] = -1
    assert torch.equal(held, torch.arange(len(group), dtype=torch.float64))


def test_a_parameter_that_is_not_finite_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    net[2].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"2\.weight"):
        sensitivity(net, [torch.randn(8, 4)], lambda m: 0.0)
