"""Budgets that are measured: reached by correcting, and never missed silently."""

import warnings
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy as rf
from rarefy import measured
from rarefy.errors import BudgetError, InputError, OutputError
from rarefy.measured import CLOSE, Served, reach
from rarefy.pruning import prune as pruning
from rarefy.pruning import request as request_file
from rarefy.storage.format import save
from rarefy.types import Budget, Latency, Measurement, Ratio
from residual_networks import Residual, inputs
from tiny_networks import perceptron

torch.set_num_threads(1)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def wide(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
        ).eval()


def made(share: float) -> nn.Module:
    network = nn.Identity()
    network.asked = share
    return network


@QUICK
@given(st.floats(0.1, 0.95), st.floats(0.3, 3), st.floats(0, 0.3))
def test_corrections_reach_any_rising_relation(wanted, power, offset) -> None:
    def relation(share: float) -> tuple[nn.Module, Ratio]:
        return made(share), Ratio.exact(offset + (1 - offset) * share**power)

    if wanted < offset + 0.05:
        return
    small = reach(Budget(bytes=wanted), relation)
    assert relation(small.asked)[1].value <= wanted


def test_the_first_that_comes_close_is_taken() -> None:
    asked = []

    def exact(share: float) -> tuple[nn.Module, Ratio]:
        asked.append(share)
        return made(share), Ratio.exact(share - CLOSE / 2)

    assert reach(Budget(latency=0.5), exact).asked == 0.5
    assert asked == [0.5]


def test_a_share_that_overshoots_is_corrected_upwards() -> None:
    small = reach(Budget(latency=0.6), lambda s: (made(s), Ratio.exact(s**2)))
    assert 0.58 <= small.asked**2 <= 0.62


def test_shares_that_are_refused_do_not_end_the_search() -> None:
    """A steep place between widths, and costs of layers that rule out what would be asked for."""

    def steep(share: float) -> tuple[nn.Module, Ratio]:
        if share < 0.535:
            raise BudgetError("prune", "the smallest share that can remain is 0.535", "Keep more")
        found = 0.72 + (share - 0.61) * 1.1 if share > 0.61 else 0.5 + max(0, share - 0.59) * 11
        return made(share), Ratio.exact(found)

    assert 0.69 < steep(reach(Budget(latency=0.7), steep).asked)[1].value < 0.72


def test_where_all_miss_the_error_says_what_was_measured() -> None:
    with pytest.raises(BudgetError, match=r"measured is 0\.8.* latency=0\.8\d* or more"):
        reach(Budget(latency=0.5), lambda s: (made(s), Ratio.exact(0.8 + 0.2 * s)))


def test_where_nothing_is_faster_the_error_says_so() -> None:
    with pytest.raises(BudgetError, match="no smaller network is faster"):
        reach(Budget(latency=0.5), lambda s: (made(s), Ratio.exact(1.1)))
    with pytest.raises(BudgetError, match=r"no smaller network is faster\. Ask for a larger share"):
        reach(Budget(latency=0.5), lambda s: (made(s), Ratio(0.99, 0.98, 1.01)))


def test_where_pruning_refuses_the_error_says_why() -> None:
    def refuses(share: float) -> tuple[nn.Module, Ratio]:
        if share < 0.7:
            raise BudgetError("prune", "the smallest share that can remain is 0.700", "Keep more")
        return made(share), Ratio.exact(share)

    message = r"; by its parameters alone, the smallest share that can remain is 0\.700"
    with pytest.raises(BudgetError, match=message) as caught:
        reach(Budget(bytes=0.5), refuses)
    assert "measured is 0.7" in caught.value.what or "measured is 0.8" in caught.value.what


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_budget_of_bytes_is_that_of_the_files(share: float, tmp_path: Path) -> None:
    net = wide()
    small = rf.prune(net, X, Budget(bytes=share))
    before, after = (save(m, tmp_path / "m").stat().st_size for m in (net, small))
    assert share - CLOSE <= after / before <= share


class Clock:
    """A runtime in which a network's time is in proportion to its parameters, but for a factor."""

    def __init__(self, patch: pytest.MonkeyPatch, base: float = 0.0) -> None:
        self.base, self.shares = base, []
        patch.setattr(measured, "export", self.export)
        patch.setattr(measured, "relative", self.relative)
        patch.setattr(measured, "compare", lambda paths, *_, **__: [self.measurement(*paths)])
        patch.setattr(measured.Cache, "get", self.layers)

    def export(self, model: nn.Module, path: Path, inputs: object) -> Path:
        path.write_text(str(self.size(model)))
        return path

    def size(self, model: nn.Module) -> float:
        return self.base + sum(p.numel() for p in model.parameters())

    def measurement(self, path: Path | nn.Module) -> Measurement:
        size = self.size(path) if isinstance(path, nn.Module) else path.read_text()
        ms = float(size)
        return Measurement(str(path), "made up 1", 1, 1, Latency(ms, ms, ms), 1, 1)

    def relative(self, before: Path, after: Path, inputs: object, **_: object):
        first, second = self.measurement(before), self.measurement(after)
        self.shares.append(second.latency_ms.median / first.latency_ms.median)
        return first, second, Ratio.exact(self.shares[-1])

    def layers(self, layers: list, measure: object) -> dict:
        return {layer: float(layer.inner * layer.outer) for layer in layers}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_a_budget_of_latency_is_that_of_the_exported_network(share: float, clock: Clock) -> None:
    small = rf.prune(wide(), X, Budget(latency=share))
    assert isinstance(small.served, Served)
    assert small.served.share in clock.shares
    assert small.served.faster
    assert small.served.share <= share + CLOSE
    assert {m.out_features % 16 for m in small if isinstance(m, nn.Linear)} == {0, 4}
    with torch.no_grad():
        assert small(X).shape == (2, 4)


def test_a_constant_part_is_corrected_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, base=40_000)
    small = rf.prune(wide(), X, Budget(latency=0.7, round_to=4))
    assert len(clock.shares) > 1
    assert 0.7 - 2 * CLOSE <= small.served.share <= 0.7 + CLOSE


def test_a_latency_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, base=10_000_000)
    with pytest.raises(BudgetError, match=r"latency=0\.5.*smallest share that was measured") as one:
        rf.prune(wide(), X, Budget(latency=0.5))
    assert "whole blocks may go" in str(one.value)
    with pytest.raises(BudgetError) as both:
        rf.prune(wide(), X, Budget(latency=0.5), structure=("channel", "depth"))
    assert "whole blocks may go" not in str(both.value)


@pytest.mark.usefixtures("clock")
def test_any_budget_can_be_timed() -> None:
    small = rf.prune(wide(), X, Budget(params=0.5), runtime="onnxruntime")
    assert small.served.share == pytest.approx(0.5, abs=CLOSE)
    assert not hasattr(rf.prune(wide(), X, Budget(params=0.5)), "served")


@pytest.mark.usefixtures("clock")
def test_a_network_that_is_not_faster_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="not faster in made up 1"):
        small = rf.prune(wide(), X, Budget(macs=1.0), runtime="onnxruntime")
    assert not small.served.faster


def test_an_unknown_runtime_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="unknown runtime"):
        rf.prune(wide(), X, Budget(latency=0.5), runtime="abacus")


def test_automatic_widths_are_those_of_the_runtime() -> None:
    with pytest.warns(RuntimeWarning, match="rounding"):  # steps of 16 units leap over the half
        small = rf.prune(wide(), X, Budget(params=0.5, round_to="auto"))
    assert {m.out_features % 16 for m in small if isinstance(m, nn.Linear)} == {0, 4}


def test_what_layers_take_whatever_the_budget_is_told() -> None:
    budget = Budget(params=0.9, layers={"0": 0.75})
    with pytest.warns(RuntimeWarning, match="layers= takes"):
        small = rf.prune(wide(), X, budget)
    assert small.pruned.left < 0.8


def test_measured_budgets_need_the_measuring_prune() -> None:
    for kind in ("bytes", "latency"):
        with pytest.raises(BudgetError, match=r"rarefy\.prune"):
            pruning.prune(perceptron(), X, Budget(**{kind: 0.5}))


def test_the_options_are_those_of_the_pruning() -> None:
    own = {n for n, p in signature(pruning.request).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(pruning.PruneOptions.__annotations__) == own


def test_noise_around_a_budget_leads_nowhere() -> None:
    """An early share that noise puts on the wrong side must not close the way to the right one."""
    generator = np.random.default_rng(0)
    asked = []

    def noisy(share: float) -> tuple[nn.Module, Ratio]:
        asked.append(share)
        true = 0.2 + 0.8 * share
        seen = true + (0.08 if len(asked) == 2 else generator.normal(0, 0.01))
        return made(share), Ratio(seen, seen - 0.1, seen + 0.1)

    small = reach(Budget(latency=0.6), noisy)
    assert 0.2 + 0.8 * small.asked == pytest.approx(0.6, abs=3 * CLOSE)


def test_what_was_measured_is_told_with_its_noise() -> None:
    with pytest.raises(BudgetError, match=r"is 0\.900 \(0\.880 to 0\.920\)"):
        reach(Budget(latency=0.5), lambda s: (made(s), Ratio(0.9, 0.88, 0.92)))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("structure", ["depth", ("channel", "depth")])
def test_blocks_go_for_a_budget_of_latency(structure: object) -> None:
    net = Residual(("Basic", "Basic", "Basic"))
    budget = Budget(latency=0.5, round_to=1 if structure == "depth" else 2)
    small = rf.prune(net, inputs(), budget, structure=structure)
    assert small.pruned.blocks
    assert small.served.share <= 0.5 + CLOSE
    assert small.served.share in [ratio.value for ratio in small.served.tried]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("runtime", ["openvino", "eager", "compile", "executorch"])
def test_every_runtime_serves_a_budget(runtime: str) -> None:
    small = rf.prune(wide(), X, Budget(latency=0.6), runtime=runtime)
    assert small.served.share <= 0.6 + CLOSE
    assert {m.out_features % 16 for m in small if isinstance(m, nn.Linear)} == {0, 4}


@pytest.mark.slow
def test_a_latency_is_reached_in_onnxruntime(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 8, 1),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        small = rf.prune(net, x, Budget(latency=0.5))
    assert small.served.share <= 0.5 + CLOSE
    assert small.served.before.runtime.startswith("onnxruntime")
    assert all(m.out_channels % 16 == 0 for m in list(small)[:-1] if isinstance(m, nn.Conv2d))
    assert list(tmp_path.glob("layers-*.json"))


class Shuffled:
    """Batches in an order that is drawn anew from the global generators."""

    def __iter__(self):
        np.random.random()  # noqa: NPY002
        order = torch.randperm(64)
        return iter([torch.randn(64, 8, generator=torch.Generator().manual_seed(0))[order]])


@pytest.mark.parametrize(
    "call",
    [
        lambda net: rf.prune(net, X, Budget(macs=0.5), data=Shuffled()),
        lambda net: rf.prune(net, X, Budget(macs=0.5), data=Shuffled(), criterion="compensated"),
        lambda net: rf.prune(net, X, structure="2:4", data=Shuffled()),
        lambda net: rf.repair(net, rf.prune(net, X, Budget(macs=0.5)), Shuffled()),
        lambda net: rf.sensitivity(
            net, Shuffled(), lambda m: float(m(X).detach().sum()), progress=False
        ),
    ],
)
def test_global_generators_go_on_as_if_nothing_had_been_drawn(call) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before, others = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    call(wide())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], others)  # noqa: NPY002


def test_a_budget_of_bytes_speaks_of_bytes_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        small = rf.prune(wide(), X, Budget(bytes=0.3, round_to=64))
    assert "params" not in small.pruned.missed


def test_sparse_networks_are_timed_where_a_runtime_is_named() -> None:
    with pytest.raises(InputError, match="nonsense"):
        rf.prune(wide(), X, Budget(sparsity=0.5), structure="weight", runtime="nonsense")
    with pytest.raises(InputError, match="none were given"):
        rf.prune(wide(), None, structure="2:4", runtime="onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # zeros alone are seldom faster
        sparse = rf.prune(wide(), X, structure="2:4", runtime="onnxruntime")
    assert sparse.served.after.latency_ms.median > 0


@pytest.mark.parametrize(
    ("kind", "structure"), [("bytes", "channel"), ("latency", "channel"), ("latency", "both")]
)
def test_units_are_scored_once_and_latency_needs_no_repair(kind, structure, monkeypatch) -> None:
    """However many networks are made and measured on the way to a budget."""
    clock, scored, healed, saved = Clock(monkeypatch, base=40_000), [], [], []
    net = wide() if structure == "channel" else Residual(("Basic", "Basic", "Basic")).eval()
    x = X if structure == "channel" else inputs()
    judged, repair, real = request_file.judged, request_file.repair, measured.save

    def noting(held: list, function: object) -> object:
        def noted(*args: object, **options: object) -> object:
            held.append(args[0])
            return function(*args, **options)

        return noted

    monkeypatch.setattr(request_file, "judged", noting(scored, judged))
    monkeypatch.setattr(request_file, "repair", noting(healed, repair))
    monkeypatch.setattr(measured, "save", noting(saved, real))
    several = {"both": ("channel", "depth")}.get(structure, structure)
    share = 0.7 if structure == "channel" else 0.97
    small = rf.prune(net, x, Budget(**{kind: share}), structure=several, data=[x, x])
    assert len(saved) > 2 or len(clock.shares) > 1
    assert [one is net for one in scored].count(True) == 1
    rounds = len(saved) - 1 if kind == "bytes" else 1  # files depend on the values
    assert healed == [net] * rounds
    assert small.repaired.samples > 0
    if kind == "latency":
        assert small.served.share in clock.shares


def test_a_budget_of_bytes_is_that_of_the_repaired_file(tmp_path: Path) -> None:
    """Weights that half of their bits tell make small files; those that repair solves do not."""
    net, x = wide().bfloat16().float(), torch.randn(64, 8)
    small = rf.prune(net, x, Budget(bytes=0.6), data=[x])
    assert small.repaired.errors
    before, after = (save(m, tmp_path / "m").stat().st_size for m in (net, small))
    assert after / before <= 0.6
    assert small.pruned.left == pytest.approx(after / before)


def test_what_a_budget_of_latency_misses_is_told_of_it_alone(monkeypatch) -> None:
    Clock(monkeypatch, base=120_000)
    small = rf.prune(wide(), X, Budget(latency=0.95))
    assert "latency=0.95 was asked for" in small.pruned.missed or not small.pruned.missed
    assert small.pruned.left == small.served.share
    assert small.pruned.missed.count("was asked for") <= 1


def test_options_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"prune\(\) got an unexpected keyword argument 'bogus'"):
        rf.prune(wide(), X, Budget(macs=0.5), bogus=1)


def test_no_folder_is_needed_where_nothing_is_measured(monkeypatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measured, "TemporaryDirectory", full)
    assert rf.prune(wide(), X, Budget(macs=0.5)).pruned
    with pytest.raises(OutputError, match=r"No space left on device.*TMPDIR"):
        rf.prune(wide(), X, Budget(bytes=0.5))
