"""Quantizers of an exported program in the form in which ExecuTorch hands them to XNNPACK.

XNNPACK computes in int8 what stands between calls that quantize and dequantize: convolutions and
linear layers with a weight in int8, additions, products, and what only moves values. Each reader
of a rounded tensor has a dequantize call of its own, as ExecuTorch looks for them. Unsigned grids
become signed ones by a shift, which changes no value.

XNNPACK has no kernel for a layer whose input is on a known grid and whose result is not, such as
the last one. Linear layers and 2-d convolutions of that kind round their inputs once more, on the
range of each row or image as it comes, and compute with integers too; others stay in float.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from rarefy.deployment.editing import Editor

_aten: Any = torch.ops.aten

RANGE = (-128, 127, torch.int8)
"""The integers of XNNPACK."""

SMALLEST_STEP = torch.finfo(torch.float32).eps
"""Of a range that is found at each call."""

PER_TENSOR = _aten.fake_quantize_per_tensor_affine.default
EACH_CALL = _aten.fake_quantize_per_tensor_affine.tensor_qparams
PER_CHANNEL = _aten.fake_quantize_per_channel_affine.default

CHECK = _aten._assert_tensor_metadata.default
DROPOUT = _aten.dropout.default

LINEAR = _aten.linear.default
TABLE = _aten.embedding.default
CONVOLUTIONS = tuple(
    getattr(getattr(_aten, f"conv{d}d"), overload)
    for d in (1, 2)
    for overload in ("default", "padding")
)
ONE_DIMENSION = (*CONVOLUTIONS[:2], _aten.conv_transpose1d.default)
FUSED = (_aten.relu.default, _aten.relu_.default, _aten.relu6.default, _aten.hardtanh.default)
"""What XNNPACK computes as a part of the layer before it."""


def integers(program: ExportedProgram) -> None:
    """Turn the fake quantizers of a program into calls that quantize and dequantize, in place.

    The operators ``quantized_decomposed`` must be registered: ``executorch.exir`` does that.
    """
    editor = Editor(program)
    _erase_dropouts(editor)
    calls = [node for node in editor.graph.nodes if node.op == "call_function"]
    layers = [node for node in calls if _is_layer(node)]
    static = {node for node in layers if _is_rounded(node)}
    dynamic = {node for node in layers if node not in static and _can_round_inputs(node)}
    for node in calls:
        if node.target is PER_CHANNEL:
            _round_weight(editor, node, static | dynamic)
    for node in calls:
        if node.target is PER_TENSOR:
            _round_activation(editor, node, static)
        elif node.target is EACH_CALL:
            _pass_on(editor, node)
    for node in dynamic:
        _round_again(editor, node)
    for node in static:
        _own_bias(editor, node)
    editor.finish()


# --- which layers compute with integers ----------------------------------------------------------


def _is_layer(node: Node) -> bool:
    """Whether a call is a layer whose input and weight are rounded."""
    if node.target is not LINEAR and node.target not in CONVOLUTIONS:
        return False
    source, weight = node.all_input_nodes[:2]
    return source.target in (PER_TENSOR, EACH_CALL) and weight.target is PER_CHANNEL


def _is_rounded(node: Node) -> bool:
    """Whether the input of a layer and its result are on grids that are known."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in FUSED:
        readers = list(readers[0].users)
    ends = [node.all_input_nodes[0], *readers]
    return len(ends) == 2 and all(end.target is PER_TENSOR for end in ends)


def _can_round_inputs(node: Node) -> bool:
    """Whether XNNPACK finds the range of a layer's inputs by itself: not of depthwise ones."""
    if node.target is LINEAR:
        return True
    shape = node.all_input_nodes[1].meta["val"].shape
    return len(shape) == 4 and shape[1] > 1


def _erase_dropouts(editor: Editor) -> None:
    """Take out dropouts, which do nothing in eval mode, from between layers and quantizers."""
    for node in list(editor.graph.nodes):
        if node.target is DROPOUT and not node.args[2]:
            node.replace_all_uses_with(node.all_input_nodes[0])
            editor.graph.erase_node(node)


# --- the calls -----------------------------------------------------------------------------------


def _round_weight(editor: Editor, node: Node, layers: set[Node]) -> None:
    """A weight as int8 where all that read it compute with integers or look up rows of it, else as
    rounded floats."""
    weight, scale, zero = (editor.value(source) for source in node.all_input_nodes)
    path = dict(editor.tensors()).get(node.all_input_nodes[0])
    if weight is None or scale is None or zero is None or path is None:
        return
    axis = node.args[3]
    assert isinstance(axis, int)
    first = node.all_input_nodes[0]
    rounded = PER_CHANNEL(weight.detach(), scale, zero, *node.args[3:])
    tables = {u for u in node.users if u.target is TABLE and axis == 0 and not zero.any()}
    if not all(user in layers or user in tables for user in node.users):
        node.replace_all_uses_with(editor.add_input(first, f"{path}_rounded", rounded))
        editor.erase(node)
        return
    along = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
    codes = (rounded / scale.reshape(along)).round() + zero.reshape(along)
    parts = {"codes": codes.to(torch.int8), "step": scale, "zero": zero.long()}
    given = [editor.add_input(first, f"{path}_{name}", tensor) for name, tensor in parts.items()]
    for reader in list(node.users):
        if reader in tables:
            _look_up(editor, reader, *given[:2])
            continue
        with editor.graph.inserting_before(reader):
            op = _operator("dequantize_per_channel.default")
            reader.replace_input_with(node, editor.call(op, *given, axis, *RANGE))
    editor.erase(node)
    for unread in [tensor for tensor in given if not tensor.users]:
        editor.forget(unread)


def _look_up(editor: Editor, node: Node, codes: Node, step: Node) -> None:
    """Rows of a table, looked up as integers."""
    index = node.args[1]
    with editor.graph.inserting_before(node):
        rows = editor.call(_aten.to.dtype, editor.call(TABLE, codes, index), torch.float32)
        steps = editor.call(TABLE, editor.call(_aten.unsqueeze.default, step, 1), index)
        found = editor.call(_aten.mul.Tensor, rows, steps)
    node.replace_all_uses_with(found)
    editor.graph.erase_node(node)


def _round_activation(editor: Editor, node: Node, layers: set[Node]) -> None:
    """A quantize call for a fake quantizer, and a dequantize call for each of its readers.

    ExecuTorch takes 1-d convolutions beside these calls for ones of integers, and fails where they
    are not: a product with 1 keeps them apart.
    """
    source, scale, zero, low, _ = node.args
    assert isinstance(zero, int)
    assert isinstance(low, int)
    grid = (scale, zero if low < 0 else zero + RANGE[0], *RANGE)
    assert isinstance(source, Node)
    with editor.graph.inserting_before(node):
        layer = source.all_input_nodes[0] if source.target in FUSED else source
        if layer.target in ONE_DIMENSION and layer not in layers:
            source = editor.call(_aten.mul.Scalar, source, 1.0)
        codes = editor.call(_operator("quantize_per_tensor.default"), source, *grid)
    for reader in list(node.users):
        with editor.graph.inserting_before(reader):
            value = editor.call(_operator("dequantize_per_tensor.default"), codes, *grid)
            if reader.target in ONE_DIMENSION and reader not in layers:
                value = editor.call(_aten.mul.Scalar, value, 1.0)
        reader.replace_input_with(node, value)
    editor.erase(node)


def _own_bias(editor: Editor, node: Node) -> None:
    """Give a layer a copy of a bias that others read: its integers depend on the input's grid."""
    bias = node.args[2] if len(node.args) > 2 else None
    value = editor.value(bias) if isinstance(bias, Node) and len(bias.users) > 1 else None
    if isinstance(bias, Node) and value is not None:
        copy = editor.add_input(bias, f"{dict(editor.tensors())[bias]}_own", value.detach().clone())
        node.update_arg(2, copy)


def _round_again(editor: Editor, node: Node) -> None:
    """Let a layer round its inputs on the range of each call."""
    source = node.all_input_nodes[0]
    with editor.graph.inserting_before(node):
        chosen = _operator("choose_qparams.tensor")
        pair = editor.call(chosen, source, *RANGE[:2], SMALLEST_STEP, RANGE[2])
        grid = (*(editor.call(operator.getitem, pair, i) for i in (0, 1)), *RANGE)
        codes = editor.call(_operator("quantize_per_tensor.tensor"), source, *grid)
        rounded = editor.call(_operator("dequantize_per_tensor.tensor"), codes, *grid)
    node.replace_input_with(source, rounded)


def _pass_on(editor: Editor, node: Node) -> None:
    """Take out a quantizer that finds its range by itself, with what it does for that: XNNPACK does
    both."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    found = [node]
    while found:
        unread = found.pop()
        sources = unread.all_input_nodes
        for check in [user for user in unread.users if user.target is CHECK]:
            editor.graph.erase_node(check)
        if not unread.users and unread.op == "call_function":
            editor.graph.erase_node(unread)
            found += sources


def _operator(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.quantized_decomposed, packet), overload)
