"""Networks of the zoo, pruned with proof, and the machinery that measures them."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import zoo
import zoo_table
from zoo_networks import networks
from zoo_own import OWN

torch.set_num_threads(1)

HALF = rf.Budget(sparsity=0.5, scope="local")

ZEROED = (
    "tcn keyword_spotter unet_transposed unet_upsampled dncnn detector dcgan espcn squeeze_excite "
    "mobilenet channel_shuffle autoencoder dense_3d gated_units two_towers lstm_speech gru_speech"
).split()
"""Own networks in which no statistic is taken over channels: they equal plain zeroing."""

OTHERS = (
    "torchvision/squeezenet1_1 torchvision/shufflenet_v2_x0_5 torchvision/mnasnet0_5 timm/test_vit "
    "timm/test_byobnet timm/lcnet_050 transformers/bert transformers/gpt2 transformers/t5"
).split()

LARGE = "torchvision/resnet18 torchvision/swin_t timm/efficientvit_m0".split()


def build(name: str) -> tuple[nn.Module, Any]:
    library = name.partition("/")[0]
    if library != "own":
        pytest.importorskip(library)
    torch.manual_seed(0)
    return networks()[name]()


def zeroed(model: nn.Module, kept: Any) -> nn.Module:
    """The model in float64 with all entries set to zero that a pruning removed."""
    reference = copy.deepcopy(model).double()
    state = reference.state_dict()
    for (path, dim), entries in kept.items():
        gone = np.setdiff1d(np.arange(state[path].shape[dim]), entries)
        state[path].index_fill_(dim, torch.from_numpy(gone), 0)
    return reference


def check(name: str, folder: Path) -> None:
    """Half of every group goes with proof; what is left is stored and comes back the same."""
    model, inputs = build(name)
    small: Any = rf.prune(model, inputs, HALF)
    assert small.pruned.kind == "module", small.pruned.reason
    assert small.pruned.error < 1e-3
    assert zoo.parameters(small) < 0.9 * zoo.parameters(model)
    before, after = zoo.outputs(model, inputs), zoo.outputs(small, inputs)
    assert [t.shape for t in before] == [t.shape for t in after]
    zoo.loss_of(small, inputs).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in small.parameters())

    path = rf.save(small, folder / "small.safetensors")
    torch.manual_seed(1)
    again = zoo.outputs(rf.load(path, networks()[name]()[0]), inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, again, strict=True))


@pytest.mark.parametrize("name", [f"own/{name}" for name in OWN])
def test_own_networks_keep_their_class_with_proof(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_the_libraries_keep_their_class_with_proof(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_larger_networks_keep_their_class_with_proof(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", ZEROED)
def test_without_statistics_over_channels_pruned_equals_zeroed(name: str) -> None:
    model, inputs = build(f"own/{name}")
    model.eval()
    small: Any = rf.prune(model, inputs, HALF)
    wide = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.double, inputs)
    expected = zoo.outputs(zeroed(model, small.pruned.kept), wide)
    found = zoo.outputs(small.double(), wide)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_every_family_has_its_networks() -> None:
    families = [name.partition("/")[0] for name in networks()]
    assert families.count("own") >= 25
    for library, least in (("torchvision", 70), ("timm", 150), ("transformers", 40)):
        if library in sys.modules:
            assert families.count(library) >= least


# --- the machinery -----------------------------------------------------------------------------


def network() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)


def dead(_: zoo.Subject) -> zoo.Figures:
    raise SystemExit(3)


def stuck(_: zoo.Subject) -> zoo.Figures:
    time.sleep(60)
    return {}


def busy(_: zoo.Subject) -> zoo.Figures:
    while True:
        pass


def wrong(_: zoo.Subject) -> zoo.Figures:
    raise ValueError("three")


def test_the_steps_of_a_network_are_recorded_as_they_pass() -> None:
    subject = zoo.Subject(network)
    found = {name: step(subject) for name, step in zoo.RAREFY.items()}
    assert found["build"] == {"params": 58, "outputs": 1}
    assert (found["trace"]["groups"], found["trace"]["units"]) == (1, 8)
    # all but the two biases of the outputs belongs to a hidden unit
    assert found["trace"]["prunable"] == pytest.approx(56 / 58, abs=1e-4)
    assert found["prune 0.25"]["removed"] == pytest.approx(2 * 7 / 58, abs=1e-4)
    assert found["prune 0.5"]["removed"] == pytest.approx(4 * 7 / 58, abs=1e-4)
    assert found["prune 0.5"]["kind"] == "module"
    assert found["backward"] == {"mode": "train", "gradients": 4}
    assert found["save and load"]["bytes"] > 0
    assert zoo.faults({"name": "own/one", "steps": found}) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_that_die_hang_or_raise_leave_a_record(monkeypatch) -> None:
    monkeypatch.setattr(zoo, "PATIENCE", 2)
    steps: dict[str, zoo.Step] = {"build": zoo.built}
    tasks: list[zoo.Task] = [
        ("own/dead", network, {**steps, "dead": dead}, 30),
        ("own/stuck", network, {**steps, "stuck": stuck}, 3),
        ("own/busy", network, {**steps, "busy": busy}, 3),
        ("own/wrong", network, {**steps, "wrong": wrong, "trace": zoo.traced}, 30),
    ]
    limits = zoo.Limits(workers=2, seconds=30, gigabytes=32, budget=60)
    records = {record["name"]: record["steps"] for record in zoo.run(tasks, limits)}
    assert all(found["build"]["params"] == 58 for found in records.values())
    assert records["own/dead"]["dead"]["failed"] == "the process ended with code 3"
    assert records["own/stuck"]["stuck"]["failed"] == "time limit"
    assert records["own/busy"]["busy"]["failed"] == "time limit"
    assert records["own/wrong"]["wrong"]["failed"] == "ValueError: three"
    assert "test_zoo.py" in records["own/wrong"]["wrong"]["line"]
    assert records["own/wrong"]["trace"]["groups"] == 1


def test_no_task_starts_after_the_budget() -> None:
    limits = zoo.Limits(workers=1, seconds=30, gigabytes=32, budget=0)
    assert list(zoo.run([("own/one", network, {"build": zoo.built}, 30)], limits)) == []


def record(name: str, **steps: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "anew": True, "steps": {k.replace("_", " "): v for k, v in steps.items()}}


TRACE = {"cpu_seconds": 0.5, "groups": 2, "prunable": 0.8, "frozen": []}
GOOD = {"kind": "module", "reason": "", "error": 1e-9, "removed": 0.6}
GRAPH = {**GOOD, "kind": "graph", "reason": "states | sizes", "line": "net.py:3"}
BAD = {"failed": "ProofError: differs", "clear": False, "line": "proof.py:1"}
REFUSED = {"failed": "CaptureError: no", "clear": True, "line": ""}


def test_faults_are_what_fails_unexpectedly_and_what_loses_its_class() -> None:
    assert zoo.faults(record("a", trace=TRACE, prune_05=GOOD)) == []
    assert zoo.faults(record("a", trace=REFUSED)) == []
    assert zoo.faults(record("a", save_and_load=REFUSED)) == ["save and load: CaptureError: no []"]
    assert zoo.faults(record("a", prune_05=BAD)) == ["prune 05: ProofError: differs [proof.py:1]"]
    assert zoo.faults(record("a", prune_05=GRAPH)) == ["prune 05: graph: states | sizes [net.py:3]"]
    low = zoo.faults(record("a", trace={**TRACE, "prunable": 0.1, "frozen": ["sort: why"]}))
    assert low == ["prunable 0.1: sort: why"]
    assert zoo.faults({"name": "a", "steps": {"torch-pruning": BAD}}) == []


def test_later_lines_replace_or_add_to_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "zoo.jsonl"
    other = {"name": "a", "anew": False, "steps": {"torch-pruning": {"seconds": 1}}}
    lines = [record("a", trace=TRACE, prune=BAD), other]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(zoo.read(path)["a"]["steps"]) == {"trace", "prune", "torch-pruning"}
    path.write_text(path.read_text() + json.dumps(record("a", trace=TRACE)) + "\n")
    assert set(zoo.read(path)["a"]["steps"]) == {"trace", "torch-pruning"}
    assert zoo.read(tmp_path / "none.jsonl") == {}


def chosen(**options: Any) -> argparse.Namespace:
    given = {"only": ["own/*"], "redo": [], "failed": False, "onnx": False, "torch_pruning": False}
    return argparse.Namespace(**{**given, "seconds": 9.0, "steps": None, **options})


def test_a_run_continues_where_it_stopped() -> None:
    held = {"own/dncnn": record("own/dncnn", trace=TRACE), "own/tcn": record("own/tcn", prune=BAD)}
    left = [name for name, *_ in zoo.tasks(chosen(), held)]
    assert sorted([*left, "own/dncnn", "own/tcn"]) == sorted(f"own/{name}" for name in OWN)
    assert "own/tcn" in [name for name, *_ in zoo.tasks(chosen(failed=True), held)]
    again = [name for name, *_ in zoo.tasks(chosen(only=["dncnn"], redo=["own/dn*"]), held)]
    assert again == ["own/dncnn"]
    few = list(zoo.tasks(chosen(only=["dncnn"], steps=["build", "trace"]), {}))
    assert [list(steps) for _, _, steps, _ in few] == [["build", "trace"]]
    both = list(zoo.tasks(chosen(only=["own/dncnn"], torch_pruning=True, onnx=True), {}))
    assert [list(steps)[-1] for _, _, steps, _ in both] == ["onnx", "torch-pruning"]


def test_the_page_counts_what_the_records_say() -> None:
    records = {
        "own/a": record("own/a", trace=TRACE, **{"prune_0.5": GOOD}),
        "own/b": record("own/b", trace=TRACE, **{"prune_0.5": GRAPH}),
        "timm/c": record("timm/c", trace=REFUSED),
    }
    records["own/a"]["steps"]["torch-pruning"] = {"failed": "time limit"}
    page = zoo_table.page(records, zoo.faults)
    cells = {
        line.split(" | ")[0][2:]: line.split(" | ") for line in page.splitlines() if "|" in line
    }
    assert cells["own"][1:5] == ["2", "2", "2", "1 of 2"]
    assert cells["all"][1:5] == ["3", "2", "2", "1 of 2"]
    assert cells["own"][-1] == "0 of 1 |"
    assert cells["own/a"][-1] == "time out |"
    assert cells["own/b"][8] == "graph"
    assert cells["timm/c"][2:6] == ["-"] * 4
    assert "- `timm/c`: CaptureError: no" in page
    assert "- `own/b`: prune 0.5: graph: states / sizes [net.py:3]" in page
