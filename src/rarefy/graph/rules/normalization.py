"""Operators that normalize: per channel, over groups of channels or over whole dimensions.

Per channel, a masked channel is as good as gone. Where the statistics are taken over entries some
of which go, they are by convention those of the entries that remain (``Flow.over_survivors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rarefy.graph.editor import Edit, Editor
from rarefy.graph.flow import Carried, Flow, Rule, Zero, rows, zero_as_first
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Node, Ref

STATISTICS = ("weight", "bias", "running_mean", "running_var")
"""Arguments of a batch or instance norm with one entry per channel."""


def _per_channel(flow: Flow, node: Node) -> Carried:
    """Batch and instance norm: each channel by itself, with its own weights and statistics."""
    labels = flow.of(node.args[0])
    labels = (labels[0], _with_parameters(flow, node, labels[1], STATISTICS), *labels[2:])
    if _measures(node):
        _mix(flow, node, [label for d, label in enumerate(labels) if d != 1])
    if labels[1] is not None:
        flow.counts[node.name, "num_features"] = labels[1]
    return labels


def _measures(node: Node) -> bool:
    """Whether the statistics are those of the input itself, not stored ones."""
    flag = "use_input_stats" if node.kind == "instance_norm" else "training"
    return bool(node.argument(flag)) or node.argument("running_mean") is None


def _with_parameters(
    flow: Flow, node: Node, atoms: Atoms | None, names: tuple[str, ...]
) -> Atoms | None:
    """Channels go together with the entries of all parameters that have one entry for each."""
    given = [arg for arg in map(node.argument, names) if isinstance(arg, Ref)]
    if not given or flow.shape(given[0])[0] == 1:
        return atoms
    return flow.tie(node, atoms, *(flow.of(arg)[0] for arg in given))


def _mix(flow: Flow, node: Node, sides: list[Atoms | None]) -> None:
    """Entries along these dimensions meet in the statistics."""
    if any(side is not None for side in sides):
        flow.over_survivors.add(node.name)


def _normalize_last(flow: Flow, node: Node) -> Carried:
    """Layer and RMS norm: normalized over the last dimensions."""
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    count = len(node.args[1])
    weights = [a for a in map(node.argument, ("weight", "bias")) if isinstance(a, Ref)]
    found: list[Atoms | None] = []
    for d in range(-count, 0):
        sides = [labels[d], *(flow.of(a)[d] for a in weights)]
        found.append(flow.tie(node, *sides) if shape[d] > 1 else None)
    _mix(flow, node, found)
    sizes = zip(shape[-count:], found, strict=True)
    flow.shapes[node.name, "normalized_shape"] = tuple(n if a is None else a for n, a in sizes)
    return (*labels[:-count], *found)


def _group_norm(flow: Flow, node: Node) -> Carried:
    """Whole groups of channels go, or the same positions in every group."""
    labels, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    groups = flow.number(node.argument("num_groups"))
    channels = _with_parameters(flow, node, labels[1], ("weight", "bias"))
    if channels is not None:
        flow.counts[node.name, "num_channels"] = channels
    if groups == shape[1]:
        group, position = channels, None
    elif groups == 1:
        group, position = None, channels
    else:
        group, position = flow.ledger.split(channels, (groups, shape[1] // groups))
    if group is not None:
        flow.counts[node.name, "num_groups"] = group
    _mix(flow, node, [position, *labels[2:]])
    return (labels[0], channels, *labels[2:])


def _weight_norm(flow: Flow, node: Node) -> Carried:
    """``g v / |v|``, the norm taken over all dimensions but one (or over all, for -1).

    A masked row would be 0 / 0: it is left out, like an entry of other normalizations. The norm
    itself does not see masked entries of a row.
    """
    v, g = node.args[:2]
    labels, scale, dim = list(flow.of(v)), flow.of(g), node.argument("dim")
    for d, size in enumerate(flow.shape(g)):
        if size > 1 and dim == d:
            labels[d] = flow.tie(node, labels[d], scale[d])
            _mix(flow, node, [labels[d]])
        elif size > 1:
            flow.freeze(node, scale[d], "scales other dimensions than it is normalized over")
    return tuple(labels)


ROWS: Mapping[str, Rule] = {
    **rows(_per_channel, "batch_norm instance_norm"),
    **rows(_normalize_last, "layer_norm rms_norm"),
    **rows(_group_norm, "group_norm"),
    **rows(_weight_norm, "_weight_norm"),
}
"""Operator -> rule."""


def _with_argument(node: Node, position: int, value: Any) -> Node:
    return replace(node, args=(*node.args[:position], value, *node.args[position + 1 :]))


def _edit_shape(editor: Editor, node: Node) -> Node:
    return _with_argument(node, 1, list(node.shape[-len(node.args[1]) :]))


def _edit_group_norm(editor: Editor, node: Node) -> Node:
    group = editor.flow.counts.get((node.name, "num_groups"))
    return node if group is None else _with_argument(node, 1, editor.left(0, group))


EDITS: Mapping[str, Edit] = {
    **dict.fromkeys(("layer_norm", "rms_norm"), _edit_shape),
    "group_norm": _edit_group_norm,
}
"""Operator -> how the sizes in its arguments follow the labels."""


def _channels_are_zero(flow: Flow, node: Node) -> bool:
    """Batch, instance and group norm: of channels that are zero, or scaled and shifted to zero."""
    x, mean = node.args[0], node.argument("running_mean")
    weight, bias = node.argument("weight"), node.argument("bias")
    if any(label is not None for d, label in enumerate(flow.of(x)) if d != 1):
        return bias is None and mean is None and flow.zero(x)
    centered = flow.zero(x) and (mean is None or flow.zero(mean))
    scaled = isinstance(weight, Ref) and flow.zero(weight)
    return (bias is None or flow.zero(bias)) and (scaled or centered)


def _rows_are_zero(flow: Flow, node: Node) -> bool:
    """Layer and RMS norm of rows of which some are masked as a whole."""
    return flow.zero(node.args[0]) and node.argument("bias") is None


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(("batch_norm", "instance_norm", "group_norm"), _channels_are_zero),
    **dict.fromkeys(("layer_norm", "rms_norm"), _rows_are_zero),
    "_weight_norm": zero_as_first,
}
"""Operator -> whether its value is zero at masked units, where it is not taken over them."""
