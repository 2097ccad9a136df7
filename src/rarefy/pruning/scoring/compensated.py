"""What the outputs lose without a group's units, once the layers that read them are adapted.

Scores of single units compare badly between layers. Here the units of each group are put in the
order in which the optimal brain surgeon removes them: one after the other, the unit whose removal
changes least what the layers that read it give, all their other weights adapted at best (Hassibi
and Stork 1992; Frantar and Alistarh 2022, https://arxiv.org/abs/2208.11580, for blocks of
weights). How many of each group go is then a matter of curves: for several shares, the units are
masked in the captured graph, the weights that read them are replaced by the adapted ones, and the
error of the network's outputs is measured, all other groups whole. No label and no gradient is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy.batches import answering, batch_size, between, seeded
from rarefy.errors import DataError, InputError
from rarefy.graph.count import count
from rarefy.graph.groups import Group, Member
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph
from rarefy.graph.trace import Network
from rarefy.graph.zeros import directions
from rarefy.pruning.lengths import remaining_lengths
from rarefy.pruning.plan import Scores
from rarefy.pruning.running.examples import affordable, collect, distance
from rarefy.pruning.running.lockstep import Run
from rarefy.pruning.running.taps import Runner, Watched
from rarefy.pruning.scoring.criteria import CRITERIA, scored
from rarefy.pruning.scoring.curves import Losses, interpolated
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.scoring.readers import Place, places
from rarefy.pruning.scoring.surgeon import adapted, order
from rarefy.types import Data, Inputs, check_counts

PART = 64
"""Examples that run at once: few enough for what layers hand on to stay in the cache."""

WORK = 10**13
"""Multiply-accumulates of all passes whose outputs are compared, as far as FEWEST allows it."""

FEWEST = 16
"""Examples that are shown where there are as many, however large the network."""

BEYOND = 1.5
"""What the removal of all units costs, relative to the largest share that was measured."""


@dataclass(frozen=True)
class Compensated:
    """A criterion: the order of the optimal brain surgeon, with losses measured at the outputs.

    It takes the place of a criterion in :func:`rarefy.prune`, with ``data``, and costs about
    ``len(ratios) / 2`` forward passes of ``shown`` examples for each group. Of large networks fewer
    examples are shown, such that all passes take at most :data:`WORK` multiply-accumulates.

    Args:
        samples: examples that Gram matrices are summed over.
        shown: examples that the outputs are compared on, the first of these.
        ratios: shares of a group's units without which the outputs are compared, in (0, 1).

    Raises:
        InputError: a value is out of range.

    Example:
        >>> Compensated(samples=1024).shown
        256
    """

    samples: int = 512
    shown: int = 256
    ratios: tuple[float, ...] = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)

    def __post_init__(self) -> None:
        check_counts(self, "samples shown", 256)
        if not self.ratios or not all(0 < r < 1 for r in self.ratios):
            raise InputError(
                f"Compensated(ratios={self.ratios!r})",
                "shares lie between 0 and 1",
                "Write ratios=(0.25, 0.5, 0.75)",
            )


@dataclass(frozen=True)
class Response:
    """How important units are, and how a network responds to their removal.

    Attributes:
        scores: importance of each unit, one array per group; the smallest go first.
        losses: group -> what the removal of a share of its units costs: the squared error of the
            outputs, relative to their squares; None where nothing was measured.
        unmeasured: group -> why it has no losses; it is left whole.
    """

    scores: Scores
    losses: Mapping[int, Losses] | None = None
    unmeasured: Mapping[int, str] = field(default_factory=dict)


def respond(
    model: nn.Module, network: Network, data: Data, how: Compensated | None = None
) -> Response:
    """Measure how the outputs respond to the removal of each group's units.

    Args:
        model: the network, in eval mode.
        network: its trace.
        data: batches, labelled or not.
        how: options.

    Raises:
        DataError: there is no example, or the outputs are not finite.
    """
    how = how or Compensated()
    joined, single = collect(data, how.samples, "prune(data)")
    with torch.no_grad(), seeded(0):
        running, inputs = _running(model, network, joined, single)
        traced = running.network
        found = _by_group(places(traced, running, _parts(running, inputs)))
        orders = [_order(traced, n, found.get(n, ()), running) for n in _numbers(traced)]
        parts = _parts(running, inputs, _shown(running, inputs, how))
        errors = _errors(traced, running, parts, found, orders, how.ratios)
    losses, unmeasured = {}, {}
    for number, points in errors.items():
        if all(map(math.isfinite, points.values())):
            losses[number] = _curve(points, len(network.groups[number]))
        else:
            unmeasured[number] = "the outputs are not finite with some of its units at zero"
    return Response(tuple(map(_ranks, orders)), losses, unmeasured)


def _running(
    model: nn.Module, network: Network, joined: Inputs, single: Inputs
) -> tuple[Watched, Inputs]:
    """The network for these examples, or for the first batch as it comes if it takes no others."""
    runner = Runner(model, network, lambda *_: None)
    try:
        running = runner.of(joined)
        _check(running, _parts(running, joined))
    except DataError:
        running = runner.of(single)
        _check(running, [single])
        return running, single
    return running, joined


def _check(running: GraphModel, parts: Sequence[Inputs]) -> None:
    with answering("prune(data)"):
        Run(running, parts[0]).rest({}, {})


def _parts(running: GraphModel, inputs: Inputs, shown: int | None = None) -> list[Inputs]:
    """The first examples, some at a time; all at once if the network takes no others."""
    size = batch_size(inputs)
    try:
        Run(running, between(inputs, 0, 1, size)).rest({}, {})
    except Exception:  # noqa: BLE001 - a network of one batch size raises anything
        return [inputs]
    step, stop = min(PART, affordable(running, PART)), min(shown or size, size)
    return [between(inputs, i, min(i + step, stop), size) for i in range(0, stop, step)]


def _shown(running: Watched, inputs: Inputs, how: Compensated) -> int:
    """On how many examples the outputs are compared."""
    passes = max(1.0, len(running.network.groups) * len(how.ratios) / 2)
    payable = int(WORK / max(count(running, inputs).macs * passes, 1.0))
    return min(how.shown, batch_size(inputs), max(payable, FEWEST))


def _numbers(network: Network) -> range:
    return range(len(network.groups))


def _by_group(found: Sequence[Place]) -> dict[int, list[Place]]:
    """Number of a group -> layers that read its units."""
    held: dict[int, list[Place]] = {}
    for place in found:
        for number in place.reader.columns:
            held.setdefault(number, []).append(place)
    return held


def _order(
    network: Network, number: int, found: Sequence[Place], running: GraphModel
) -> NDArray[np.int64]:
    """Units of a group in the order in which they go; by magnitude where no layer reads them."""
    group = network.groups[number]
    if found:
        readers = [(place.reader, place.reader.columns[number]) for place in found]
        return order(readers, len(group))
    parameters = dict(running.named_parameters(remove_duplicate=False))
    scores = scored(group, Evidence(parameters), CRITERIA["magnitude"])
    return np.argsort(scores, kind="stable")


def _ranks(order: NDArray[np.int64]) -> NDArray[np.float64]:
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order))
    return ranks


def _errors(
    network: Network,
    running: GraphModel,
    parts: Sequence[Inputs],
    found: Mapping[int, Sequence[Place]],
    orders: Sequence[NDArray[np.int64]],
    ratios: Sequence[float],
) -> dict[int, dict[int, float]]:
    """Group -> number of units without which the network ran -> error of its outputs."""
    graph = running.graph
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    begin = [
        min(
            (position[user.name] for name in _nodes_of(graph, group) for user in graph.users[name]),
            default=position[graph.output.name],
        )
        for group in network.groups
    ]
    runs = [Run(running, part) for part in parts]
    expected = [run.rest({}, {}) for run in runs]
    tokens = [run.origins.tokens for run in runs]
    _check_outputs(expected)
    errors: dict[int, dict[int, float]] = {number: {} for number in _numbers(network)}
    for number in sorted(_numbers(network), key=lambda n: begin[n]):
        for run in runs:
            run.before(graph.nodes[begin[number]])
        for size in _counts(len(network.groups[number]), ratios):
            gone = orders[number][:size]
            changed, shifts = _without(network, running, number, found.get(number, ()), gone)
            given = (run.rest(changed, shifts) for run in runs)
            errors[number][size] = distance(given, expected, tokens)
    return errors


def _check_outputs(expected: Sequence[Sequence[Tensor]]) -> None:
    if not expected[0]:
        raise DataError(
            "prune(data)",
            "the network returns no floating-point tensor to compare",
            "Return scores rather than choices, or take another criterion",
        )
    if not all(bool(torch.isfinite(t).all()) for part in expected for t in part):
        raise DataError("prune(data)", "outputs are NaN or infinite", "Check data and weights")


def _nodes_of(graph: Graph, group: Group) -> list[str]:
    """Parameters and buffers that hold the group's units."""
    paths = {member.path for member in group.members}
    return [n.name for n in graph.nodes if n.op == "tensor" and n.path in paths]


def _counts(units: int, ratios: Sequence[float]) -> list[int]:
    """How many units go at each of the shares: at least one, and never all."""
    return sorted({min(max(round(r * units), 1), units - 1) for r in ratios} - {0})


def _without(
    network: Network,
    running: GraphModel,
    number: int,
    found: Sequence[Place],
    gone: NDArray[np.int64],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors without some units, and shifts of the results of the layers that read them."""
    weights: dict[str, Tensor] = {}
    paths, kept = running.graph.tensor_paths, directions(running.graph)
    for place in found:
        weight = _own(running, weights, place.path)
        own = adapted(place.reader, place.reader.columns[number], gone)
        weight.view(-1)[place.positions] = own.to(weight.dtype).to(weight.device)
    members = network.groups[number].members
    kept_of = {(m.path, m.dim): _rest(running, m, gone) for m in members if m.path in paths}
    for path, length in remaining_lengths(running.graph, running.tensor, kept_of).items():
        _own(running, weights, path).copy_(length)
    for member in members:
        if member.path not in paths or (member.path, member.dim) in kept:
            continue  # another name of a tensor that the graph reads under its first
        held = _own(running, weights, member.path)
        entries = torch.from_numpy(member.indices[gone].ravel()).to(held.device)
        held.index_fill_(member.dim, entries, 0)
    shifts: dict[str, Tensor] = {}
    for place in found:
        if place.mean is not None:
            _shift(running, place, weights[place.path], shifts)
    names = [(n.name, n.path) for n in running.graph.nodes if n.op == "tensor"]
    return {name: weights[path] for name, path in names if path in weights}, shifts


def _rest(running: GraphModel, member: Member, gone: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which entries of a tensor stay along a dimension that holds a group's units."""
    size = running.tensor(member.path).shape[member.dim]
    return np.setdiff1d(np.arange(size), member.indices[gone])


def _own(running: GraphModel, weights: dict[str, Tensor], path: str) -> Tensor:
    """The copy of a tensor that may be changed."""
    if path not in weights:
        held = running.tensor(path).detach()
        weights[path] = held.clone(memory_format=torch.contiguous_format)
    return weights[path]


def _shift(running: GraphModel, place: Place, weight: Tensor, shifts: dict[str, Tensor]) -> None:
    """What keeps the mean of a layer's outputs; nothing where an output itself is gone."""
    node = running.graph.by_name[place.node]
    after = weight.reshape(-1)[place.positions].cpu().double()
    assert place.mean is not None
    shift = (place.reader.weight - after) @ place.mean * after.any(1)
    if node.name not in shifts:
        shape = [1] * len(node.shape)
        shape[place.dim] = node.shape[place.dim]
        shifts[node.name] = weight.new_zeros(shape)
    own = slice(place.first, place.first + len(shift))
    shifts[node.name].view(-1)[own] += shift.to(weight.dtype).to(weight.device)


def _curve(points: Mapping[int, float], units: int) -> Losses:
    """Losses by share of the units that go, not descending."""
    counts = sorted(points)
    shares = np.array([0.0, *(size / units for size in counts), 1.0])
    errors = [0.0, *(points[size] for size in counts)]
    return interpolated(shares, np.maximum.accumulate([*errors, BEYOND * max(errors)]))
