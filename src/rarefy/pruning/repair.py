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

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy.batches import (
    batch_size,
    call,
    evaluating,
    map_tensors,
    seeded,
    take,
    tensors,
)
from rarefy.copies import copied
from rarefy.errors import DataError, InputError, first_line
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.count import COSTS, is_uncounted
from rarefy.graph.program import Graph, GraphModel, Node, Ref
from rarefy.pruning.running.examples import affordable, collect, distance, outputs
from rarefy.pruning.running.inputs import patches
from rarefy.pruning.running.lockstep import (
    OPERANDS,
    TRANSPOSED,
    Run,
    layer_name,
    operand,
    unseen,
    unsolvable,
)
from rarefy.pruning.sums import owed
from rarefy.types import Data, Inputs

ROWS = 64
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
        samples: number of examples to use, fewer where their activations exceed
            :data:`~rarefy.pruning.running.examples.MEMORY`.
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
    joined, single = collect(data, samples)
    failure = Exception()
    with evaluating(original, pruned):
        for inputs, shown in ((joined, take(joined, 2)), (single, single)):
            try:  # a network of one batch size takes a batch as it comes, if anything
                with seeded(seed):
                    return _healed(original, pruned, inputs, shown)
            except (DataError, _StrangersError):
                raise
            except Exception as error:  # noqa: BLE001 - forward may raise anything
                failure = error
    _check_taken(original, single)
    same = copied(pruned)
    reason = f"the networks do not run side by side on the data: {first_line(failure)}"
    same.repaired = Repaired({}, {"": reason}, 0)  # type: ignore[assignment]
    return same


class _StrangersError(InputError):
    """The two networks have no layer in common."""


def _healed(original: nn.Module, pruned: nn.Module, inputs: Inputs, shown: Inputs) -> nn.Module:
    """A repaired copy of the pruned network, if that is nearer to the original on the inputs.

    Args:
        original: the network before pruning.
        pruned: the network after it.
        inputs: what to solve on.
        shown: those of them that the networks are captured with, fewer where any number will do.
    """
    healed = copied(pruned)
    first = graph_model(original, capture(original, shown))
    second = graph_model(healed, capture(healed, shown))
    if shown is not inputs:
        inputs = take(inputs, affordable(first, batch_size(inputs)))
    record: Any = pruned.pruned
    walk = _Lockstep(first, second, record.kept, _held_out(batch_size(inputs)))
    walk.run(inputs)
    expected = outputs(original, inputs)
    before, after = (distance([outputs(m, inputs)], [expected]) for m in (pruned, healed))
    errors, skipped = walk.errors, walk.skipped
    if not after <= before:
        healed = copied(pruned)
        skipped |= dict.fromkeys(errors, "with it, the outputs are farther from the original's")
        errors = {layer: (error, error) for layer, (error, _) in errors.items()}
    healed.repaired = Repaired(errors, skipped, batch_size(inputs))  # type: ignore[assignment]
    return healed


def _check_taken(model: nn.Module, inputs: Inputs) -> None:
    """Refuse data that the network itself does not take."""
    try:
        with evaluating(model):
            call(model, map_tensors(torch.clone, inputs))
    except Exception as error:
        raise DataError(
            "repair(data)",
            f"the network does not run on its first batch: {first_line(error)}",
            "Yield inputs like those that the network was traced with",
        ) from error


def _held_out(examples: int) -> Tensor:
    """For each example, whether it is kept from all solves: a fifth, at least one."""
    chosen = torch.zeros(examples, dtype=torch.bool)
    chosen[torch.randperm(examples)[: max(1, examples // 5)]] = True
    return chosen


def _layers(graph: Graph) -> list[tuple[tuple[str, str], Node]]:
    """Operators that have weights, each under its kind and the path of its first tensor.

    That path tells layers apart in both graphs, whose other operators may differ: a forward may do
    something else with other sizes, and surgery on a graph writes some operators in another way.
    """
    owner: dict[str, str] = {n.name: n.path for n in graph.nodes if n.op == "tensor"}
    found = []
    for node in graph.calls:
        given = [owner[name] for name in node.inputs if name in owner]
        counted = node.kind == "batch_norm" or node.kind.removesuffix("_") in COSTS
        counted = counted or is_uncounted(node, lambda name: graph.by_name[name].shape)
        if given and counted:
            found.append(((node.kind, given[0]), node))
        elif given and len(given) == len(node.inputs):
            owner[node.name] = given[0]  # computed from weights alone
    return found


def _pairs(first: Graph, second: Graph) -> tuple[list[tuple[Node, Node]], list[Node]]:
    """Layers of both graphs that go together, in order, and those of the second that are alone.

    Raises:
        _StrangersError: no two layers go together.
    """
    sides = [_layers(graph) for graph in (first, second)]
    keys = [[key for key, _ in side] for side in sides]
    blocks = SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    pairs = [
        (sides[0][block.a + i][1], sides[1][block.b + i][1])
        for block in blocks
        for i in range(block.size)
    ]
    if sides[1] and not pairs:
        raise _StrangersError(
            "repair(original, pruned)",
            "the two networks do not run the same operators",
            "Give the network that was pruned and the result of pruning it",
        )
    paired = {right.name for _, right in pairs}
    return pairs, [node for _, node in sides[1] if node.name not in paired]


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
        self.means: dict[str, Tensor] = {}  # of what solved layers without a bias should give

    def run(self, inputs: Inputs) -> None:
        """Go through both networks, layer by layer."""
        pairs, alone = _pairs(self.first.graph, self.second.graph)
        for node in alone:
            self.skipped[layer_name(node)] = "the original does not run it in the same place"
        one, two = Run(self.first, inputs), Run(self.second, inputs)
        for left, right in pairs:
            one.through(left)
            two.before(right)
            self._heal(left, right, one.values, two.values)

    def _heal(self, left: Node, right: Node, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        if right.kind in OPERANDS:
            _check_finite(right, a[left.name], b[operand(right, 0).name])
            self._solve(left, right, a, b)
        elif right.kind == "batch_norm":
            _check_finite(right, a[left.args[0].name], b[right.args[0].name])
            self._move_statistics(left, right, a, b)
        elif self._is_changed(left, right, a, b):
            self.skipped[layer_name(right)] = f"weights of {right.kind} are not solved"

    def _is_changed(
        self, left: Node, right: Node, a: Mapping[str, Any], b: Mapping[str, Any]
    ) -> bool:
        """Whether any operand of an operator is not that of the original."""
        first = [t for name in left.inputs for t in tensors(a[name])]
        second = [t for name in right.inputs for t in tensors(b[name])]
        return len(first) != len(second) or not all(map(torch.equal, first, second))

    def _move_statistics(
        self, left: Node, right: Node, a: Mapping[str, Any], b: Mapping[str, Any]
    ) -> None:
        old, new = a[left.args[0].name], b[right.args[0].name]
        mean, variance = right.argument("running_mean"), right.argument("running_var")
        if not isinstance(mean, Ref) or not isinstance(variance, Ref):
            return
        sources = [self.second.graph.by_name[ref.name] for ref in (mean, variance)]
        if any(s.op != "tensor" or len(self.second.graph.users[s.name]) > 1 for s in sources):
            return
        survivors = self._survivors(sources[0].path, 0, old)
        if (old.shape[0], *old.shape[2:]) != (new.shape[0], *new.shape[2:]):
            return  # its other dimensions are units, too
        dims = [d for d in range(old.ndim) if d != 1]
        old_var, old_mean = torch.var_mean(old.index_select(1, survivors), dims, correction=0)
        new_var, new_mean = torch.var_mean(new, dims, correction=0)
        solved = self.means.get(right.args[0].name)
        if solved is not None:  # it gives less where its inputs cannot tell: that is to stay less
            b[mean.name].add_(new_mean - solved)
            return
        ratio = torch.where(old_var > 0, new_var / old_var.clamp_min(1e-12), 1.0)
        b[mean.name].add_(new_mean - old_mean)
        b[variance.name].mul_(ratio.clamp(1e-3, 1e3))

    def _survivors(self, path: str, dim: int, like: Tensor) -> Tensor:
        size = self.first.tensor(path).shape[dim]
        kept = self.kept.get((path, dim))
        return torch.arange(size) if kept is None else torch.from_numpy(kept).to(like.device)

    def _solve(self, left: Node, right: Node, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        weight_node = self.second.graph.by_name[operand(right, 1).name]
        layer = layer_name(right)
        old, new = a[operand(left, 0).name], b[operand(right, 0).name]
        if old.shape == new.shape and torch.equal(old, new):
            return
        reason = unsolvable(self.second.graph, weight_node, right) or _unlike(right, old, new)
        if reason:
            self.skipped[layer] = reason
            return
        transposed = right.kind in TRANSPOSED
        survivors = self._survivors(weight_node.path, int(transposed), old)
        held, bias = b[weight_node.name], operand(right, 2)
        weight = held.T if transposed else held
        dim = 1 if right.kind.startswith("conv") else -1
        target = a[left.name].index_select(dim, survivors)
        graphs = self.first.graph, self.second.graph
        lacking = owed(graphs, (left, right), (a, b), survivors, dim)
        if lacking is not None:
            target += lacking
        system = _System.of(right, new, target, weight, self.held_out)
        if not 0 < system.held < system.x.shape[1]:
            self.skipped[layer] = "too few examples to solve it on some and check it on others"
            return
        try:
            solved = system.solve(weight, None if bias is None else b[bias.name])
        except RuntimeError as error:
            self.skipped[layer] = f"it cannot be solved: {first_line(error)}"
            return
        self.errors[layer] = solved.errors
        if solved.errors[1] < solved.errors[0]:
            weight.copy_(solved.weight)
            self.means[right.name] = target.mean(
                [d for d in range(target.ndim) if d != dim % target.ndim]
            )
            if bias is not None:
                b[bias.name].copy_(solved.bias)


def _unlike(node: Node, old: Tensor, new: Tensor) -> str:
    """Why the rows of one network's inputs are not those of the other's; empty where they are."""
    rows = [
        (t.shape[0], *t.shape[2:]) if node.kind.startswith("conv") else t.shape[:-1]
        for t in (old, new)
    ]
    return "" if rows[0] == rows[1] else "units that went are among the rows of its inputs"


def _check_finite(node: Node, *activations: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in activations):
        raise DataError(
            f"repair(data), layer {layer_name(node)!r}",
            "activations are NaN or infinite",
            "Check the data, and that both networks give finite outputs for them",
        )


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
        held_out: Tensor,
    ) -> _System:
        """Draw rows at random from one layer's inputs and what its outputs should be."""
        unknowns = prod(weight.shape[1:])
        if not node.kind.startswith("conv"):
            rows, held = _draw(unseen(new.shape[:-1], held_out), unknowns)
            x = new.reshape(-1, new.shape[-1])[rows]
            y = target.reshape(-1, target.shape[-1])[rows]
            return cls(x.double()[None], y.double()[None], held)
        groups = node.argument("groups")
        places = prod(target.shape[2:])
        rows, held = _draw(unseen(new.shape[:1], held_out).repeat_interleave(places), unknowns)
        x, y = _patches(node, new, target, weight, rows)
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
    place = torch.unravel_index(rows, (new.shape[0], *target.shape[2:]))
    return patches(node, new, weight)[place].flatten(1), target.movedim(1, -1)[place]
