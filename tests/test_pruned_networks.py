"""Whatever the network: the smaller one equals masking, and nothing else changes."""

import copy
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, reject, settings
from hypothesis import strategies as st
from torch import nn

import rarefy as rf
from random_networks import networks
from rarefy.errors import BudgetError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.trace import trace
from rarefy.pruning.narrow import operate
from rarefy.pruning.plan import Plan
from rarefy.pruning.selection.select import select
from rarefy.pruning.structure.surgery import rewrite
from rarefy.types import Budget

torch.set_num_threads(1)

BUDGETS = st.one_of(
    st.builds(
        Budget,
        sparsity=st.floats(0.05, 0.8),
        scope=st.sampled_from(["local", "global"]),
        round_to=st.sampled_from([1, 1, 2]),
    ),
    st.builds(Budget, macs=st.floats(0.3, 0.9)),
    st.builds(Budget, params=st.floats(0.3, 0.9), scope=st.just("local")),
)


def zeroed(model: nn.Module, kept: dict) -> nn.Module:
    """The model with all entries set to zero that a pruning removed, written independently."""
    reference = copy.deepcopy(model)
    state = reference.state_dict()
    for (path, dim), entries in kept.items():
        gone = np.setdiff1d(np.arange(state[path].shape[dim]), entries)
        state[path].index_fill_(dim, torch.from_numpy(gone), 0)
    return reference


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-9, atol=1e-11 * float(second.abs().max() + 1))


class Snapshot:
    """All that a call must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        self.flags = [m.training for m in model.modules()]
        self.grads = [p.grad for p in model.parameters()]
        self.attributes = [set(vars(m)) for m in model.modules()]
        self.random = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        self.filters = list(warnings.filters)

    def check(self, model: nn.Module) -> None:
        assert all(torch.equal(v, self.state[k]) for k, v in model.state_dict().items())
        assert self.flags == [m.training for m in model.modules()]
        assert self.grads == [p.grad for p in model.parameters()]
        assert self.attributes == [set(vars(m)) for m in model.modules()]
        assert torch.equal(self.random[0], torch.get_rng_state())
        assert (self.random[1] == np.random.get_state()[1]).all()  # noqa: NPY002
        assert self.filters == warnings.filters


def plan_for(network, model, budget, seed) -> Plan:
    generator = np.random.default_rng(seed)
    scores = [generator.random(len(group)) for group in network.groups]
    return select(network, model, scores, budget)


def check_everything(model, inputs, budget, seed, train) -> None:
    model.train(train)
    before = Snapshot(model)
    network = trace(model, inputs)
    assert not network.unknown
    assume(network.groups)
    try:
        plan = plan_for(network, model, budget, seed)
    except BudgetError:
        reject()
    small = operate(model, inputs, network, plan)
    before.check(model)
    model.eval()

    with torch.no_grad():
        expected = zeroed(model, small.pruned.kept)(inputs)
        found = small(inputs)
        assert close(found, expected)
        rewritten = rewrite(model, network, plan)
        assert close(rewritten(inputs), expected)
        assert close(rewritten(inputs[:1]), expected[:1])
        assert close(graph_model(small, capture(small, inputs))(inputs), expected)
        assert torch.equal(copy.deepcopy(small)(inputs), found)
        with tempfile.TemporaryDirectory() as folder:
            path = rf.save(small, Path(folder) / "small.safetensors")
            again = rf.load(path, None if small.pruned.kind == "graph" else model)
        assert torch.equal(again(inputs), found)

    shapes = {path: tuple(p.shape) for path, p in small.named_parameters()}
    assert {path: tuple(p.shape) for path, p in rewritten.named_parameters()}.items() <= (
        shapes.items()
    )
    assert not any(0 in shape for shape in shapes.values())

    small.train()
    small(inputs).square().sum().backward()
    read = trace(small, inputs)
    for path in read.captured.graph.live.tensor_paths & shapes.keys():
        assert small.get_parameter(path).grad is not None
    small.zero_grad()
    small.eval()

    if read.groups:
        second = plan_for(read, small, Budget(sparsity=0.3, scope="local"), seed)
        smaller = operate(small, inputs, read, second)
        with torch.no_grad():
            assert close(smaller(inputs), zeroed(small, smaller.pruned.kept)(inputs))


EXAMPLE = (networks(), BUDGETS, st.integers(0, 9), st.booleans())
PATIENT = {
    "phases": [Phase.explicit, Phase.generate],
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
}


@settings(max_examples=20, **PATIENT)
@given(*EXAMPLE)
def test_pruning_random_networks_equals_masking_them(network, budget, seed, train) -> None:
    check_everything(*network, budget, seed, train)


@pytest.mark.slow
@settings(max_examples=12, **{**PATIENT, "derandomize": False})
@given(*EXAMPLE)
def test_pruning_many_random_networks_equals_masking_them(network, budget, seed, train) -> None:
    check_everything(*network, budget, seed, train)
