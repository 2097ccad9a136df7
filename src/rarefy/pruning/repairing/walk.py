"""Two networks on their way through their graphs side by side, the second healed as they go.

Examples come in parts. Between two layers, only the values that layers to come read are held, and
what the rows of a layer say is summed up in matrices whose size does not depend on the number of
examples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.batches import tensors
from rarefy.errors import DataError, first_line
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node, Ref
from rarefy.grid import Grid as WeightGrid
from rarefy.pruning.repairing.grids import Grid, as_rows, grid_of
from rarefy.pruning.repairing.moments import Moments
from rarefy.pruning.repairing.pairs import Group, Pair, layer_pairs, next_norm
from rarefy.pruning.repairing.system import Mean, Weights, solve
from rarefy.pruning.running.lockstep import (
    OPERANDS,
    TRANSPOSED,
    Run,
    layer_name,
    operand,
    unsolvable,
    weight_of,
)
from rarefy.pruning.sparsity.gram import Sums, add_rows
from rarefy.pruning.sums import owed
from rarefy.types import Inputs

ROWS = 64
"""Rows of a layer per unknown of one output that are used at most, drawn at random."""

Statistics: TypeAlias = tuple[str, str]
"""Paths of the running mean and the running variance of a BatchNorm."""

Runs = Sequence[tuple[Run, Run, Tensor]]
"""For each part of the examples, the run of both networks and which examples are held out."""


@dataclass
class Walk:
    """What is healed, and what came of it.

    Attributes:
        first: the original.
        second: the network to heal; its tensors are changed.
        kept: (path of a tensor, dimension) -> which of the original's entries it still has.
        sparse: identities of the tensors whose zeros stay.
        own: identities of the tensors that may be changed.
        grids: identity of a weight that was rounded -> the values that it may have.
        rounding: how solved weights are rounded to them.
        rescaled: path of a weight -> what the layer's outputs, and all that reads them, are divided
            by, channel by channel, in the network to heal alone.
        errors: layer -> held-out error before, after.
        skipped: layer -> why it was not solved.
        changed: layers and the paths of their tensors that were changed, in order.
    """

    first: GraphModel
    second: GraphModel
    kept: Mapping[tuple[str, int], NDArray[np.int64]]
    sparse: Collection[int]
    own: Collection[int]
    grids: Mapping[int, WeightGrid] = field(default_factory=dict)
    rounding: str = "gptq"
    rescaled: Mapping[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    changed: list[tuple[str, Sequence[str]]] = field(default_factory=list)
    _norms: dict[str, Statistics] = field(default_factory=dict)  # of BatchNorms, to be moved
    _means: dict[str, Tensor] = field(default_factory=dict)  # what results before those should have

    def run(self, parts: Sequence[Inputs], held_out: Sequence[Tensor]) -> Runs:
        """Go through both networks, layer by layer.

        Args:
            parts: the examples, some at a time.
            held_out: for each of them, whether it is kept from all solves.

        Returns:
            The runs, behind the last layer.
        """
        groups, alone = layer_pairs(self.first.graph, self.second.graph)
        for node in alone:
            self.skipped[layer_name(node)] = "the original does not run it in the same place"
        for group in groups:
            if group[0].right.kind == "batch_norm":
                self._norms |= self._statistics([pair.right for pair in group])
        runs = [
            (Run(self.first, part), Run(self.second, part), held)
            for part, held in zip(parts, held_out, strict=True)
        ]
        for group in groups:
            self._heal(group, runs)
        return runs

    def _heal(self, pairs: Group, runs: Runs) -> None:
        rights = [pair.right for pair in pairs]
        right = rights[0]
        if right.kind in OPERANDS:
            weight, quantizer = weight_of(self.second.graph, right)
            one, two, _ = next(_before(pairs, runs[:1]))
            reason = unsolvable(self.second.graph, weight, *rights)
            for pair in pairs:
                reason = reason or self._unlike(pair, weight, one.values, two.values)
            if not reason:
                _Layer(self, pairs, weight, quantizer).heal(runs)
            elif any(_differ(pairs, one, two) for one, two, _ in _before(pairs, runs)):
                self.skipped[layer_name(right)] = reason
        elif right.name in self._norms:
            self._move_statistics(pairs, runs)
        elif right.kind != "batch_norm" and any(
            _is_changed(pairs[0], one.values, two.values) for one, two, _ in _before(pairs, runs)
        ):
            self.skipped[layer_name(right)] = f"weights of {right.kind} are not solved"

    def _unlike(self, pair: Pair, weight: Node, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
        """Why a layer cannot be held against the original's; empty where it can."""
        old, new = a[operand(pair.left, 0).name], b[operand(pair.right, 0).name]
        rows = [
            (t.shape[0], *t.shape[2:]) if pair.right.kind.startswith("conv") else t.shape[:-1]
            for t in (old, new)
        ]
        if rows[0] != rows[1]:
            return "units that went are among the rows of its inputs"
        if id(self.second.tensor(weight.path)) not in self.own:
            return "its weight is a constant of the graph"
        dim = int(pair.right.kind in TRANSPOSED)
        if len(self.survivors(weight.path, dim)) != self.second.tensor(weight.path).shape[dim]:
            return "the original's layer has other outputs"
        return ""

    def survivors(self, path: str, dim: int) -> Tensor:
        """Which of the original's entries along a dimension of a tensor remain."""
        kept = self.kept.get((path, dim))
        tensor = self.first.tensor(path)
        every = torch.arange(tensor.shape[dim]) if kept is None else torch.from_numpy(kept)
        return every.to(tensor.device)

    def _statistics(self, norms: Sequence[Node]) -> dict[str, Statistics]:
        """Those of calls of one BatchNorm; empty where they are not its own to change."""
        graph, own = self.second.graph, {norm.name for norm in norms}
        given = [norms[0].argument(name) for name in ("running_mean", "running_var")]
        found = [graph.by_name[ref.name] for ref in given if isinstance(ref, Ref)]
        found = [
            n for n in found if n.op == "tensor" and id(self.second.tensor(n.path)) in self.own
        ]
        readers = [{user.name for user in graph.users[node.name]} for node in found]
        if readers != [own, own]:
            return {}
        return dict.fromkeys(own, (found[0].path, found[1].path))

    def _move_statistics(self, pairs: Group, runs: Runs) -> None:
        old, new = Moments(1), Moments(1)
        like = True
        for one, two, _ in _before(pairs, runs):
            for pair in pairs:
                x, y = one.values[pair.left.args[0].name], two.values[pair.right.args[0].name]
                check_finite(pair.right, x, y)
                like = like and (x.shape[0], *x.shape[2:]) == (y.shape[0], *y.shape[2:])
                old.add(x)
                new.add(y)
        sources = self._norms[pairs[0].right.name]
        mean, variance = map(self.second.tensor, sources)
        survivors = self.survivors(sources[0], 0)
        if not like or len(survivors) != len(mean):
            return  # its other dimensions are units, too
        self.changed.append((layer_name(pairs[0].right), sources))
        solved = self._means.get(pairs[0].right.args[0].name)
        if solved is not None:  # it gives less where its inputs cannot tell: that is to stay less
            mean.add_(new.mean - solved)
            return
        before = old.variance[survivors]
        ratio = torch.where(before > 0, new.variance / before.clamp_min(1e-12), 1.0)
        mean.add_(new.mean - old.mean[survivors])
        variance.mul_(ratio.clamp(1e-3, 1e3))

    def mean_of(self, rights: Sequence[Node]) -> Mean:
        """What takes up the mean of a layer's outputs."""
        if isinstance(operand(rights[0], 2), Ref):
            return Mean.BIAS
        norms = [next_norm(self.second.graph, right) for right in rights]
        behind = {norm.name for norm in norms if norm is not None}
        found = {self._norms.get(name) for name in behind}
        calls = {name for name, statistics in self._norms.items() if statistics in found}
        alone = len(found) == 1 and calls == behind and len(behind) == len(rights)
        return Mean.NORM if alone else Mean.NONE

    def solved(self, pairs: Group, mean: Tensor) -> None:
        """Note the mean that a solved layer's outputs should have; a BatchNorm follows it."""
        self._means |= {pair.right.name: mean for pair in pairs}


@dataclass
class _Layer:
    """One layer that can be solved, with all calls of it."""

    walk: Walk
    pairs: Group
    weight: Node
    quantizer: Node | None

    def heal(self, runs: Runs) -> None:
        """Solve it, and put what was found into the network, if that is better."""
        name = layer_name(self._right)
        weights = self._weights()
        if weights is None:
            self.walk.skipped[name] = "its weight has another grid than one for each output"
            return
        groups, outputs, unknowns = weights.values.shape
        device = weights.values.device
        fit, check = (Sums.empty(groups, unknowns, outputs, device) for _ in range(2))
        means = Moments(self._dim)
        changed = self._sum_up(runs, (fit, check), means)
        if not changed:
            return
        if not fit.count or not check.count:
            self.walk.skipped[name] = "too few examples to solve it on some and check it on others"
            return
        try:
            solved = solve(fit, check, weights)
        except RuntimeError as error:
            self.walk.skipped[name] = f"it cannot be solved: {first_line(error)}"
            return
        self.walk.errors[name] = solved.errors
        if not solved.is_better:
            return
        paths = [self.weight.path, *self._bias()]
        held, *biases = map(self.walk.second.tensor, paths)
        rows = held.transpose(0, 1) if self._transposed else held
        rows.copy_(self._turned(solved.values.reshape(rows.shape)))
        for bias in biases:
            bias.copy_(solved.bias.flatten())
        self.walk.changed.append((name, paths))
        if self.quantizer is not None:
            for _, two, _ in runs:
                two.renew(self.quantizer)
        if weights.mean is Mean.NORM:
            self.walk.solved(self.pairs, means.mean)

    def _sum_up(self, runs: Runs, sums: tuple[Sums, Sums], means: Moments) -> bool:
        """Add all rows to the sums, and tell whether there is anything to heal."""
        survivors = self.walk.survivors(self.weight.path, int(self._transposed))
        graphs = self.walk.first.graph, self.walk.second.graph
        weight = self.walk.second.tensor(self.weight.path)
        examples = sum(len(held) for _, _, held in runs)
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        changed = False
        for one, two, held in _before(self.pairs, runs):
            changed = _differ(self.pairs, one, two) or changed
            for pair in self.pairs:
                one.through(pair.end)
                x = two.values[operand(pair.right, 0).name]
                target = one.values[pair.end.name]
                check_finite(pair.right, target, x)
                target = self._rescaled(target.index_select(self._dim, survivors))
                layers = (pair.end, pair.right)
                lacking = owed(graphs, layers, (one.values, two.values), survivors, self._dim)
                if lacking is not None:
                    target += lacking
                means.add(target)
                every = target.numel() // len(survivors) * examples / len(held) * len(self.pairs)
                share = min(1.0, max(ROWS * sums[0].xx.shape[1], 2048) / max(every, 1))
                add_rows(sums, pair.right, (x, target), weight, held, share, generator)
            one.forget()
        return changed

    def _rescaled(self, target: Tensor) -> Tensor:
        """The original's outputs, divided as those of this network's layer are."""
        factors = self.walk.rescaled.get(self.weight.path)
        if factors is None:
            return target
        shape = [-1 if d == self._dim % target.ndim else 1 for d in range(target.ndim)]
        return target / factors.to(target.device, target.dtype).reshape(shape)

    @property
    def _right(self) -> Node:
        """The first of the calls."""
        return self.pairs[0].right

    @property
    def _transposed(self) -> bool:
        return self._right.kind in TRANSPOSED

    @property
    def _dim(self) -> int:
        """Dimension of the outputs in what the layer gives."""
        return 1 if self._right.kind.startswith("conv") else -1

    def _bias(self) -> list[str]:
        """Path of the bias, if there is one."""
        given = operand(self._right, 2)
        return [self.walk.second.graph.by_name[given.name].path] if isinstance(given, Ref) else []

    def _weights(self) -> Weights | None:
        """What the system needs to know; None where the grid is of an unknown form."""
        second, right = self.walk.second, self._right
        held = second.tensor(self.weight.path)
        groups = right.argument("groups") if right.kind.startswith("conv") else 1
        values = self._matrix(held.detach(), groups).double()
        grid: Grid | None = None
        if self._is_rounded:
            grid = self._grid(held, groups)
            if grid is None:
                return None
            values = grid.nearest(values)
        offset = values.new_zeros(groups, 1, values.shape[1])
        for path in self._bias():
            offset = second.tensor(path).detach().double().reshape(offset.shape)
        gone = self._gone(held, groups)
        mean, rounding = self.walk.mean_of([p.right for p in self.pairs]), self.walk.rounding
        return Weights(values, offset, mean, gone, grid, rounding)

    @property
    def _is_rounded(self) -> bool:
        """Whether the weight may have some values alone."""
        held = self.walk.second.tensor(self.weight.path)
        return self.quantizer is not None or id(held) in self.walk.grids

    def _grid(self, held: Tensor, groups: int) -> Grid | None:
        """These values; None where they are not one grid for each output."""
        dim = int(self._transposed)
        if self.quantizer is None:
            found = as_rows(self.walk.grids[id(held)], tuple(held.shape), groups, dim)
            if found is None or not (self._transposed and held.ndim > 2):
                return found
            return found if bool((found.scale == found.scale[:, :, :1]).all()) else None
        return grid_of(self.walk.second, self.quantizer, held.shape[dim], groups, dim)

    def _gone(self, held: Tensor, groups: int) -> Tensor | None:
        """Zeros that stay: of a sparse network, or of what a quantized one was made of."""
        if id(held) in self.walk.sparse:
            gone = held == 0
        elif self._is_rounded and self.weight.path in self.walk.first.graph.tensor_paths:
            old = self.walk.first.tensor(self.weight.path)
            gone = (held == 0) & (old == 0) if old.shape == held.shape else torch.tensor(False)
        else:
            return None
        return self._matrix(gone, groups) if bool(gone.any()) else None

    def _matrix(self, tensor: Tensor, groups: int) -> Tensor:
        """(groups, outputs of one group, unknowns)."""
        rows = self._turned(tensor.transpose(0, 1) if self._transposed else tensor)
        return rows.reshape(groups, rows.shape[0] // groups, -1)

    def _turned(self, rows: Tensor) -> Tensor:
        """The other way round along the kernel: a transposed convolution as a plain one."""
        return rows.flip(tuple(range(2, rows.ndim))) if self._transposed else rows


def _before(pairs: Group, runs: Runs) -> Iterator[tuple[Run, Run, Tensor]]:
    """The runs, one by one, each brought to what stands before the calls."""
    for one, two, held in runs:
        one.before(pairs[0].left)
        two.before(pairs[0].right)
        one.forget()
        two.forget()
        yield one, two, held


def _differ(pairs: Group, one: Run, two: Run) -> bool:
    """Whether a layer has other inputs than the original's, or other weights of the same shape."""
    for pair in pairs:
        (x, w), (y, v) = (
            [run.values[operand(node, which).name] for which in (0, 1)]
            for run, node in ((one, pair.left), (two, pair.right))
        )
        other = w.shape == v.shape and not torch.equal(w, v)
        if other or x.shape != y.shape or not torch.equal(x, y):
            return True
    return False


def _is_changed(pair: Pair, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether any operand of an operator is not that of the original."""
    first = [t for name in pair.left.inputs for t in tensors(a[name])]
    second = [t for name in pair.right.inputs for t in tensors(b[name])]
    return len(first) != len(second) or not all(map(torch.equal, first, second))


def check_finite(node: Node, *activations: Tensor) -> None:
    """Refuse activations that are not finite.

    Raises:
        DataError: naming the layer.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in activations):
        raise DataError(
            f"repair(data), layer {layer_name(node)!r}",
            "activations are NaN or infinite",
            "Check the data, and that both networks give finite outputs for them",
        )
