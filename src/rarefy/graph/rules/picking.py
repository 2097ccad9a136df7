"""Entries picked from one dimension by positions that are known at capture.

With a stride, a roll or a permutation in a buffer, labels are picked like the entries, and the
smaller network picks the survivors. Where the positions are not known, the dimension is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rarefy.graph.declarations import resolve
from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, rows, zero_as_first
from rarefy.graph.labels import Atoms, Labels
from rarefy.graph.program import Node, Ref, Spec, substitute

LOOKED_UP = "is looked up by index"

LARGEST = 1 << 20
"""Positions that are computed at capture, at most."""


def known(flow: Flow, arg: Any) -> Any:
    """The value of an argument that follows from constants and buffers alone, else None."""
    if not isinstance(arg, Ref):
        return arg
    if arg.name not in flow.constant:
        return None
    if arg.name not in flow.known:
        found = _computed(flow, flow.graph.by_name[arg.name])
        without_values = isinstance(found, Tensor) and found.is_meta
        flow.known[arg.name] = None if without_values else found
    return flow.known[arg.name]


def _computed(flow: Flow, node: Node) -> Any:
    if isinstance(node.value, Spec) and np.prod(node.value.shape, dtype=float) > LARGEST:
        return None
    if node.name in flow.memory.written:
        return None
    if node.op == "tensor":
        return flow.values[node.path]
    values = {name: known(flow, Ref(name)) for name in node.inputs}
    if any(value is None for value in values.values()):
        return None
    args, options = substitute((node.args, node.options), lambda ref: values[ref.name])
    try:
        with torch.no_grad():
            return resolve(node.op)(*args, **{**options, **_on_cpu(options)})
    except Exception:  # noqa: BLE001 - whatever cannot be computed here is not known
        return None


def _on_cpu(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if options.get("device") is not None else {}


def positions(flow: Flow, arg: Any, size: int) -> Atoms | None:
    """Known positions along a dimension of this size, counted from its start, else None."""
    value = known(flow, arg)
    if not isinstance(value, Tensor) or value.ndim != 1 or value.dtype is torch.bool:
        return None
    if value.is_floating_point() or value.is_complex():
        return None
    found: Atoms = value.cpu().numpy().astype(np.int64)
    found = np.where(found < 0, found + size, found)
    return found if bool(((found >= 0) & (found < size)).all()) else None


Picks: TypeAlias = "Callable[[Flow, Node], tuple[int, Atoms | None]]"
"""Which dimension of its first argument an operator picks from, and the positions, if known."""


def _range(flow: Flow, node: Node) -> tuple[int, Atoms | None]:
    """A slice with a stride."""
    dim = node.argument("dim") % len(node.shape)
    size = flow.shape(node.args[0])[dim]
    bounds = [node.argument(name) for name in ("start", "end", "step")]
    numbers = slice(*(None if b is None else flow.number(b) for b in bounds))
    if node.name in flow.memory.written:
        return dim, None
    return dim, np.arange(*numbers.indices(size))


def _shuffled(flow: Flow, node: Node) -> tuple[int, Atoms | None]:
    """(groups, channels of each) -> (channels of each, groups)."""
    size, groups = node.shape[1], flow.number(node.args[1])
    return 1, np.arange(size).reshape(groups, -1).T.ravel()


def _chosen(flow: Flow, node: Node) -> tuple[int, Atoms | None]:
    shape = flow.shape(node.args[0])
    dim = node.args[1] % max(len(shape), 1)
    return dim, positions(flow, node.args[2], shape[dim])


def pick(flow: Flow, node: Node, dim: int, entries: Atoms | None) -> Labels:
    """Labels with those of one dimension picked, or frozen where the positions are not known."""
    labels = flow.of(node.args[0])
    if entries is None or labels[dim] is None or not len(entries):
        return flow.freeze_dims(node, labels, [dim], LOOKED_UP)
    atoms = labels[dim]
    assert atoms is not None
    if flow.graph.by_name[node.args[0].name].op == "tensor":  # rows of a table that nobody reads
        unread = np.setdiff1d(np.arange(len(atoms)), entries)
        flow.freeze(node, atoms[unread] if len(unread) else None, LOOKED_UP)
    return (*labels[:dim], atoms[entries], *labels[dim + 1 :])


def cut(labels: Labels, dim: int, part: slice) -> Labels:
    """Labels with a part of those of one dimension."""
    atoms = labels[dim]
    return (*labels[:dim], None if atoms is None else atoms[part], *labels[dim + 1 :])


def picked(choose: Picks) -> Rule:
    """The rule of an operator that picks entries along one dimension."""

    def rule(flow: Flow, node: Node) -> Carried:
        for name in node.inputs[1:]:
            for atoms in flow.of(Ref(name)):
                flow.freeze(node, atoms, "is used as positions")
        return pick(flow, node, *choose(flow, node))

    return rule


def edit_picked(choose: Picks) -> Edit:
    """Pick the survivors, at their places among the survivors of the whole dimension."""

    def edit(editor: Editor, node: Node) -> Node | tuple[Node, ...]:
        dim, entries = choose(editor.flow, editor.flow.graph.by_name[node.name])
        gone = editor.gone(node, 0, dim)
        if gone is None or entries is None:
            return node
        place = np.cumsum(~gone) - 1
        stay = place[entries[~gone[entries]]]
        source = editor.shrunk(editor.flow.graph.by_name[node.args[0].name])
        return tuple(editor.picked(node, source, [(dim, stay)]))

    return edit


def _roll(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dims = node.argument("dims")
    if not dims and len(labels) > 1:
        return flow.freeze_dims(node, labels, range(len(labels)), "is rolled over as one")
    found = list(labels)
    for number, (dim, _, shift) in enumerate(_rolled(flow, node)):
        atoms = found[dim]
        if isinstance(node.args[1][number], Ref):
            flow.freeze(node, atoms, "is rolled by a number that follows the batch")
            found[dim] = None
        elif atoms is not None:
            found[dim] = np.roll(atoms, shift)
    return tuple(found)


def _rolled(flow: Flow, node: Node) -> list[tuple[int, Atoms | None, int]]:
    """Dimension, labels and shift of every dimension that is rolled."""
    labels = flow.of(node.args[0])
    dims = [d % len(labels) for d in node.argument("dims") or ([0] if labels else [])]
    shifts = [flow.number(s) for s in node.args[1]]
    return [(d, labels[d], s) for d, s in zip(dims, shifts, strict=True)]


def _edit_roll(editor: Editor, node: Node) -> Node | tuple[Node, ...]:
    """A roll of the survivors is none of all: they are selected in their new order."""
    picks: dict[int, Atoms] = {}
    rest: list[tuple[int, Any]] = []
    rolled = _rolled(editor.flow, node)
    for number, (dim, atoms, shift) in enumerate(rolled):
        gone = editor.hit(atoms)
        if gone is None:
            rest.append((dim, node.args[1][number]))
            continue
        order = np.roll(picks.get(dim, np.arange(len(gone))), shift)
        picks[dim] = order
    if not picks:
        return node
    found: list[tuple[int, Atoms]] = []
    for dim, order in picks.items():
        gone = editor.gone(node, 0, dim)
        assert gone is not None
        found.append((dim, (np.cumsum(~gone) - 1)[order[~gone[order]]]))
    source = editor.shrunk(editor.flow.graph.by_name[node.args[0].name])
    if not rest:
        return tuple(editor.picked(node, source, found))
    shifts, dims = [s for _, s in rest], [d for d, _ in rest]
    name = editor.unused(f"{node.name}_rolled")
    first = replace(
        node, name=name, args=(node.args[0], shifts, dims), kwargs={}, value=source.value
    )
    return (first, *editor.picked(node, first, found))


def _flip(flow: Flow, node: Node) -> Carried:
    labels = list(flow.of(node.args[0]))
    for dim in node.args[1] if len(node.args) > 1 else _flipped(node):
        atoms = labels[dim]
        labels[dim] = None if atoms is None else atoms[::-1]
    return tuple(labels)


def _quarter_turns(flow: Flow, node: Node) -> Carried:
    """Turned in a plane: both of its dimensions are flipped, or they trade places, one flipped."""
    labels = list(flow.of(node.args[0]))
    first, second = (d % len(labels) for d in node.argument("dims"))
    a, b = labels[first], labels[second]
    reversed_a, reversed_b = (None if side is None else side[::-1] for side in (a, b))
    turned = ((a, b), (reversed_b, a), (reversed_a, reversed_b), (b, reversed_a))
    labels[first], labels[second] = turned[node.argument("k") % 4]
    return tuple(labels)


def _flipped(node: Node) -> list[int]:
    return node.options.get("dims") or [1 if node.kind == "fliplr" else 0]


strided: Rule = picked(_range)
"""The rule of a slice whose step is not 1."""

edit_strided: Edit = edit_picked(_range)
"""Its edit."""


ROWS: Mapping[str, Rule] = {
    **rows(picked(_chosen), "index_select"),
    **rows(picked(_shuffled), "channel_shuffle native_channel_shuffle"),
    **rows(_roll, "roll"),
    **rows(_flip, "flip fliplr flipud"),
    **rows(_quarter_turns, "rot90"),
}
"""Operator -> rule."""

EDITS: Mapping[str, Edit] = {
    "index_select": edit_picked(_chosen),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), edit_picked(_shuffled)),
    "roll": _edit_roll,
}
"""Operator -> how the positions in its arguments follow the labels."""

ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(
        "index_select channel_shuffle native_channel_shuffle roll flip fliplr flipud rot90".split(),
        zero_as_first,
    ),
}
"""Operator, in place or not -> whether its value is zero at masked units."""
