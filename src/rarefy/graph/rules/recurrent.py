"""LSTM, GRU and plain recurrent layers: fused over layers and directions, or one cell a call.

The fused operators have one hidden size for all their layers and directions, so a unit is a
position in all of them: its row in every gate (four, three or one of ``hidden`` rows each), its
column in every recurrent weight, and where a projection maps the states, its column there; the
positions of the projection are units of their own.

A masked unit's gates are those of zero. Its cell state then stays zero if it was zero at first,
``tanh(0) = 0``: so does its output. In a GRU the output itself is what is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rarefy.graph.flow import Carried, Flow, Rule, Zero
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Node, Ref


@dataclass(frozen=True)
class _Call:
    """What a recurrent operator is given, of whatever kind it is.

    Attributes:
        x: the input, features last.
        states: initial states; of an LSTM that of the output, then that of the cell.
        directions: for each layer and direction in order, its weights: input, recurrent, biases,
            projection.
        width: how many directions a layer has.
        projected: whether the last of the weights is a projection.
    """

    x: Any
    states: tuple[Any, ...]
    directions: tuple[tuple[Any, ...], ...]
    width: int = 1
    projected: bool = False

    @property
    def params(self) -> tuple[Any, ...]:
        """All weights."""
        return tuple(p for weights in self.directions for p in weights)


def _states(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _fused(node: Node) -> _Call:
    params = list(node.argument("params"))
    width = 2 if node.argument("bidirectional") else 1
    count = width * int(node.argument("num_layers"))
    each = len(params) // count
    directions = tuple(tuple(params[each * i : each * (i + 1)]) for i in range(count))
    return _Call(
        node.args[0],
        _states(node.argument("hx")),
        directions,
        width,
        projected=each > (4 if node.argument("has_biases") else 2),
    )


def _cell(node: Node) -> _Call:
    weights = [node.argument(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    present = tuple(w for w in weights if isinstance(w, Ref))
    return _Call(node.args[0], _states(node.argument("hx")), (present,))


def _layers(flow: Flow, node: Node, call: _Call) -> tuple[Atoms | None, Atoms | None]:
    """Labels of the outputs of one direction and of the states behind a projection."""
    recurrent = call.directions[0][1]
    outputs = flow.shape(recurrent)[1]
    hidden = flow.shape(call.directions[0][-1])[1] if call.projected else outputs
    units = _fresh(flow, hidden)
    out = _fresh(flow, outputs) if call.projected else units
    source = flow.of(call.x)[-1]
    for number, weights in enumerate(call.directions):
        if number == call.width:
            source = _tiled(out, call.width)
        _direction(flow, node, call, weights, (source, units, out))
    return out, units


def _direction(
    flow: Flow,
    node: Node,
    call: _Call,
    weights: Sequence[Any],
    labels: tuple[Atoms | None, Atoms | None, Atoms | None],
) -> None:
    """Tie the weights of one direction of one layer with its input, units and outputs."""
    source, units, out = labels
    rows = weights[:-1] if call.projected else weights
    gates = GATES[node.kind.removesuffix("_cell")]
    for weight in rows:
        _tie(flow, node, _tiled(units, gates), weight, 0)
    _tie(flow, node, source, weights[0], 1)
    _tie(flow, node, out, weights[1], 1)
    if call.projected:
        _tie(flow, node, out, weights[-1], 0)
        _tie(flow, node, units, weights[-1], 1)


def _fresh(flow: Flow, size: int) -> Atoms | None:
    return flow.ledger.fresh(size) if size > 1 else None


def _tiled(atoms: Atoms | None, times: int) -> Atoms | None:
    return None if atoms is None else np.tile(atoms, times)


def _tie(flow: Flow, node: Node, atoms: Atoms | None, arg: Any, dim: int) -> None:
    if flow.shape(arg)[dim] > 1:
        flow.tie(node, atoms, flow.of(arg)[dim])


def _begin(flow: Flow, node: Node, call: _Call, out: Atoms | None, units: Atoms | None) -> None:
    """Initial states: of equal size, and nothing but the units may shrink."""
    for state, atoms in zip(call.states, (out, units), strict=False):
        labels = flow.of(state)
        flow.freeze_dims(node, labels, range(len(labels) - 1), "is a batch or layer of states")
        if atoms is not None and (not labels or labels[-1] is None):
            flow.freeze(node, atoms, "its initial state is given and cannot change")
        else:
            _tie(flow, node, atoms, state, -1)


def _carry(flow: Flow, node: Node, call: _Call) -> tuple[Atoms | None, Atoms | None]:
    """Tie everything and return the labels of outputs and states of one direction."""
    out, units = _layers(flow, node, call)
    _begin(flow, node, call, out, units)
    labels = flow.of(call.x)
    flow.freeze_dims(node, labels, range(len(labels) - 1), "the recurrence runs along it")
    if not all(flow.zero(p) for p in call.params):
        for atoms in (out, units, labels[-1]):
            flow.freeze(node, atoms, "meets computed weights that masked units leave")
    return out, units


def _sequence(flow: Flow, node: Node) -> Carried:
    call = _fused(node)
    out, units = _carry(flow, node, call)
    results = (None, None, _tiled(out, call.width)), (None, None, out), (None, None, units)
    return results[: 1 + len(call.states)]


def _step(flow: Flow, node: Node) -> Carried:
    out, units = _carry(flow, node, _cell(node))
    lead = (None,) * (len(flow.of(node.args[0])) - 1)
    return ((*lead, out), (*lead, units)) if node.kind == "lstm_cell" else (*lead, out)


GATES: Mapping[str, int] = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Operator -> how many gates a unit has: rows of each weight."""

_CALLS: Mapping[str, Callable[[Node], _Call]] = {
    **{f"aten.{name}.input": _fused for name in GATES},
    **{f"aten.{name}_cell.default": _cell for name in GATES},
}

ROWS: Mapping[str, Rule] = {
    op: _sequence if call is _fused else _step for op, call in _CALLS.items()
}
"""Operator -> rule. Packed sequences (the overload ``data``) have none."""


def _gives_zero(flow: Flow, node: Node) -> bool:
    """Whether masked units give zero: what is remembered of them from before must be zero."""
    if node.op not in _CALLS:
        return False
    call = _CALLS[node.op](node)
    remembers = not node.kind.startswith("rnn")
    return all(flow.zero(p) for p in call.params) and (not remembers or flow.zero(call.states[-1]))


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(GATES, _gives_zero),
    **dict.fromkeys((f"{kind}_cell" for kind in GATES), _gives_zero),
}
"""Operator -> whether its value is zero at masked units."""
