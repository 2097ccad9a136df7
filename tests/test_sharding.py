"""FSDP, configured as for Accelerate, ends where processes do that each hold the network."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rarefy.errors import InputError
from rarefy.training.objective import Objective
from rarefy.training.sharding import Shards, optimizer_state, set_optimizer_state, spread
from rarefy.training.train import train
from several_processes import in_processes
from sharded_processes import Net
from training_networks import random_batches

SCRIPT = Path(__file__).with_name("sharded_processes.py")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
RUNS = {
    "whole": (2, {}),
    "root": (2, {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}),
    "blocks": (
        2,
        {
            **FSDP,
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
            "FSDP_ACTIVATION_CHECKPOINTING": "true",
        },
    ),
    "single": (1, FSDP),
}
"""Number of processes, and how Accelerate is configured."""

CASES = ["plain", "average", "features", "peer", "follower", "captured", "resumed", "buffered"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank wrote of every case and run."""
    folder = tmp_path_factory.mktemp("shards")
    for run, (count, environment) in RUNS.items():
        environment = {"ACCELERATE_USE_CPU": "true", **environment}
        in_processes(SCRIPT, str(folder), run, count=count, **environment)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["root", "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_shards_end_where_whole_networks_do(found, case, run) -> None:
    whole, first, second = (found[f"{case}-{n}"] for n in ("whole-0", f"{run}-0", f"{run}-1"))
    assert first == second
    assert first["class"] == whole["class"]
    assert first["weights"] == pytest.approx(whole["weights"], rel=1e-5, abs=1e-5)
    for sharded, held in zip(first["history"], whole["history"], strict=True):
        assert sharded == pytest.approx(held, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "place", "what"),
    [
        ("scalar", "FSDP does not take it", "scale"),
        ("mixed", "the first step in shards fails", "uniform original parameter dtype"),
    ],
)
def test_what_fsdp_refuses_is_named(found, case, place, what) -> None:
    assert "error" not in found[f"{case}-whole-0"]
    for rank in (0, 1):
        message = found[f"{case}-root-{rank}"]["error"]
        assert f"train(model): {place}" in message
        assert what in message


@pytest.mark.slow
def test_a_single_process_in_shards_trains(found) -> None:
    options = {"epochs": 2, "lr": 0.05, "progress": False, "clip_norm": 0.5}
    alone = train(Net(15), random_batches(6), val=random_batches(5, seed=3), **options)
    assert found["plain-single-0"]["weights"] == pytest.approx(
        [p.double().abs().sum().item() for p in alone.state_dict().values()], rel=1e-5, abs=1e-5
    )


def test_no_shards_without_fsdp() -> None:
    objective = Objective("train", nn.Linear(2, 2), nn.functional.cross_entropy)
    kind = SimpleNamespace(value="MULTI_GPU")
    held = spread(objective, "train", SimpleNamespace(distributed_type=kind, is_fsdp2=False))
    assert held.running is objective
    assert not isinstance(held, Shards)


@pytest.mark.parametrize(("kind", "name"), [("FSDP", "FSDP 1"), ("DEEPSPEED", "DEEPSPEED")])
def test_other_configurations_are_refused(kind, name) -> None:
    objective = Objective("train", nn.Linear(2, 2), nn.functional.cross_entropy)
    kinds = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=False)
    with pytest.raises(InputError, match=rf"train\(\): .*{name}.*fsdp_version: 2"):
        spread(objective, "train", kinds)


def test_the_state_of_an_optimizer_comes_back() -> None:
    def stepped(net, times):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(times):
            net(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    state = optimizer_state(stepped(net, 3))
    other = stepped(nn.Linear(2, 2), 1)
    set_optimizer_state(other, state)
    for number, held in optimizer_state(other)["state"].items():
        assert all(torch.equal(held[name], state["state"][number][name]) for name in held)
