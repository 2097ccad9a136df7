"""Healing without labels: each layer is solved to reproduce the original's output.

The original and the compressed network run side by side, operator by operator, on the same inputs.
At every convolution, linear layer or product with a matrix whose inputs or weights changed, the
weights that best reproduce the original's outputs from the *compressed* network's own activations
are found by least squares, regularized towards the weights it has. Zeros of a sparse network stay
zero, so that 2:4 stays 2:4; weights of a quantized one are rounded to the grid that they have.
Calls of one layer on several inputs are solved at once. At every BatchNorm the running statistics
are moved by as much as the statistics of its input moved. A layer is changed only where that lowers
its error on examples that no solve has seen: the same fifth of them, at all layers. Where the
outputs end farther from the original's nevertheless, layers are taken back from the last on.

The reconstruction follows He et al. 2017 (https://arxiv.org/abs/1707.06168), done for all layers
in sequence. Units that are chosen by the same second-order solve, with the layer behind adapted,
are those of ``prune(criterion="obs")`` and ``"compensated"``
(:mod:`rarefy.pruning.scoring.surgeon`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy.batches import (
    answering,
    batch_size,
    call,
    evaluating,
    forked,
    map_tensors,
    seeded,
    take,
)
from rarefy.copies import copied, ordinary
from rarefy.errors import DataError, InputError, first_line, warn
from rarefy.graph.capture import Capture, capture, graph_model
from rarefy.graph.constants import fold_constants
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import plain_graph, stubs, without_zeros
from rarefy.grid import grids
from rarefy.pruning.checks import check_finite
from rarefy.pruning.repairing.pairs import StrangersError
from rarefy.pruning.repairing.rounding import ROUNDINGS
from rarefy.pruning.repairing.undoing import Changes, first_that_hold
from rarefy.pruning.repairing.walk import Walk
from rarefy.pruning.running.examples import affordable, collect, distance, parts
from rarefy.pruning.running.lockstep import Run
from rarefy.pruning.running.uses import gathered
from rarefy.types import Data, Inputs, check_network, is_count, python

RECORDS = {"pruned": "prune()", "sparsified": "prune()", "quantization": "quantize()"}
"""Attributes of compressed networks -> who leaves them."""


@dataclass(frozen=True)
class Repaired:
    """What a repair did; the attribute ``repaired`` of its result.

    Attributes:
        errors: layer -> (relative error before, after) on held-out activations; equal where the
            layer was left as it was. A projection that shares its parameter with others, as those
            of attention do, is named by its rows: ``"attention.in_proj_weight[0:64]"``.
        skipped: layer -> why it was not solved.
        samples: number of examples used.
    """

    errors: Mapping[str, tuple[float, float]]
    skipped: Mapping[str, str]
    samples: int


@forked()
@torch.inference_mode(False)
def repair(
    original: nn.Module,
    pruned: nn.Module,
    data: Data,
    *,
    samples: int = 512,
    seed: int = 0,
    rounding: str = "gptq",
) -> nn.Module:
    """Solve the weights of a compressed network so that it reproduces the original's activations.

    No label and no gradient is needed. Neither argument is changed. Memory is bounded: between
    layers only the values that layers to come read are held, and of a layer's rows only sums.

    What stays as it is: widths; the zeros of weights that were set to zero; the grids of quantized
    weights and activations. A quantized network's layers are held against the original's with
    their BatchNorms, and with its scales of channels where it was smoothed or equalized; zeros of a
    sparse network that was quantized stay zero, too.

    Args:
        original: the network before.
        pruned: what :func:`~rarefy.prune` made of it, at once or in several rounds, units or
            weights removed, or :func:`~rarefy.quantize`.
        data: batches, labelled or not.
        samples: number of examples to use, fewer where what is held of their activations exceeds
            :data:`~rarefy.pruning.running.examples.MEMORY`.
        seed: of the draw of rows.
        rounding: how solved weights of a quantized network are rounded to their grids: ``"gptq"``,
            column by column, or ``"learned"``
            (:mod:`rarefy.pruning.repairing.rounding`), nearer to the optimum and slower.

    Returns:
        A new network. Its attribute ``repaired`` is a :class:`Repaired` record.

    Raises:
        DataError: the data yield nothing, or activations are not finite.
        InputError: ``pruned`` is not a compression of ``original``, an option is unknown, or a
            weight is NaN or infinite.
        MemoryError: there was not enough of it.

    Where the two do not run side by side, a warning and ``repaired.skipped[""]`` say so.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 4)
        >>> q = rarefy.quantize(net, [x])  # doctest: +SKIP
        >>> repair(net, q, [x]).repaired.samples  # doctest: +SKIP
        64
    """
    check_network(original, "repair(original)")
    if all(getattr(pruned, name, None) is None for name in RECORDS):
        raise InputError(
            "repair(pruned=...)",
            "it has no record of a compression",
            "Give what prune() or quantize() returned",
        )
    if not is_count(samples):
        raise InputError(
            f"repair(samples={samples!r})",
            "it is the number of examples to use, at least 1",
            "Use a few hundred",
        )
    if rounding not in ROUNDINGS:
        raise InputError(
            f"repair(rounding={rounding!r})",
            "unknown rounding",
            f"Use {' or '.join(map(repr, ROUNDINGS))}",
        )
    if not isinstance(python(seed), int):
        raise InputError(
            f"repair(seed={seed!r})", "it is no whole number", "Leave it out, or give 0, 1, ..."
        )
    for network in (original, pruned):
        check_finite(network)
    original, pruned = ordinary(original), ordinary(pruned)
    joined, single = collect(data, samples)
    failure = Exception()
    with evaluating(original, pruned):
        for inputs, shown in ((joined, take(joined, 2)), (single, single)):
            try:  # a network of one batch size takes a batch as it comes, if anything
                with seeded(seed):
                    return _healed(original, pruned, inputs, shown, rounding)
            except (DataError, StrangersError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - forward may raise anything
                failure = error
    with evaluating(original), answering("repair(data)"):
        call(original, map_tensors(torch.clone, single))
    if isinstance(failure, InputError):
        raise failure
    same = copied(pruned)
    reason = f"the networks do not run side by side on the data: {first_line(failure)}"
    warn(f"repair: nothing was solved, {reason}")
    same.repaired = Repaired({}, {"": reason}, 0)  # type: ignore[assignment]
    return same


def _healed(
    original: nn.Module, pruned: nn.Module, inputs: Inputs, shown: Inputs, rounding: str
) -> nn.Module:
    """A repaired copy of the compressed network, if that is nearer to the original on the inputs.

    Args:
        original: the network before.
        pruned: the network after it.
        inputs: what to solve on.
        shown: those of them that the networks are captured with, fewer where any number will do.
        rounding: how solved weights of a quantized network are rounded.
    """
    healed = copied(pruned)
    first = plain_graph(original, shown)
    plain, second = _graphs(pruned, healed, shown)
    if plain.is_quantized:
        first = fold_constants(first)  # as quantization did
    both = first.graph.tensor_paths & second.graph.tensor_paths
    first, second = (model.with_graph(gathered(model.graph, both)) for model in (first, second))
    divided = [inputs]
    if shown is not inputs:
        layers = {node.name for node in first.graph.calls if _is_stop(first, node.inputs)}
        inputs = take(inputs, affordable(first, batch_size(inputs), layers))
        divided = parts(first, inputs)
    size = batch_size(inputs)
    sparse = getattr(getattr(pruned, "sparsified", None), "zeros", {})
    known = getattr(getattr(original, "sparsified", None), "zeros", {}) if grids(pruned) else {}
    own = dict(healed.named_parameters(remove_duplicate=False))
    walk = Walk(
        first,
        second,
        _kept(original, pruned),
        {id(own[path]) for path in _sparse(original, own, sparse) - known.keys()},
        {id(tensor) for tensor in (*own.values(), *healed.buffers())},
        {id(own[path]): grid for path, grid in grids(healed).items() if path in own},
        rounding,
        getattr(pruned, "rescaled", {}),
    )
    held_out = torch.split(_held_out(size), [batch_size(part) for part in divided])
    runs = [(one, two) for one, two, _ in walk.run(divided, held_out)]
    tokens = [one.origins.tokens for one, _ in runs]
    errors, skipped = walk.errors, walk.skipped
    expected = [one.rest({}, {}) for one, _ in runs]
    after = distance([two.rest({}, {}) for _, two in runs], expected, tokens)
    for run in (run for pair in runs for run in pair):
        run.values.clear()
    before = distance([_outputs(plain, part) for part in divided], expected, tokens)
    if not after <= before:
        changes = Changes(second, plain, [entries for _, entries in walk.changed])

        def holds(count: int) -> bool:
            changes.keep(count)
            found = [_outputs(second, part) for part in divided]
            return distance(found, expected, tokens) <= before

        kept = first_that_hold(len(walk.changed), holds)
        changes.keep(kept)
        for layer, _ in walk.changed[kept:]:
            if layer in errors:
                errors[layer] = (errors[layer][0], errors[layer][0])
            skipped[layer] = "with it, the outputs are farther from the original's"
    healed.repaired = Repaired(errors, skipped, size)  # type: ignore[assignment]
    return healed


def _sparse(
    original: nn.Module, own: Mapping[str, Tensor], zeros: Mapping[str, object]
) -> set[str]:
    """Paths of weights whose zeros stay: sparse ones, and what was made of parts of them.

    Args:
        original: the network before.
        own: parameters of the compressed one.
        zeros: paths of those that were made sparse; empty for no sparse network.
    """
    known = dict(original.named_parameters(remove_duplicate=False)).keys()
    parts = {path for path in own.keys() - known if own[path].ndim > 1} if zeros else set()
    return (own.keys() & zeros.keys()) | parts


def _kept(original: nn.Module, pruned: nn.Module) -> Mapping[tuple[str, int], NDArray[np.int64]]:
    """What remains of the original's units, where the compressed network has fewer.

    A pruned network whose weights were rounded still tells of its pruning, though the original of
    the rounding has as many units.

    Raises:
        StrangersError: the compressed network was made of another one.
    """
    record = getattr(pruned, "pruned", None)
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (original, pruned)]
    if record is None or shapes[0] == shapes[1]:
        return {}
    kept: Mapping[tuple[str, int], NDArray[np.int64]] | None = record.kept_of(original)
    if kept is None:
        raise StrangersError(
            "repair(original)",
            "its layers are not as wide as those of the network that was pruned",
            "Give the network that was pruned, or one before it",
        )
    return kept


def _is_stop(model: GraphModel, inputs: tuple[str, ...]) -> bool:
    """Whether a call reads a tensor of the network, so that the walk stops there."""
    return any(model.graph.by_name[name].op == "tensor" for name in inputs)


def _graphs(pruned: nn.Module, healed: nn.Module, shown: Inputs) -> tuple[GraphModel, GraphModel]:
    """One graph with the tensors of the compressed network, and with those of its copy."""
    if isinstance(pruned, GraphModel) and isinstance(healed, GraphModel):
        return pruned, healed
    captured = capture(pruned, shown)
    graph = without_zeros(captured.graph, stubs(pruned))
    captured = Capture(graph, captured.constants)
    return graph_model(pruned, captured), graph_model(healed, captured)


def _outputs(model: GraphModel, part: Inputs) -> Sequence[Tensor]:
    """What a network gives on some of the examples."""
    return Run(model, part).rest({}, {})


def _held_out(examples: int) -> Tensor:
    """For each example, whether it is kept from all solves: a fifth, at least one."""
    chosen = torch.zeros(examples, dtype=torch.bool)
    chosen[torch.randperm(examples)[: max(1, examples // 5)]] = True
    return chosen
