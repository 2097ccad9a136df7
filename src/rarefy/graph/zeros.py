"""Where masked units give zero: what may be summed over without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from rarefy.graph.flow import Flow
from rarefy.graph.program import Node, Ref, shares_memory, writes

_Zero: TypeAlias = "Callable[[Flow, Node], bool]"


def note_zeros(flow: Flow, node: Node) -> None:
    """Note whether the node's value vanishes; a write that does not spoils all that share it."""
    if shares_memory(node.op) and node.inputs:
        flow.memory[node.name] = flow.memory.get(node.inputs[0], node.inputs[0])
    if vanishes(flow, node):
        flow.vanishing.add(node.name)
    elif writes(node.op):
        owner = flow.memory[node.name]
        flow.vanishing -= {n for n in flow.vanishing if flow.memory.get(n, n) == owner}


def vanishes(flow: Flow, node: Node) -> bool:
    """Whether the value is zero at masked units, given where its inputs are."""
    rule = ZEROS.get(node.kind.removesuffix("_"))
    return rule is not None and rule(flow, node)


def _always(flow: Flow, node: Node) -> bool:
    return True


def _first(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0])


def _second(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[1])


def _either(flow: Flow, node: Node) -> bool:
    return any(flow.zero(a) for a in node.args[:2])


def _both_zero(flow: Flow, node: Node) -> bool:
    return all(flow.zero(a) for a in node.args[:2])


def _parts_zero(flow: Flow, node: Node) -> bool:
    return all(flow.zero(a) for a in node.args[0])


def _layer_zero(flow: Flow, node: Node) -> bool:
    """Rows of the weight and bias give zero outputs; so do other masked entries without a bias."""
    weight, bias = node.args[1], node.argument("bias")
    rows = flow.zero(weight) and (bias is None or flow.zero(bias))
    others = any(label is not None for label in flow.of(node.args[0])[:-1])
    if node.kind == "linear" and others:
        return rows and bias is None and flow.zero(node.args[0])
    return rows


def _affine_zero(flow: Flow, node: Node) -> bool:
    affine = (node.argument("weight"), node.argument("bias"))
    return all(isinstance(a, Ref) and flow.zero(a) for a in affine)


def _padded_zero(flow: Flow, node: Node) -> bool:
    return flow.zero(node.args[0]) and not node.argument("value")


def _zeros(rule: _Zero, names: str) -> dict[str, _Zero]:
    return dict.fromkeys(names.split(), rule)


ZEROS: Mapping[str, _Zero] = {
    **_zeros(_always, "zeros zeros_like new_zeros zero"),
    **_zeros(
        _first,
        "relu relu6 gelu silu tanh hardswish hardtanh leaky_relu elu selu celu mish softshrink "
        "hardshrink sin asin tan atan sinh sign neg abs sqrt square dropout alpha_dropout "
        "feature_dropout clone contiguous alias detach to type_as _to_copy view reshape flatten "
        "unflatten permute transpose t movedim mT swapaxes unsqueeze squeeze expand expand_as "
        "broadcast_to repeat slice select split split_with_sizes chunk unbind narrow roll flip "
        "prelu getitem max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d mean sum "
        "amax amin prod var std norm linalg_vector_norm pixel_shuffle pixel_unshuffle glu "
        "upsample_nearest1d upsample_nearest2d upsample_bilinear2d trunc round div "
        "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine embedding",
    ),
    **_zeros(_second, "copy"),
    **_zeros(_either, "mul"),
    **_zeros(_both_zero, "add sub maximum minimum matmul mm bmm"),
    **_zeros(_parts_zero, "cat stack"),
    **_zeros(
        _layer_zero,
        "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    **_zeros(_affine_zero, "batch_norm instance_norm"),
    **_zeros(_padded_zero, "pad constant_pad_nd"),
}
"""Operator, of all overloads and in place or not -> whether its value is zero at masked units."""
