"""Examples that layers are solved and outputs compared on, as one batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import batch_size, batches, call, map_tensors, take, tensors
from rarefy.errors import DataError
from rarefy.graph.program import Graph, GraphModel, Spec, last_use
from rarefy.types import Data, Inputs

MEMORY = 1 << 30
"""Bytes of activations that may be held at once; fewer samples are used beyond it."""


def collect(data: Data, samples: int, where: str = "repair(data)") -> tuple[Inputs, Inputs]:
    """The first examples of the data as one batch, and the first batch as it comes.

    Raises:
        DataError: there are none, or they are not finite.
    """
    held: list[Inputs] = []
    found = 0
    single: Inputs | None = None
    for inputs, _ in batches(data, where):
        single = inputs if single is None else single
        held.append(take(inputs, samples - found))
        found += batch_size(held[-1])
        if found >= samples:
            break
    leaves = [pytree.tree_flatten(item) for item in held]
    joined = [
        torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim else parts[0]
        for parts in zip(*(flat for flat, _ in leaves), strict=True)
    ]
    result: Inputs = pytree.tree_unflatten(joined, leaves[0][1])
    for tensor in joined:
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise DataError(where, "inputs are NaN or infinite", "Clean the data")
    assert single is not None  # or batches() would have raised
    return result, single


def affordable(model: GraphModel, wanted: int) -> int:
    """How many examples fit into :data:`MEMORY`, both networks' live values counted."""
    peak, batch = live(model.graph)
    return max(1, min(wanted, MEMORY // max(2 * peak // batch, 1)))


def live(graph: Graph, at: Collection[str] | None = None) -> tuple[int, int]:
    """Bytes of the values that are held at once, at most, and how many examples they are of.

    Args:
        graph: with the sizes of its capture.
        at: names of the calls at which it counts; all where it is not given.
    """
    done = last_use(graph)
    held = peak = 0
    sizes: dict[str, int] = {}
    batch = 1
    for node in graph.nodes:
        if node.op == "input" and isinstance(node.value, Spec) and node.value.shape:
            batch = max(batch, node.value.shape[0])
        if node.op != "tensor":
            specs = [v for v in pytree.tree_leaves(node.value) if isinstance(v, Spec)]
            sizes[node.name] = sum(prod(s.shape) * s.dtype.itemsize for s in specs)
            held += sizes[node.name]
        if at is None or node.name in at:
            peak = max(peak, held)
        held -= sum(sizes.get(name, 0) for name in done[node.name])
    return peak, batch


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Floating-point tensors that a network returns."""
    found = call(model, map_tensors(torch.clone, inputs))
    leaves = pytree.tree_leaves(found)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        leaves = tensors(found)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def distance(found: Iterable[Sequence[Tensor]], expected: Iterable[Sequence[Tensor]]) -> float:
    """Squared error of all outputs, each relative to its own squares, summed over all parts.

    Args:
        found: the outputs for each part of the examples.
        expected: what they should be; entries that are not finite do not count.
    """
    errors = squares = torch.zeros((), dtype=torch.float64)
    for given, wanted in zip(found, expected, strict=True):
        counted = [torch.isfinite(b) for b in wanted]
        ends = [
            (a[k].double(), b[k].double()) for a, b, k in zip(given, wanted, counted, strict=True)
        ]
        errors = errors + _numbers((a - b).square().sum() for a, b in ends)
        squares = squares + _numbers(b.square().sum() for _, b in ends)
    return float((errors / squares.clamp_min(1e-30)).sum())


def _numbers(scalars: Iterable[Tensor]) -> Tensor:
    return torch.tensor([float(scalar) for scalar in scalars], dtype=torch.float64)
