"""Weights set to zero layer by layer, chosen and made up for on calibration data.

The original and the sparse network run side by side, so that every layer sees what the layers
before it have become. Of each batch only the values between two layers are held; what the rows of
a layer say is summed up in matrices whose size does not depend on the number of examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.batches import answering, batch_size, evaluating, take
from rarefy.errors import DataError, first_line
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Ref
from rarefy.pruning.running.examples import affordable
from rarefy.pruning.running.lockstep import Run, batch_dims
from rarefy.pruning.running.products import Product, positions
from rarefy.pruning.running.solvable import Layers, next_norm, part_of, picked, put
from rarefy.pruning.running.uses import gathered
from rarefy.pruning.sparsity.elements import SparseGPT
from rarefy.pruning.sparsity.gram import Sums, add_rows
from rarefy.pruning.sparsity.patterns import NM, Block, Pattern, Unstructured
from rarefy.pruning.sparsity.sparsegpt import Selection, moved, reconstructed, regularized, ridge_of
from rarefy.pruning.sparsity.weights import Layer, zero
from rarefy.types import Inputs

HELD_OUT = 5
"""One example of so many is kept from all solves, to check them on."""

WHERE = "prune(data)"


class Calibration:
    """One pass through both networks, during which the second becomes sparse.

    Args:
        pair: the original, and the network to change, with one graph.
        layers: the weights to prune.
        plain: what plain magnitude would remove of each.
        pattern: what goes together.
        rule: options of the reconstruction.

    Attributes:
        gone: path of a weight -> what went of it.
        errors: path -> held-out error of plain magnitude, of what was taken. Where one parameter
            packs several projections, each is named by its rows, ``"in_proj_weight[0:64]"``.
        fallback: path, or such a part of it -> why plain magnitude was taken.
        samples: examples used.
    """

    def __init__(
        self,
        pair: tuple[GraphModel, GraphModel],
        layers: Sequence[Layer],
        plain: Sequence[Tensor],
        pattern: Pattern,
        rule: SparseGPT,
    ) -> None:
        graph = gathered(pair[1].graph, pair[1].graph.tensor_paths)
        self.first, self.second = (model.with_graph(graph) for model in pair)
        self.graph, self.layers, self.pattern, self.rule = graph, layers, pattern, rule
        self.gone = {layer.path: mask for layer, mask in zip(layers, plain, strict=True)}
        self.errors: dict[str, tuple[float, float]] = {}
        self.fallback: dict[str, str] = {}
        self.samples = 0

    def run(self, given: Sequence[Inputs]) -> None:
        """Prune all layers; those that cannot be solved for go first, by magnitude.

        Args:
            given: batches of one shape but for their number of examples.

        Raises:
            DataError: they do not run, or activations are not finite.
        """
        found = self._parts()
        for layer in self.layers:
            if layer.path in self.fallback:
                zero([layer], [self.gone[layer.path]])
        with evaluating(self.first, self.second):
            names = frozenset(call.node.name for part in found for call in part.calls)
            chunks = self._affordable(given, names)
            self.samples = sum(map(batch_size, chunks))
            held = _held_out([batch_size(chunk) for chunk in chunks])
            dims = batch_dims(self.second, chunks[0])
            runs = [(Run(self.first, c), Run(self.second, c, dims)) for c in chunks]
            for part in found:
                self._solve(part, runs, held)

    def _parts(self) -> list[_Part]:
        """What is solved at once, in order; layers of which any part is not fall back."""
        by_id = {id(layer.weight): layer for layer in self.layers}
        products = Layers(self.graph)
        found: list[_Part] = []
        reasons: dict[str, list[str]] = {}
        for calls in products.groups():
            layer = by_id.get(id(self.second.tensor(calls[0].path)))
            if layer is not None:
                bias = calls[0].bias
                part = products.unsolvable(calls) or _part(calls, layer, self.pattern)
                if bias is not None and id(self.second.tensor(bias.path)) in by_id:
                    part = "its bias is set to zero in parts, too"
                if isinstance(part, str):
                    reasons.setdefault(layer.path, []).append(part)
                else:
                    found.append(part)
        kinds = {id(self.second.tensor(path)): kind for path, kind in products.others.items()}
        solved = {part.layer.path for part in found}
        for layer in self.layers:
            kind = kinds.get(id(layer.weight))
            unread = "it is not read for inputs like these"
            unread = f"{kind} does not multiply activations with it" if kind else unread
            if layer.path in reasons or layer.path not in solved:
                self.fallback[layer.path] = reasons.get(layer.path, [unread])[0]
        return [part for part in found if part.layer.path not in self.fallback]

    def _affordable(self, given: Sequence[Inputs], names: frozenset[str]) -> list[Inputs]:
        """The first of the batches, with as many examples as are wanted and may be held."""
        wanted = max(2, affordable(self.second, self.rule.samples, names))
        found: list[Inputs] = []
        for inputs in given:
            found.append(take(inputs, wanted))
            wanted -= batch_size(found[-1])
            if wanted <= 0:
                break
        return found

    def _solve(self, part: _Part, runs: Sequence[tuple[Run, Run]], held: Sequence[Tensor]) -> None:
        fit, check = (part.sums() for _ in range(2))
        generator = torch.Generator().manual_seed(0)
        for (one, two), seen in zip(runs, held, strict=True):
            for product, x, y in self._activations(part, one, two):
                if not all(bool(torch.isfinite(t).all()) for t in (x, y)):
                    raise DataError(
                        f"{WHERE}, layer {part.name!r}",
                        "activations are NaN or infinite",
                        "Check the data, and that the network gives finite outputs for them",
                    )
                every = y.numel() // part.at[:, :, 0].numel() * len(part.calls)
                every = every * self.samples // max(len(seen), 1)
                operands = (x, two.values[product.weight])
                sums = (fit, check)
                add_rows(sums, product, operands, y, two.origins, seen, every, generator)
        self._reconstruct(part, part.ordered(fit), part.ordered(check))
        for _, two in runs:
            for way in (way for call in part.calls for way in call.ways):
                two.renew(way)

    def _activations(
        self, part: _Part, one: Run, two: Run
    ) -> Iterator[tuple[Product, Tensor, Tensor]]:
        """Each call of a layer with its inputs in the sparse network, its outputs in the other."""
        with answering(WHERE):
            two.before(part.calls[0].node)
        for call in part.calls:
            with answering(WHERE):
                one.through(call.node)
            yield call, two.values[call.x], one.values[call.node.name]

    def _reconstruct(self, part: _Part, fit: Sums, check: Sums) -> None:
        """SparseGPT, taken where it is better than plain magnitude on the held-out rows."""
        if not fit.count or not check.count:
            reason = "too few examples to solve it on some and check it on others"
            self._fall_back(part, reason)
            return
        weight = picked(part.layer.weight.detach(), part.at).double()
        mask = picked(self.gone[part.layer.path], part.at)
        bias = self._bias(part)
        old = torch.zeros_like(fit.y) if bias is None else bias.old.view(fit.y.shape)
        sums = fit.raw() if bias is None else fit.centered()
        count = part.count(mask, self.pattern)
        selection = Selection(self.pattern, count, part.layer.inputs, self.rule.block)

        def solved(hessian: Tensor) -> tuple[Tensor, Tensor]:
            optimum = moved(weight, sums.xx, sums.xy, hessian)
            return reconstructed(optimum, hessian, selection, mask)

        try:
            found, gone = regularized(sums.xx, ridge_of(sums.xx, self.rule.damp), solved)
        except RuntimeError as error:
            self._fall_back(part, unsolved(sums, error))
            return
        found = found.to(part.layer.weight.dtype).double()  # the bias makes up for rounding, too
        turned = found.transpose(1, 2)
        new = old if bias is None else fit.mean_y - fit.mean_x @ turned
        before = check.error(weight.masked_fill(mask, 0.0).transpose(1, 2), old)
        after = check.error(turned, new)
        self.errors[part.name] = (before, after)
        if not after <= before:
            reason = "with it, the layer's outputs are farther from the original's"
            self._fall_back(part, reason)
            return
        put(part.layer.weight, part.at, found)
        put(self.gone[part.layer.path], part.at, gone)
        if bias is not None:
            bias.set(new)

    def _fall_back(self, part: _Part, reason: str) -> None:
        self.fallback[part.name] = reason
        gone = picked(self.gone[part.layer.path], part.at)
        kept = picked(part.layer.weight.detach(), part.at).masked_fill(gone, 0.0)
        put(part.layer.weight, part.at, kept)

    def _bias(self, part: _Part) -> _Bias | None:
        """What takes up a layer's mean: its bias, or that of the BatchNorm that alone reads it."""
        given = part.calls[0].bias
        if given is not None:
            return _Bias(self.second.tensor(given.path), given.index, 1)
        norms = [next_norm(self.graph, call.node) for call in part.calls]
        means = [None if norm is None else norm.argument("running_mean") for norm in norms]
        names = {mean.name for mean in means if isinstance(mean, Ref)}
        if len(names) != 1 or not all(isinstance(mean, Ref) for mean in means):
            return None
        source = self.graph.by_name[names.pop()]
        if source.op != "tensor" or len(self.graph.users[source.name]) > len(norms):
            return None
        held = self.second.tensor(source.path)
        return _Bias(held, torch.arange(held.numel()), -1)


@dataclass(frozen=True)
class _Part:
    """A weight, or a part of it, that one call multiplies with, or several calls.

    Attributes:
        calls: these.
        layer: the weight.
        order: for each column, which unknown of the call it is, as the pattern wants them.
        at: where the entries are in the flattened weight, (groups, outputs of one, columns).
    """

    calls: Sequence[Product]
    layer: Layer
    order: Tensor
    at: Tensor

    @property
    def name(self) -> str:
        """Path of the weight, with the part of it where it is not all."""
        return self.layer.path + part_of(self.calls[0])

    def sums(self) -> Sums:
        """No rows of the call yet."""
        groups, outputs, columns = self.at.shape
        return Sums.empty(groups, columns, outputs, self.layer.weight.device)

    def ordered(self, sums: Sums) -> Sums:
        """Columns in the order of the pattern."""
        by = self.order.to(sums.xx.device)
        xx, xy = sums.xx[:, by][:, :, by], sums.xy[:, by]
        return replace(sums, xx=xx, xy=xy, x=sums.x[:, :, by], pivot_x=sums.pivot_x[:, :, by])

    def count(self, mask: Tensor, pattern: Pattern) -> int:
        """Units that go, as plain magnitude has it; for N:M, its inputs."""
        if isinstance(pattern, NM):
            return self.layer.inputs
        return int(pattern.units(mask.flatten(0, 1).float()).sum().round())


def _part(calls: Sequence[Product], layer: Layer, pattern: Pattern) -> _Part | str:
    """What these calls multiply with; a reason where the pattern reaches beyond it."""
    at = positions(calls[0])
    if isinstance(pattern, Unstructured):
        return _Part(calls, layer, torch.arange(at.shape[2]), at)
    every = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    matrix = layer.matrix(every, pattern)
    place = torch.empty_like(every.flatten())
    place[matrix.flatten()] = torch.arange(matrix.numel())
    rows, columns = place[at] // matrix.shape[1], place[at] % matrix.shape[1]
    whole = at.shape[2] == matrix.shape[1] and bool((rows == rows[:, :, :1]).all())
    if not whole or not bool((columns == columns[:1, :1]).all()):
        return "its weight is used in parts of its rows"
    lines = rows[:, :, 0].flatten()
    first, end = int(lines[0]), int(lines[0]) + len(lines)
    if isinstance(pattern, Block) and (
        first % pattern.rows
        or (end % pattern.rows and end < len(matrix))
        or not torch.equal(lines, torch.arange(first, end))
    ):
        return "its weight is used in parts of its blocks"
    order = columns[0, 0].argsort()
    return _Part(calls, layer, order, at[:, :, order])


class _Bias:
    """Entries of a vector that are added to a layer's outputs, or taken off them."""

    def __init__(self, tensor: Tensor, index: Tensor, sign: int) -> None:
        self._tensor, self._index, self._sign = tensor, index, sign
        self._values = picked(tensor.detach(), index).double().flatten()
        self.old = self._values if sign > 0 else torch.zeros_like(self._values)

    def set(self, value: Tensor) -> None:
        """Make the sum of old and new what is wanted."""
        moved = self._values + self._sign * (value.flatten() - self.old)
        put(self._tensor, self._index, moved)


def unsolved(sums: Sums, error: RuntimeError) -> str:
    """Why a layer could not be solved, and what helps."""
    if not all(bool(torch.isfinite(t).all()) for t in (sums.xx, sums.xy)):
        return (
            "it cannot be solved, as squares of its inputs are infinite in single precision; "
            "normalize the data, or prune model.double() on data in double precision"
        )
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return (
            "it cannot be solved, as its inputs depend on each other; give more and other data, or "
            "criterion=SparseGPT(damp=0.1)"
        )
    return f"it cannot be solved here ({first_line(error)}); try another device, or exclude it"


def _held_out(sizes: Sequence[int]) -> list[Tensor]:
    """For each example of each batch, whether it is held out: the second of every five."""
    every = torch.arange(sum(sizes)) % HELD_OUT == 1
    return list(torch.split(every, list(sizes)))
