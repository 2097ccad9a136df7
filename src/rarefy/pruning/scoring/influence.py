"""How important a residual block is, on the scale of the scores of units.

The importance of a set of units is the sum of theirs; that of a block is the sum over the units
that live in it alone, times its *influence*: how much its branch does to the trunk, relative to
the other blocks. With data, influence is ``1 - cos(trunk, trunk + branch)``, one minus the cosine
between what goes into a block and what comes out (Men et al. 2024, ShortGPT,
https://arxiv.org/abs/2403.03853; there of every token, here of every example, since a graph does
not tell which dimensions are positions). Without data it is the magnitude of the block's weights
(as in Kim et al. 2024, https://arxiv.org/abs/2402.02834; there their sum, here squared and by
output unit, so that wide and narrow layers count alike). Influences have mean 1 over the blocks of
a network, so that a block of mean influence counts as much as all of its units together, under any
criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy.batches import (
    answering,
    batch_size,
    call,
    evaluating,
    length_of,
    lengthened,
    mask_of_all,
    take,
)
from rarefy.errors import DataError
from rarefy.graph.blocks import Block
from rarefy.graph.capture import graph_model
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node
from rarefy.graph.trace import Network
from rarefy.pruning.running.examples import leading
from rarefy.pruning.running.origins import counted
from rarefy.pruning.running.taps import Runner
from rarefy.types import Data, Inputs

WHERE = "prune(data)"

SAMPLES = 512
"""Examples on which the influence of blocks is measured."""


def importances(
    model: nn.Module, network: Network, totals: Sequence[float], data: Data | None = None
) -> NDArray[np.float64]:
    """The importance of every block of a network, comparable with the scores of its units.

    Args:
        model: the network.
        network: its trace.
        totals: importance of all units of each group together.
        data: batches on which the blocks' influence is measured; without, it is their magnitude.

    Returns:
        Shape (blocks,).

    Raises:
        DataError: the network does not run on the data.
    """
    sums = np.array([_held(network, block, totals) for block in network.blocks])
    known = sums[sums > 0]
    sums[sums == 0] = known.mean() if len(known) else 1.0  # no units of their own: as the others
    measured = magnitudes(model, network) if data is None else influences(model, network, data)
    mean = float(measured.mean())
    relative = measured / mean if mean > 0 else np.ones(len(measured))
    found: NDArray[np.float64] = sums * relative
    return found


def _held(network: Network, block: Block, totals: Sequence[float]) -> float:
    """The importance of all units that live in a block alone."""
    return sum(totals[g] for g in inner(network, [block]))


def inner(network: Network, blocks: Collection[Block]) -> frozenset[int]:
    """Numbers of the groups whose units take entries of these blocks' tensors only."""
    tensors = {path for block in blocks for path in block.tensors}
    return frozenset(
        number
        for number, group in enumerate(network.groups)
        if all(member.path in tensors for member in group.members)
    )


def magnitudes(model: nn.Module, network: Network) -> NDArray[np.float64]:
    """Mean over the weights ``W`` of every block of ``||W||^2 / rows(W)``.

    That is the mean square of a layer's outputs where its inputs are white, and does not depend on
    its width. A block without weights counts with its other parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def gain(block: Block) -> float:
        paths = dict.fromkeys((*block.tensors, *block.shared))
        held = [parameters[path].detach() for path in paths if path in parameters]
        kernels = [t for t in held if t.ndim > 1] or held
        gains = [float(t.double().square().sum()) / len(t) for t in kernels if t.numel()]
        return sum(gains) / max(len(gains), 1)

    return np.array([gain(block) for block in network.blocks])


def influences(model: nn.Module, network: Network, data: Data) -> NDArray[np.float64]:
    """``1 - cos(trunk, trunk + branch)`` of every block, the mean over up to ``SAMPLES`` examples.

    Raises:
        DataError: the network does not run on the data.
    """
    held = leading(data, SAMPLES, WHERE)
    length = max(map(length_of, held))
    runner = Runner(model, network, where=WHERE)
    runs: dict[int, _Watched] = {}
    seen = 0
    for inputs in (lengthened(inputs, length) for inputs in held):
        found = runner.trace(inputs)
        if id(found) not in runs:
            if [block.name for block in found.blocks] != [block.name for block in network.blocks]:
                raise DataError(
                    WHERE,
                    "for inputs of these shapes other blocks of the network can be bypassed",
                    "Trace the network with example inputs of the shapes of the data",
                )
            runs[id(found)] = _Watched(graph_model(model, found.captured), found.blocks)
        part = take(inputs, SAMPLES - seen)
        watched = runs[id(found)]
        with evaluating(watched):
            try:
                watched.show(part)
            except Exception:  # noqa: BLE001 - a graph of one batch size takes a batch as it comes
                with answering(WHERE):
                    watched.show(inputs)
        seen += batch_size(part)
    turned = np.array([[run.turned[add] for add in run.adds] for run in runs.values()]).sum(0)
    rows = np.array([[run.rows[add] for add in run.adds] for run in runs.values()]).sum(0)
    return np.asarray(turned / np.maximum(rows, 1), np.float64)


class _Watched(GraphModel):
    """A network that sums up how far its blocks turn the trunk, as it runs.

    Attributes:
        adds: the node that adds the branch of each block.
        turned: node that adds a branch -> sum of ``1 - cos`` over examples.
        rows: the same node -> number of these.
    """

    def __init__(self, model: GraphModel, blocks: Sequence[Block]) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        super().__init__(model.graph, parameters, buffers)
        self.adds = tuple(block.add for block in blocks)
        self._branches = {block.add: block.branch for block in blocks}
        self.turned = dict.fromkeys(self._branches, 0.0)
        self.rows = dict.fromkeys(self._branches, 0)
        self._tokens: Tensor | None = None

    def show(self, inputs: Inputs) -> None:
        """Run on some examples, whose padding does not count."""
        self._tokens = mask_of_all(inputs)
        call(self, inputs)

    def step(self, node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Run one call; where it adds a branch, compare its result with the trunk."""
        if node.name not in self._branches:
            return super().step(node, function, values)
        operands = (arg.name for arg in node.args[:2])
        trunk = self._rows(values[next(n for n in operands if n != self._branches[node.name])])
        found: Tensor = super().step(node, function, values)
        sums = self._rows(found)
        turned = 1 - torch.cosine_similarity(trunk, sums, dim=1, eps=1e-30)
        turned = turned.masked_fill((sums == trunk).all(1), 0.0)  # of zeros, too
        tokens = counted(found, self._tokens)
        if isinstance(tokens, Tensor):  # an example without any has nothing to tell
            turned = turned[tokens.flatten(1).any(1)]
        self.turned[node.name] += float(turned.clamp_min(0).sum())
        self.rows[node.name] += len(turned)
        return found

    def _rows(self, tensor: Tensor) -> Tensor:
        """Examples as rows, zeros at padding; in a copy, since the sum may be written in place."""
        own = tensor.detach().to(torch.float64, copy=True) * counted(tensor, self._tokens)
        return own.reshape(max(len(tensor), 1), -1)
