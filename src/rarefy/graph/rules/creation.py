"""Operators that make a tensor from nothing but sizes: its entries are as many as are asked for.

A dimension whose size is written as a plain number gets labels of its own, so that a tensor made
in ``forward`` shrinks with whatever it meets. A size that follows the batch stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rarefy.graph.declarations import schema
from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, freeze_all, rows, unlabeled
from rarefy.graph.program import Node, Ref

SIZE = {
    **dict.fromkeys("zeros ones full empty".split(), 0),
    **dict.fromkeys("new_zeros new_ones new_full new_empty".split(), 1),
}
"""Operator that fills a tensor with one number -> the argument that states its sizes."""


TABLES = (
    "arange eye linspace logspace hann_window hamming_window blackman_window bartlett_window "
    "kaiser_window fft_fftfreq fft_rfftfreq"
).split()
"""Operators that make a tensor of entries that differ."""


def _filled(flow: Flow, node: Node) -> Carried:
    asked = node.args[SIZE[node.kind]]
    return tuple(
        flow.ledger.fresh(n) if n > 1 and not isinstance(size, Ref) else None
        for n, size in zip(node.shape, asked, strict=True)
    )


def _table(flow: Flow, node: Node) -> Carried:
    """Entries that differ: those that stay are selected from the whole table."""
    if node.inputs:
        return unlabeled(node.value)
    return tuple(flow.ledger.fresh(n) if n > 1 else None for n in node.shape)


def _same(flow: Flow, node: Node) -> Carried:
    return flow.of(node.args[0])


def _random(flow: Flow, node: Node) -> Carried:
    freeze_all(flow, node, "is random")
    return unlabeled(node.value)


ROWS: Mapping[str, Rule] = {
    **rows(_filled, " ".join(SIZE)),
    **rows(_table, " ".join(TABLES)),
    **rows(_same, "zeros_like ones_like full_like empty_like"),
    **rows(
        _random,
        "rand randn randint randperm normal multinomial",
    ),
}
"""Operator -> rule."""


EMPTY = {
    "empty": "aten.zeros.default",
    "new_empty": "aten.new_zeros.default",
    "empty_like": "aten.zeros_like.default",
}
"""Operators that leave memory as it is, which no stored graph may show -> what replaces them."""


def _edit_empty(editor: Editor, node: Node) -> Node:
    declared = schema(EMPTY[node.kind])
    names = {a.name for a in declared.arguments} if declared else set()
    options = {name: value for name, value in node.options.items() if name in names}
    return replace(node, op=EMPTY[node.kind], kwargs=options)


def _edit_filled(editor: Editor, node: Node) -> Node:
    position = SIZE[node.kind]
    labels = editor.flow.labels[node.name]
    asked = [
        size if editor.hit(atoms) is None else left
        for size, atoms, left in zip(node.args[position], labels, node.shape, strict=True)
    ]
    node = replace(node, args=(*node.args[:position], asked, *node.args[position + 1 :]))
    return _edit_empty(editor, node) if node.kind in EMPTY else node


def _edit_table(editor: Editor, node: Node) -> tuple[Node, ...]:
    """The whole table under another name, and the entries of it that stay."""
    gone = [editor.hit(atoms) for atoms in editor.flow.labels[node.name]]
    picks = [(d, np.flatnonzero(~out)) for d, out in enumerate(gone) if out is not None]
    if not picks:
        return (node,)
    whole = editor.flow.graph.by_name[node.name]
    table = replace(whole, name=editor.unused(f"{node.name}_whole"))
    return (table, *editor.picked(node, table, picks))


EDITS: Mapping[str, Edit] = {
    **dict.fromkeys(SIZE, _edit_filled),
    "empty_like": _edit_empty,
    **dict.fromkeys(TABLES, _edit_table),
}
"""Operator -> how the sizes in its arguments follow the labels."""


def _always(flow: Flow, node: Node) -> bool:
    return True


def _full_of_nothing(flow: Flow, node: Node) -> bool:
    value = node.argument("fill_value")
    return not isinstance(value, Ref) and value == 0


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _always),
    **dict.fromkeys(("full", "new_full", "full_like"), _full_of_nothing),
}
"""Operator -> whether its value is zero at masked units."""
