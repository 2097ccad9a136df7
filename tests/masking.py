"""Prune at random and hold the result against masking, written independently of the proof."""

import copy

import numpy as np
import torch
from torch import nn

from rarefy.graph.count import count
from rarefy.graph.trace import Network, trace
from rarefy.pruning.narrow import operate
from rarefy.pruning.selection.select import Plan, select
from rarefy.pruning.structure.surgery import kept_entries, rewrite
from rarefy.types import Budget


def zeroed(model: nn.Module, kept: dict) -> nn.Module:
    """The model with every entry set to zero that is not kept."""
    reference = copy.deepcopy(model)
    tensors = dict(reference.named_parameters()) | dict(reference.named_buffers())
    with torch.no_grad():
        for (path, dim), entries in kept.items():
            gone = np.setdiff1d(np.arange(tensors[path].shape[dim]), entries)
            tensors[path].index_fill_(dim, torch.from_numpy(gone), 0)
    return reference


def random_plan(model: nn.Module, network: Network, seed: int, sparsity: float = 0.5) -> Plan:
    generator = np.random.default_rng(seed)
    scores = [generator.random(len(group)) for group in network.groups]
    return select(network, model, scores, Budget(sparsity=sparsity))


def described(network: Network) -> set[str]:
    """Every group as its number of units and what shrinks, ``"8: w[1] y.weight[0]"``."""
    return {
        f"{len(g)}: " + " ".join(sorted(f"{m.path}[{m.dim}]" for m in g.members))
        for g in network.groups
    }


def holders(network: Network, path: str, dim: int) -> set[int]:
    """Sizes of the groups of units that take entries of a tensor along a dimension."""
    return {
        len(g) for g in network.groups if any((m.path, m.dim) == (path, dim) for m in g.members)
    }


def check_masking(model: nn.Module, x, seeds=(0, 1)) -> tuple[Network, set[str]]:
    """Trace, prune at random and compare; returns the trace and the kinds of result."""
    model.double().eval()
    inputs = x if isinstance(x, tuple) else (x,)
    network = trace(model, inputs)
    assert not network.unknown
    kinds = set()
    for seed in seeds if network.groups else ():
        plan = random_plan(model, network, seed)
        small = operate(model, inputs, network, plan)
        kinds.add(small.pruned.kind)
        rewritten = rewrite(model, network, plan)
        with torch.no_grad():
            expected = zeroed(model, kept_entries(network, plan))(*inputs)
            for result in (small(*inputs), rewritten(*inputs)):
                torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
        assert count(small, inputs).by_layer == count(rewritten, inputs).by_layer
        sizes = [sum(p.numel() for p in net.parameters()) for net in (small, model)]
        assert sizes[0] < sizes[1] or not plan.removed.any()
    return network, kinds
