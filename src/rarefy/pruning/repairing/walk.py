"""Two networks on their way through their graphs side by side, the second healed as they go.

Examples come in parts. Between two layers, only the values that layers to come read are held, and
what the rows of a layer say is summed up in matrices whose size does not depend on the number of
examples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.batches import tensors
from rarefy.errors import DataError, first_line
from rarefy.graph.equations import EQUATIONS
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node, Ref
from rarefy.grid import Grid as WeightGrid
from rarefy.pruning.repairing.grids import Grid, of_quantizer, of_rounded
from rarefy.pruning.repairing.moments import Moments
from rarefy.pruning.repairing.pairs import Group, Pair, layer_pairs
from rarefy.pruning.repairing.sums import owed
from rarefy.pruning.repairing.system import Mean, Weights, solve
from rarefy.pruning.running.inputs import places
from rarefy.pruning.running.lockstep import Run, batch_dims, layer_name
from rarefy.pruning.running.products import (
    CONVOLUTIONS,
    DECONVOLUTIONS,
    Entries,
    Product,
    outputs_dim,
    positions,
)
from rarefy.pruning.running.solvable import Layers, next_norm, picked, put, survivors
from rarefy.pruning.sparsity.gram import Sums, add_rows
from rarefy.types import Inputs

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
        changed: layers and the entries of their tensors that were changed, in order.
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
    changed: list[tuple[str, Sequence[Entries]]] = field(default_factory=list)
    _layers: tuple[Layers, Layers] = field(init=False)
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
        dims = batch_dims(self.second, parts[0])
        runs = [
            (Run(self.first, part), Run(self.second, part, dims), held)
            for part, held in zip(parts, held_out, strict=True)
        ]
        self._layers = Layers(self.first.graph), Layers(self.second.graph)
        for group in groups:
            self._heal(group, runs)
        return runs

    def _heal(self, pairs: Group, runs: Runs) -> None:
        right = pairs[0].right
        if right.name in self._layers[1].products:
            self._heal_layer(pairs, runs)
        elif right.name in self._norms:
            self._move_statistics(pairs, runs)
        elif right.kind != "batch_norm" and self._are_changed(pairs, runs):
            self.skipped[layer_name(right)] = self._unmultiplied(right)

    def _unmultiplied(self, right: Node) -> str:
        """Why a call with weights is no product with one of them."""
        if right.kind not in (*CONVOLUTIONS, *DECONVOLUTIONS, *EQUATIONS):
            return f"weights of {right.kind} are not solved"
        own = [self.second.graph.by_name[name] for name in right.inputs]
        held = [self.second.tensor(node.path) for node in own if node.op == "tensor"]
        is_complex = any(tensor.is_complex() for tensor in held)
        return "its weight is complex" if is_complex else "its weight is computed in the graph"

    def _heal_layer(self, pairs: Group, runs: Runs) -> None:
        old, new = self._layers
        rights = [new.products[pair.right.name] for pair in pairs]
        name, path, bias = new.name(rights[0]), rights[0].path, rights[0].bias
        reason = new.unsolvable(rights)
        calls = [
            _Call(pair, old.products[pair.left.name], right)
            for pair, right in zip(pairs, rights, strict=True)
            if pair.left.name in old.products
        ]
        if id(self.second.tensor(path)) not in self.own:
            reason = reason or "its weight is a constant of the graph"
        elif bias is not None and id(self.second.tensor(bias.path)) not in self.own:
            reason = reason or "its bias is a constant of the graph"
        elif bias is not None and id(self.second.tensor(bias.path)) in self.sparse:
            reason = reason or "its bias has zeros that stay"
        elif len(calls) < len(pairs):
            reason = reason or "its weight is computed in the original"
        if not reason:
            reason = self._unlike(calls, runs)
        if not reason:
            left = survivors(calls[0].left, rights[0], self._kept(path))
            if left is not None:
                _Layer(self, name, calls, left).heal(runs)
                return
            reason = "the original's layer has other outputs"
        if self._are_changed(pairs, runs):
            self.skipped[name] = reason

    def _are_changed(self, pairs: Group, runs: Runs) -> bool:
        """Whether any operand of any of the calls is not that of the original."""
        return any(
            _is_changed(pair, one, two) for one, two, _ in _before(pairs, runs) for pair in pairs
        )

    def _unlike(self, calls: Sequence[_Call], runs: Runs) -> str:
        """Why a layer's inputs cannot be held against the original's; empty where they can."""
        one, two, _ = next(_before([call.pair for call in calls], runs[:1]))
        for call in calls:
            old = places(call.left, one.values[call.left.x])
            if old != places(call.right, two.values[call.right.x]):
                return "units that went are among the rows of its inputs"
        return ""

    def _kept(self, path: str) -> dict[int, Tensor]:
        """Dimension of a tensor -> which of the original's entries along it remain, if not all."""
        return {
            dim: torch.from_numpy(index) for (own, dim), index in self.kept.items() if own == path
        }

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
                name = pair.right.args[0].name
                x, y = one.values[pair.left.args[0].name], two.values[name]
                check_finite(layer_name(pair.right), x, y)
                like = like and (x.shape[0], *x.shape[2:]) == (y.shape[0], *y.shape[2:])
                tokens = two.origins.tokens_beside(name, y.shape, 1) if like else None
                old.add(x, tokens)
                new.add(y, tokens)
        sources = self._norms[pairs[0].right.name]
        mean, variance = map(self.second.tensor, sources)
        every = torch.arange(len(self.first.tensor(sources[0])))
        left = self._kept(sources[0]).get(0, every).to(mean.device)
        if not like or len(left) != len(mean):
            return  # its other dimensions are units, too
        moved = [Entries(path, tuple(mean.shape)) for path in sources]
        self.changed.append((layer_name(pairs[0].right), moved))
        solved = self._means.get(pairs[0].right.args[0].name)
        if solved is not None:  # it gives less where its inputs cannot tell: that is to stay less
            mean.add_(new.mean - solved)
            return
        before = old.variance[left]
        ratio = torch.where(before > 0, new.variance / before.clamp_min(1e-12), 1.0)
        mean.add_(new.mean - old.mean[left])
        variance.mul_(ratio.clamp(1e-3, 1e3))

    def mean_of(self, layer: Product, rights: Sequence[Node]) -> Mean:
        """What takes up the mean of a layer's outputs."""
        if layer.bias is not None:
            return Mean.BIAS
        norms = [next_norm(self.second.graph, right) for right in rights]
        behind = {norm.name for norm in norms if norm is not None}
        found = {self._norms.get(name) for name in behind}
        calls = {name for name, statistics in self._norms.items() if statistics in found}
        alone = len(found) == 1 and calls == behind and len(behind) == len(rights)
        return Mean.NORM if alone else Mean.NONE

    def solved(self, rights: Sequence[Node], mean: Tensor) -> None:
        """Note the mean that a solved layer's outputs should have; a BatchNorm follows it."""
        self._means |= {right.name: mean for right in rights}


@dataclass(frozen=True)
class _Call:
    """One call of a layer in both networks."""

    pair: Pair
    left: Product
    right: Product

    def is_changed(self, one: Run, two: Run) -> bool:
        """Whether it has other inputs than the original's, or other weights of the same shape."""
        (x, w), (y, v) = (
            (run.values[own.x], run.values[own.weight])
            for run, own in ((one, self.left), (two, self.right))
        )
        other = w.shape == v.shape and not torch.equal(w, v)
        return other or x.shape != y.shape or not torch.equal(x, y)


@dataclass
class _Layer:
    """One layer that can be solved, with all calls of it."""

    walk: Walk
    name: str
    calls: Sequence[_Call]
    survivors: Tensor

    def heal(self, runs: Runs) -> None:
        """Solve it, and put what was found into the network, if that is better."""
        skipped = self.walk.skipped
        weights = self._weights()
        if weights is None:
            skipped[self.name] = "its weight has another grid than one for each output"
            return
        groups, outputs, unknowns = weights.values.shape
        device = weights.values.device
        fit, check = (Sums.empty(groups, unknowns, outputs, device) for _ in range(2))
        means = Moments(outputs_dim(self._layer))
        changed = self._sum_up(runs, (fit, check), means)
        if not changed:
            return
        if not fit.count or not check.count:
            skipped[self.name] = "too few examples to solve it on some and check it on others"
            return
        try:
            solved = solve(fit, check, weights)
        except RuntimeError as error:
            skipped[self.name] = f"it cannot be solved: {first_line(error)}"
            return
        self.walk.errors[self.name] = solved.errors
        if not solved.is_better:
            return
        layer, tensor = self._layer, self.walk.second.tensor
        put(tensor(layer.path), self._positions, solved.values)
        if layer.bias is not None:
            put(tensor(layer.bias.path), layer.bias.index, solved.bias)
        for _, two, _ in runs:
            for way in (way for call in self.calls for way in call.right.ways):
                two.renew(way)
        moved = [entries for entries in (layer.entries, layer.bias) if entries is not None]
        self.walk.changed.append((self.name, moved))
        if weights.mean is Mean.NORM:
            self.walk.solved([call.pair.right for call in self.calls], means.mean)

    def _sum_up(self, runs: Runs, sums: tuple[Sums, Sums], means: Moments) -> bool:
        """Add all rows to the sums, and tell whether there is anything to heal."""
        graphs, dim = (self.walk.first.graph, self.walk.second.graph), outputs_dim(self._layer)
        survivors = self.survivors.to(self.walk.second.tensor(self._layer.path).device)
        examples = sum(len(held) for _, _, held in runs)
        generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        changed = False
        for one, two, held in _before([call.pair for call in self.calls], runs):
            changed = any(call.is_changed(one, two) for call in self.calls) or changed
            for call in self.calls:
                pair, right = call.pair, call.right
                one.through(pair.end)
                x, target = two.values[right.x], one.values[pair.end.name]
                check_finite(self.name, target, x)
                target = self._rescaled(target.index_select(dim, survivors))
                layers = (pair.end, pair.right)
                lacking = owed(graphs, layers, (one.values, two.values), survivors, dim)
                if lacking is not None:
                    target += lacking
                means.add(target, two.origins.tokens_beside(right.node.name, target.shape, dim))
                every = target.numel() // len(survivors) * examples / len(held) * len(self.calls)
                operands = (x, two.values[right.weight])
                add_rows(sums, right, operands, target, two.origins, held, every, generator)
            one.forget()
        return changed

    def _rescaled(self, target: Tensor) -> Tensor:
        """The original's outputs, divided as those of this network's layer are."""
        factors, dim = self.walk.rescaled.get(self._layer.path), outputs_dim(self._layer)
        if factors is None:
            return target
        shape = [-1 if d == dim % target.ndim else 1 for d in range(target.ndim)]
        return target / factors.to(target.device, target.dtype).reshape(shape)

    @property
    def _layer(self) -> Product:
        """The first of the calls."""
        return self.calls[0].right

    @cached_property
    def _positions(self) -> Tensor:
        """Where the entries of its weight are in the parameter."""
        return positions(self._layer)

    def _weights(self) -> Weights | None:
        """What the system needs to know; None where the grid is of an unknown form."""
        second, layer = self.walk.second, self._layer
        held, at = second.tensor(layer.path).detach(), self._positions
        values = picked(held, at).double()
        grid: Grid | None = None
        if layer.entries.quantizer is not None:
            grid = of_quantizer(second, layer)
        elif id(second.tensor(layer.path)) in self.walk.grids:
            grid = of_rounded(self.walk.grids[id(second.tensor(layer.path))], layer)
        if self._is_rounded:
            if grid is None:
                return None
            values = grid.nearest(values)
        offset = values.new_zeros(len(values), 1, values.shape[1])
        if layer.bias is not None:
            bias = picked(second.tensor(layer.bias.path).detach(), layer.bias.index)
            offset = bias.double().reshape(offset.shape)
        mean = self.walk.mean_of(layer, [call.pair.right for call in self.calls])
        return Weights(values, offset, mean, self._gone(held, at), grid, self.walk.rounding)

    @property
    def _is_rounded(self) -> bool:
        """Whether the weight may have some values alone."""
        held = self.walk.second.tensor(self._layer.path)
        return self._layer.entries.quantizer is not None or id(held) in self.walk.grids

    def _gone(self, held: Tensor, at: Tensor) -> Tensor | None:
        """Zeros that stay: of a sparse network, or of what a quantized one was made of."""
        path, first = self._layer.path, self.walk.first
        if id(self.walk.second.tensor(path)) in self.walk.sparse:
            gone = picked(held, at) == 0
        elif self._is_rounded and path in first.graph.tensor_paths:
            old = first.tensor(path)
            if old.shape != held.shape:
                return None
            gone = (picked(held, at) == 0) & (picked(old, at) == 0)
        else:
            return None
        return gone if bool(gone.any()) else None


def _before(pairs: Sequence[Pair], runs: Runs) -> Iterator[tuple[Run, Run, Tensor]]:
    """The runs, one by one, each brought to what stands before the calls."""
    for one, two, held in runs:
        one.before(pairs[0].left)
        two.before(pairs[0].right)
        one.forget()
        two.forget()
        yield one, two, held


def _is_changed(pair: Pair, one: Run, two: Run) -> bool:
    """Whether any operand of an operator is not that of the original."""
    first = [t for name in pair.left.inputs for t in tensors(one.values[name])]
    second = [t for name in pair.right.inputs for t in tensors(two.values[name])]
    return len(first) != len(second) or not all(map(torch.equal, first, second))


def check_finite(layer: str, *activations: Tensor) -> None:
    """Refuse activations that are not finite.

    Raises:
        DataError: naming the layer.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in activations):
        raise DataError(
            f"repair(data), layer {layer!r}",
            "activations are NaN or infinite",
            "Check the data, and that both networks give finite outputs for them",
        )
