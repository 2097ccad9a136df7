"""Healing without labels: each layer is solved to reproduce the original's output.

The original and the smaller network run side by side, operator by operator, on the same inputs.
At every convolution and linear layer whose inputs changed, the weights that best reproduce the
original's outputs from the *smaller* network's own activations are found by least squares,
regularized towards the weights it has; at every BatchNorm the running statistics are moved by as
much as the statistics of its input moved. A layer is changed only where that lowers its error on
examples that no solve has seen: the same fifth of them, at all layers.

The reconstruction follows He et al. 2017 (https://arxiv.org/abs/1707.06168), done for all layers
in sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import batch_size, batches, evaluating, seeded, take
from rarefy.errors import DataError, InputError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.program import GraphModel, Node, Ref, Spec, last_use, resolve
from rarefy.types import Data, Inputs

MEMORY = 1 << 30
"""Bytes of activations that may be held at once; fewer samples are used beyond it."""

ROWS = 24
"""Rows of the least-squares system per unknown of an output channel, drawn at random."""

RIDGE = 1e-3
"""Regularization towards the present weights, relative to the mean of the Gram diagonal."""


@dataclass(frozen=True)
class Repaired:
    """What a repair did; the attribute ``repaired`` of its result.

    Attributes:
        errors: layer -> (relative error before, after) on held-out activations; equal where the
            layer was left as it was.
        skipped: layer -> why it was not solved.
        samples: number of examples used.
    """

    errors: Mapping[str, tuple[float, float]]
    skipped: Mapping[str, str]
    samples: int


def repair(
    original: nn.Module, pruned: nn.Module, data: Data, *, samples: int = 512, seed: int = 0
) -> nn.Module:
    """Solve the weights of a pruned network so that it reproduces the original's activations.

    No label and no gradient is needed. Neither argument is changed.

    Args:
        original: the network before pruning.
        pruned: what :func:`~rarefy.pruning.prune.prune` made of it.
        data: batches, labelled or not.
        samples: number of examples to use, fewer where their activations exceed :data:`MEMORY`.
        seed: of the draw of rows.

    Returns:
        A new network. Its attribute ``repaired`` is a :class:`Repaired` record.

    Raises:
        DataError: the data yield nothing, or activations are not finite.
        InputError: ``pruned`` is not a pruning of ``original``.
    """
    record = getattr(pruned, "pruned", None)
    if record is None:
        raise InputError(
            "repair(pruned=...)", "it has no record of a pruning", "Give what prune() returned"
        )
    if samples < 1:
        raise InputError(f"repair(samples={samples})", "no sample", "Use a few hundred")
    inputs = _collect(data, samples)
    healed = copy.deepcopy(pruned)
    with evaluating(original, healed), seeded(seed):
        before = capture(original, take(inputs, 2))
        after = capture(healed, take(inputs, 2))
        first, second = graph_model(original, before), graph_model(healed, after)
        _check_same(first, second)
        inputs = take(inputs, _affordable(first, batch_size(inputs)))
        walk = _Lockstep(first, second, record.kept, _held_out(batch_size(inputs)))
        walk.run(inputs)
    healed.repaired = Repaired(walk.errors, walk.skipped, batch_size(inputs))  # type: ignore[assignment]
    return healed


def _collect(data: Data, samples: int) -> Inputs:
    """The first examples of the data as one batch."""
    held: list[Inputs] = []
    found = 0
    for inputs, _ in batches(data, "repair(data)"):
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
            raise DataError("repair(data)", "inputs are NaN or infinite", "Clean the data")
    return result


def _held_out(examples: int) -> Tensor:
    """For each example, whether it is kept from all solves: a fifth, at least one."""
    chosen = torch.zeros(examples, dtype=torch.bool)
    chosen[torch.randperm(examples)[: max(1, examples // 5)]] = True
    return chosen


_REWRITTEN = dict.fromkeys(("split", "chunk"), "split_with_sizes")
"""Operators that surgery on a graph replaces, by what it replaces them with."""


def _check_same(first: GraphModel, second: GraphModel) -> None:
    kinds = [
        [_REWRITTEN.get(node.kind, node.kind) for node in model.graph.calls]
        for model in (first, second)
    ]
    if kinds[0] != kinds[1]:
        raise InputError(
            "repair(original, pruned)",
            "the two networks do not run the same operators",
            "Give the network that was pruned and the result of pruning it",
        )


def _affordable(model: GraphModel, wanted: int) -> int:
    """How many examples fit into :data:`MEMORY`, both networks' live values counted."""
    done = last_use(model.graph)
    live = peak = 0
    sizes: dict[str, int] = {}
    batch = 1
    for node in model.graph.nodes:
        if node.op == "input" and isinstance(node.value, Spec) and node.value.shape:
            batch = max(batch, node.value.shape[0])
        if node.op != "tensor":
            specs = [v for v in pytree.tree_leaves(node.value) if isinstance(v, Spec)]
            sizes[node.name] = sum(prod(s.shape) * s.dtype.itemsize for s in specs)
            live += sizes[node.name]
            peak = max(peak, live)
        live -= sum(sizes.get(name, 0) for name in done[node.name])
    return max(1, min(wanted, MEMORY // max(2 * peak // batch, 1)))


class _Lockstep:
    """Runs two graphs with the same operators side by side, changing the second as it goes."""

    def __init__(
        self,
        first: GraphModel,
        second: GraphModel,
        kept: Mapping[tuple[str, int], NDArray[np.int64]],
        held_out: Tensor,
    ) -> None:
        self.first, self.second, self.kept, self.held_out = first, second, kept, held_out
        self.errors: dict[str, tuple[float, float]] = {}
        self.skipped: dict[str, str] = {}

    def run(self, inputs: Inputs) -> None:
        args = (inputs,) if isinstance(inputs, Tensor) else inputs
        structured = ((), dict(args)) if isinstance(args, Mapping) else (tuple(args), {})
        given = pytree.tree_leaves(structured)
        a: dict[str, Any] = {}
        b: dict[str, Any] = {}
        done_a, done_b = last_use(self.first.graph), last_use(self.second.graph)
        pairs = _aligned(self.first, self.second)
        feeds = [iter(given), iter(given)]
        for left, right in pairs:
            for node, model, values, feed in (
                (left, self.first, a, feeds[0]),
                (right, self.second, b, feeds[1]),
            ):
                if node is not None and node.op == "input":
                    values[node.name] = next(feed)
                elif node is not None and node.op == "tensor":
                    values[node.name] = model.tensor(node.path)
            if left is not None and right is not None and left.op not in ("input", "tensor"):
                a[left.name] = self.first.step(left, resolve(left.op), a)
                self._heal(left, right, a, b)
                b[right.name] = self.second.step(right, resolve(right.op), b)
            for node, values, done in ((left, a, done_a), (right, b, done_b)):
                for name in done[node.name] if node is not None else ():
                    del values[name]

    def _heal(self, left: Node, right: Node, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        if right.kind in ("conv1d", "conv2d", "conv3d", "linear"):
            _check_finite(right, a[left.name], b[right.args[0].name])
            self._solve(left, right, a, b)
        elif right.kind == "batch_norm":
            _check_finite(right, a[left.args[0].name], b[right.args[0].name])
            self._move_statistics(left, right, a, b)

    def _move_statistics(
        self, left: Node, right: Node, a: Mapping[str, Any], b: Mapping[str, Any]
    ) -> None:
        old, new = a[left.args[0].name], b[right.args[0].name]
        mean, variance = right.argument("running_mean"), right.argument("running_var")
        if not isinstance(mean, Ref) or len(self.second.graph.users[mean.name]) > 1:
            return
        path = self.first.graph.by_name[left.argument("running_mean").name].path
        survivors = self._survivors(path, 0, old)
        dims = [d for d in range(old.ndim) if d != 1]
        old_var, old_mean = torch.var_mean(old.index_select(1, survivors), dims, correction=0)
        new_var, new_mean = torch.var_mean(new, dims, correction=0)
        ratio = torch.where(old_var > 0, new_var / old_var.clamp_min(1e-12), 1.0)
        b[mean.name].add_(new_mean - old_mean)
        b[variance.name].mul_(ratio.clamp(1e-3, 1e3))

    def _survivors(self, path: str, dim: int, like: Tensor) -> Tensor:
        size = self.first.tensor(path).shape[dim]
        kept = self.kept.get((path, dim))
        return torch.arange(size) if kept is None else torch.from_numpy(kept).to(like.device)

    def _solve(self, left: Node, right: Node, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        weight_node = self.second.graph.by_name[right.args[1].name]
        layer = right.scope or weight_node.name
        reason = self._unsolvable(weight_node, right)
        if reason:
            self.skipped[layer] = reason
            return
        old, new = a[left.args[0].name], b[right.args[0].name]
        if old.shape == new.shape and torch.equal(old, new):
            return
        survivors = self._survivors(weight_node.path, 0, old)
        weight, bias = b[weight_node.name], right.argument("bias")
        system = _System.of(right, new, a[left.name], weight, survivors, self.held_out)
        if not 0 < system.held < system.x.shape[1]:
            self.skipped[layer] = "too few examples to solve it on some and check it on others"
            return
        solved = system.solve(weight, None if bias is None else b[bias.name])
        self.errors[layer] = solved.errors
        if solved.errors[1] < solved.errors[0]:
            weight.copy_(solved.weight)
            if bias is not None:
                b[bias.name].copy_(solved.bias)

    def _unsolvable(self, weight: Node, node: Node) -> str:
        if weight.op != "tensor":
            return "its weight is computed in the graph"
        if len(self.second.graph.users[weight.name]) > 1:
            return "its weight is used several times"
        bias = node.argument("bias")
        if isinstance(bias, Ref) and self.second.graph.by_name[bias.name].op != "tensor":
            return "its bias is computed in the graph"
        if isinstance(bias, Ref) and len(self.second.graph.users[bias.name]) > 1:
            return "its bias is used several times"
        if node.kind != "linear" and len(node.shape) != len(weight.shape):
            return "its inputs have no batch dimension"
        return ""


def _check_finite(node: Node, *activations: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in activations):
        raise DataError(
            f"repair(data), layer {node.scope or node.name!r}",
            "activations are NaN or infinite",
            "Check the data, and that both networks give finite outputs for them",
        )


def _aligned(first: GraphModel, second: GraphModel) -> list[tuple[Node | None, Node | None]]:
    """Nodes of both graphs in one order: the second's inputs and tensors, then calls in pairs."""
    calls = iter(second.graph.calls)
    pairs: list[tuple[Node | None, Node | None]] = [
        (None, node) for node in second.graph.nodes if node.op in ("input", "tensor")
    ]
    for node in first.graph.nodes:
        if node.op in ("input", "tensor"):
            pairs.append((node, None))
        elif node.op != "output":
            pairs.append((node, next(calls)))
    return pairs


@dataclass(frozen=True)
class _Solved:
    weight: Tensor
    bias: Tensor
    errors: tuple[float, float]


@dataclass(frozen=True)
class _System:
    """Rows of ``x w = y`` for every group of channels.

    Attributes:
        x: (groups, rows, unknowns), the smaller network's inputs.
        y: (groups, rows, outputs), the original's outputs at the surviving channels.
        held: how many rows, the first ones, are of examples that are held out.
    """

    x: Tensor
    y: Tensor
    held: int

    @classmethod
    def of(
        cls,
        node: Node,
        new: Tensor,
        target: Tensor,
        weight: Tensor,
        survivors: Tensor,
        held_out: Tensor,
    ) -> _System:
        """Draw rows at random from one layer's inputs and the original's outputs."""
        unknowns = prod(weight.shape[1:])
        if node.kind == "linear":
            rows, held = _draw(_unseen(new.shape[:-1], held_out), unknowns)
            x = new.reshape(-1, new.shape[-1])[rows]
            y = target.reshape(-1, target.shape[-1])[rows][:, survivors]
            return cls(x.double()[None], y.double()[None], held)
        groups = node.argument("groups")
        places = prod(target.shape[2:])
        rows, held = _draw(_unseen(new.shape[:1], held_out).repeat_interleave(places), unknowns)
        x, y = _patches(node, new, target.index_select(1, survivors), weight, rows)
        return cls(
            x.double().reshape(len(x), groups, unknowns).transpose(0, 1),
            y.double().reshape(len(y), groups, -1).transpose(0, 1),
            held,
        )

    def solve(self, weight: Tensor, bias: Tensor | None) -> _Solved:
        """The weights with the least error on all other rows, checked on the held-out ones."""
        groups, _, unknowns = self.x.shape
        held = self.held
        w = weight.detach().double().reshape(groups, -1, unknowns).transpose(1, 2)
        offset = torch.zeros(groups, 1, w.shape[2], dtype=torch.float64)
        if bias is not None:
            offset = bias.detach().double().reshape(groups, 1, -1)
        x, y = self.x[:, held:], self.y[:, held:]
        x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x0, y0 = x - x_mean, y - y_mean
        gram = x0.transpose(1, 2) @ x0
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        ridge = torch.eye(unknowns, dtype=torch.float64) * (RIDGE * scale)[:, None, None]
        step = torch.linalg.solve(gram + ridge, x0.transpose(1, 2) @ (y0 - x0 @ w))
        solved = w + step
        new_offset = y_mean - x_mean @ solved if bias is not None else offset
        before = self._error(w, offset, centered=bias is None)
        after = self._error(solved, new_offset, centered=bias is None)
        return _Solved(
            solved.transpose(1, 2).reshape(weight.shape).to(weight.dtype),
            new_offset.reshape(-1).to(weight.dtype),
            (before, after),
        )

    def _error(self, w: Tensor, offset: Tensor, *, centered: bool) -> float:
        """Relative squared error on the held-out rows; infinite where not finite.

        Without a bias the mean is left to the BatchNorm that follows.
        """
        y = self.y[:, : self.held]
        residual = self.x[:, : self.held] @ w + offset - y
        if centered:
            residual = residual - residual.mean(1, keepdim=True)
            y = y - y.mean(1, keepdim=True)
        error = float(residual.square().sum() / y.square().sum().clamp_min(1e-30))
        return error if error == error else float("inf")


def _unseen(lead: tuple[int, ...], held_out: Tensor) -> Tensor:
    """For each row of a tensor with these leading dimensions, whether its example is held out.

    The examples are along the first dimension of a multiple of their number: they come first in
    it where others (windows, frames) were merged into it. Without one, the first dimension is
    divided as if they were.
    """
    if not lead:
        return held_out[:1]
    examples = len(held_out)
    dim = next((d for d, size in enumerate(lead) if size % examples == 0), 0)
    owner = torch.arange(lead[dim]) * examples // lead[dim]
    column = held_out[owner].reshape(-1, *[1] * (len(lead) - dim - 1))
    return column.expand(lead).reshape(-1)


def _draw(unseen: Tensor, unknowns: int) -> tuple[Tensor, int]:
    """Rows drawn at random, those of held-out examples first, and the number of those."""
    wanted = max(ROWS * unknowns, 2048)
    every = len(unseen)
    rows = torch.arange(every) if every <= wanted else torch.randperm(every)[:wanted]
    held = unseen[rows]
    return torch.cat([rows[held], rows[~held]]), int(held.sum())


def _patches(
    node: Node, new: Tensor, target: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows (patch, output) of a convolution of any rank; a row is an example and a position."""
    rank = weight.ndim - 2
    kernel, size = weight.shape[2:], target.shape[2:]
    stride, dilation = (_each(node.argument(name), rank) for name in ("stride", "dilation"))
    sides = [side for pair in reversed(_padding(node, kernel, dilation)) for side in pair]
    padded = F.pad(new, sides) if any(sides) else new
    example, *place = torch.unravel_index(rows, (new.shape[0], *size))
    index = [example.reshape(-1, *[1] * rank)]
    for d in range(rank):
        taps = place[d][:, None] * stride[d] + torch.arange(kernel[d])[None] * dilation[d]
        index.append(taps.reshape(-1, *[kernel[d] if e == d else 1 for e in range(rank)]))
    patches = padded.movedim(1, -1)[tuple(index)]  # (rows, *kernel, channels)
    return patches.movedim(-1, 1).flatten(1), target.movedim(1, -1)[(example, *place)]


def _each(given: Any, rank: int) -> list[int]:
    """One number per dimension, of one for all or a list of them."""
    values = list(given) if isinstance(given, list | tuple) else [given]
    return values * rank if len(values) == 1 else values


def _padding(node: Node, kernel: tuple[int, ...], dilation: list[int]) -> list[tuple[int, int]]:
    given = node.argument("padding")
    if given == "valid":
        return [(0, 0)] * len(kernel)
    if given == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in _each(given, len(kernel))]
