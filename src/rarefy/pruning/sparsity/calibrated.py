"""Weights set to zero layer by layer, chosen and made up for on calibration data.

The original and the sparse network run side by side, so that every layer sees what the layers
before it have become. Of each batch only the values between two layers are held; what the rows of
a layer say is summed up in matrices whose size does not depend on the number of examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.batches import answering, batch_size, evaluating, take
from rarefy.errors import DataError, first_line
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node, Ref
from rarefy.pruning.running.examples import live
from rarefy.pruning.running.lockstep import AS_THEY_LIE, Run, operand, unsolvable
from rarefy.pruning.sparsity.elements import SparseGPT
from rarefy.pruning.sparsity.gram import Sums, add_rows
from rarefy.pruning.sparsity.patterns import NM, Pattern
from rarefy.pruning.sparsity.sparsegpt import Selection, moved, reconstructed, ridged
from rarefy.pruning.sparsity.weights import Layer, zero
from rarefy.types import Inputs

MEMORY = 1 << 30
"""Bytes of values between layers that may be held at once; fewer samples are used beyond it."""

ROWS = 64
"""Rows of a layer per unknown that are used at most, drawn at random."""

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
        errors: path -> held-out error of plain magnitude, of what was taken.
        fallback: path -> why plain magnitude was taken.
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
        self.first, self.second = pair
        self.graph, self.layers, self.pattern, self.rule = pair[1].graph, layers, pattern, rule
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
        nodes = self._nodes()
        for layer in self.layers:
            if layer.path in self.fallback:
                zero([layer], [self.gone[layer.path]])
        with evaluating(self.first, self.second):
            chunks = self._affordable(given, frozenset(node.name for node, _ in nodes))
            self.samples = sum(map(batch_size, chunks))
            held = _held_out([batch_size(chunk) for chunk in chunks])
            runs = [(Run(self.first, chunk), Run(self.second, chunk)) for chunk in chunks]
            for node, layer in nodes:
                self._layer(node, layer, runs, held)

    def _nodes(self) -> list[tuple[Node, Layer]]:
        """The operators to solve, in order, each with its weight; the others fall back."""
        by_id = {id(layer.weight): layer for layer in self.layers}
        found: list[tuple[Node, Layer]] = []
        reasons: dict[str, str] = {}
        uses = [n for n in self.graph.calls for name in n.inputs if self._weight(name) in by_id]
        for node in uses:
            layer = next(by_id[i] for i in map(self._weight, node.inputs) if i in by_id)
            weight = self.graph.by_name[_weight_name(node)] if node.kind in AS_THEY_LIE else None
            if weight is None or self._weight(weight.name) != id(layer.weight):
                reasons[layer.path] = f"{node.kind} is not solved"
            elif sum(id(layer.weight) in map(self._weight, n.inputs) for n in uses) > 1:
                reasons[layer.path] = "its weight is used several times"
            else:
                reasons[layer.path] = unsolvable(self.graph, weight, node)
                found.append((node, layer))
        missing = "it is not read for inputs like these"
        for layer in self.layers:
            if reason := reasons.get(layer.path, missing):
                self.fallback[layer.path] = reason
        return [(node, layer) for node, layer in found if layer.path not in self.fallback]

    def _weight(self, name: str) -> int | None:
        """Identity of the tensor that a node reads."""
        node = self.graph.by_name[name]
        return id(self.second.tensor(node.path)) if node.op == "tensor" else None

    def _affordable(self, given: Sequence[Inputs], names: frozenset[str]) -> list[Inputs]:
        """The first of the batches, with as many examples as are wanted and may be held."""
        peak, batch = live(self.graph, names)
        wanted = max(2, min(self.rule.samples, MEMORY // max(2 * (peak // batch), 1)))
        found: list[Inputs] = []
        for inputs in given:
            found.append(take(inputs, wanted))
            wanted -= batch_size(found[-1])
            if wanted <= 0:
                break
        return found

    def _layer(
        self, node: Node, layer: Layer, runs: Sequence[tuple[Run, Run]], held: Sequence[Tensor]
    ) -> None:
        with answering(WHERE):
            for one, two in runs:
                one.through(node)
                two.before(node)
        pairs = [
            (two.values[operand(node, 0).name], one.values[node.name], seen)
            for (one, two), seen in zip(runs, held, strict=True)
        ]
        if not all(bool(torch.isfinite(t).all()) for x, y, _ in pairs for t in (x, y)):
            raise DataError(
                f"{WHERE}, layer {layer.path!r}",
                "activations are NaN or infinite",
                "Check the data, and that the network gives finite outputs for them",
            )
        self._reconstruct(node, layer, *self._grams(node, layer, pairs))

    def _grams(
        self, node: Node, layer: Layer, pairs: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Sums, Sums]:
        """Sums over the rows to solve on, and over those that are held out."""
        weight = layer.weight
        convolution = node.kind.startswith("conv")
        groups = node.argument("groups") if convolution else 1
        outputs = weight.shape[1 - layer.input_dim] // groups
        unknowns = weight.numel() // weight.shape[1 - layer.input_dim]
        fit, check = (Sums.empty(groups, unknowns, outputs, weight.device) for _ in range(2))
        every = sum(y.numel() for _, y, _ in pairs) // (groups * outputs)
        share = min(1.0, max(ROWS * unknowns, 4096) / max(every, 1))
        generator = torch.Generator().manual_seed(0)
        for x, y, seen in pairs:
            add_rows((fit, check), node, (x, y), weight, seen, share, generator)
        return _ordered(fit, layer, self.pattern), _ordered(check, layer, self.pattern)

    def _reconstruct(self, node: Node, layer: Layer, fit: Sums, check: Sums) -> None:
        """SparseGPT, taken where it is better than plain magnitude on the held-out rows."""
        if not fit.count or not check.count:
            self._fall_back(layer, "too few examples to solve it on some and check it on others")
            return
        matrix = layer.matrix(layer.weight.double(), self.pattern)
        weight = matrix.reshape(len(fit.xx), -1, matrix.shape[1])
        bias = self._bias(node)
        old = torch.zeros_like(fit.y) if bias is None else bias.old.view(fit.y.shape)
        sums = fit if bias is None else fit.centered()
        hessian = ridged(sums.xx, self.rule.damp)
        selection = Selection(self.pattern, self._count(layer), layer.inputs, self.rule.block)
        mask = layer.matrix(self.gone[layer.path], self.pattern).view(weight.shape)
        try:
            optimum = moved(weight, sums.xx, sums.xy, hessian)
            found, gone = reconstructed(optimum, hessian, selection, mask)
        except RuntimeError as error:
            self._fall_back(layer, f"it cannot be solved: {first_line(error)}")
            return
        found = found.transpose(1, 2)
        new = old if bias is None else (fit.y - fit.x @ found) / fit.count
        before = check.error(weight.masked_fill(mask, 0.0).transpose(1, 2), old)
        after = check.error(found, new)
        self.errors[layer.path] = (before, after)
        if not after <= before:
            self._fall_back(layer, "with it, the layer's outputs are farther from the original's")
            return
        self._take(layer, found.transpose(1, 2).flatten(0, 1), gone.flatten(0, 1))
        if bias is not None:
            bias.set(new.flatten())

    def _count(self, layer: Layer) -> int:
        """Units that go of a layer, as plain magnitude has it; for N:M, its inputs."""
        if isinstance(self.pattern, NM):
            return layer.inputs
        mask = layer.matrix(self.gone[layer.path].float(), self.pattern)
        return int(self.pattern.units(mask).sum().round())

    def _take(self, layer: Layer, matrix: Tensor, gone: Tensor) -> None:
        new, mask = (layer.tensor(m, self.pattern) for m in (matrix, gone))
        layer.weight.copy_(new.to(layer.weight.dtype))
        self.gone[layer.path] = mask

    def _fall_back(self, layer: Layer, reason: str) -> None:
        self.fallback[layer.path] = reason
        zero([layer], [self.gone[layer.path]])

    def _bias(self, node: Node) -> _Bias | None:
        """What takes up a layer's mean: its bias, or that of the BatchNorm that alone reads it."""
        given = operand(node, 2)
        if isinstance(given, Ref):
            return _Bias(self.second.tensor(self.graph.by_name[given.name].path), 1)
        users = self.graph.users[node.name]
        if len(users) != 1 or users[0].kind != "batch_norm":
            return None
        mean = users[0].argument("running_mean")
        if not isinstance(mean, Ref) or users[0].args[0].name != node.name:
            return None
        source = self.graph.by_name[mean.name]
        if source.op != "tensor" or len(self.graph.users[source.name]) > 1:
            return None
        return _Bias(self.second.tensor(source.path), -1)


class _Bias:
    """A vector that is added to a layer's outputs, or taken off them."""

    def __init__(self, tensor: Tensor, sign: int) -> None:
        self._tensor, self._sign = tensor, sign
        self.old = tensor.detach().double() if sign > 0 else torch.zeros_like(tensor).double()

    def set(self, value: Tensor) -> None:
        """Make the sum of old and new what is wanted."""
        self._tensor.add_((self._sign * (value - self.old)).to(self._tensor.dtype))


def _weight_name(node: Node) -> str:
    weight = operand(node, 1)
    return str(weight.name) if isinstance(weight, Ref) else node.name


def _ordered(gram: Sums, layer: Layer, pattern: Pattern) -> Sums:
    """Columns in the order of the pattern's matrix."""
    if not isinstance(pattern, NM) or layer.weight.ndim == 2:
        return gram
    order = torch.arange(gram.xx.shape[1]).view(layer.inputs, -1).T.flatten()
    return Sums(
        gram.count,
        gram.xx[:, order][:, :, order],
        gram.xy[:, order],
        gram.yy,
        gram.x[:, :, order],
        gram.y,
    )


def _held_out(sizes: Sequence[int]) -> list[Tensor]:
    """For each example of each batch, whether it is held out: the second of every five."""
    every = torch.arange(sum(sizes)) % HELD_OUT == 1
    return list(torch.split(every, list(sizes)))
