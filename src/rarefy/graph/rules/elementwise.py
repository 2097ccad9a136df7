"""Operators that work entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from rarefy.graph.editor import Edit
from rarefy.graph.flow import Carried, Flow, Rule, Zero, freeze_all, rows, unlabeled
from rarefy.graph.labels import Atoms
from rarefy.graph.program import Node, Ref, Spec
from rarefy.graph.rules.along import zero_along
from rarefy.graph.rules.picking import known


def _same(flow: Flow, node: Node) -> Carried:
    return flow.of(node.args[0])


def free(flow: Flow, node: Node) -> Carried:
    """A value that does not depend on the entries of its input (a shape, a new tensor)."""
    return unlabeled(node.value)


def _numel(flow: Flow, node: Node) -> Carried:
    freeze_all(flow, node, "has its entries counted")
    return None


def _divisor(node: Node) -> Any:
    return node.args[1]


def _base(node: Node) -> Any:
    return node.args[0]


def _third(node: Node) -> Any:
    return node.args[2]


def _base_of_root(node: Node) -> Any:
    """The base of a power that is, or may be, negative."""
    exponent = node.args[1]
    return node.args[0] if isinstance(exponent, Ref) or exponent < 0 else None


POLES: Mapping[str, Callable[[Node], Any]] = {
    **dict.fromkeys(
        "div divide true_divide floor_divide remainder fmod xlogy special_xlogy "
        "special_zeta".split(),
        _divisor,
    ),
    **dict.fromkeys(
        "reciprocal rsqrt log log2 log10 logit special_logit digamma special_digamma special_psi "
        "lgamma special_gammaln mvlgamma special_multigammaln acosh arccosh special_ndtri "
        "special_bessel_y0 special_bessel_y1 special_modified_bessel_k0 "
        "special_modified_bessel_k1 special_scaled_modified_bessel_k0 "
        "special_scaled_modified_bessel_k1 igamma igammac special_gammainc "
        "special_gammaincc".split(),
        _base,
    ),
    **dict.fromkeys(("polygamma", "special_polygamma"), _divisor),
    **dict.fromkeys(("pow", "float_power"), _base_of_root),
    "addcdiv": _third,
}
"""Pointwise operator -> the operand at whose zeros it has no finite value."""


def _refuse_poles(flow: Flow, node: Node) -> None:
    """Masked units must not become infinite: ``inf * 0`` is not 0."""
    pole = POLES.get(node.kind.removesuffix("_"))
    operand = pole(node) if pole else None
    for d, atoms in enumerate(flow.of(operand)):
        if zero_along(flow, operand, d):
            flow.freeze(node, atoms, "is infinite where masked units give zero")


def pointwise(flow: Flow, node: Node) -> Carried:
    """Operands meet along the dimensions that they share, aligned from the last one."""
    if not isinstance(node.value, Spec):
        freeze_all(flow, node, "has several results")
        return unlabeled(node.value)
    _refuse_poles(flow, node)
    out = node.shape
    operands = [a for a in (*node.args, *node.options.values()) if isinstance(a, Ref)]
    if any(len(flow.shape(operand)) > len(out) for operand in operands):
        freeze_all(flow, node, "is written with more dimensions than there are")
        return unlabeled(node.value)
    found: list[Atoms | None] = []
    for d, size in enumerate(out):
        sides: list[Atoms | None] = []
        for operand in operands:
            shape, labels = flow.shape(operand), flow.of(operand)
            e = d - len(out) + len(shape)
            if e >= 0 and shape[e] == size and size > 1:
                sides.append(labels[e])
        found.append(flow.tie(node, *sides) if sides else None)
    return tuple(found)


def _prelu(flow: Flow, node: Node) -> Carried:
    labels, slope = flow.of(node.args[0]), flow.of(node.args[1])
    if len(labels) < 2 or not slope or slope[0] is None:
        return labels
    return (labels[0], flow.tie(node, labels[1], slope[0]), *labels[2:])


def _fake_quantize(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    axis = node.argument("axis")
    sides = [labels[axis], *(flow.of(a)[0] for a in node.args[1:3])]
    tied = flow.tie(node, *sides) if flow.shape(node.args[0])[axis] > 1 else None
    return (*labels[:axis], tied, *labels[axis + 1 :])


ROWS: Mapping[str, Rule] = {
    **rows(
        pointwise,
        "hardswish hardsigmoid hardtanh log_sigmoid softplus mish relu6 selu celu silu elu rrelu "
        "threshold absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh copysign div "
        "divide fix floor_divide fmod greater greater_equal isclose isreal less less_equal "
        "masked_fill multiply negative not_equal polar complex real imag rsub special_erf "
        "special_erfc special_erfinv special_exp2 special_expit special_expm1 special_gammaln "
        "special_log1p special_logit special_ndtr special_polygamma special_psi special_round "
        "special_sinc special_xlogy special_digamma special_multigammaln subtract true_divide "
        "where __and__ __or__ __xor__ fake_quantize_per_tensor_affine copy fill zero rand_like "
        "randn_like randint_like bernoulli uniform exponential normal_",
    ),
    **rows(_prelu, "prelu"),
    **rows(_fake_quantize, "fake_quantize_per_channel_affine"),
    **rows(
        _same,
        "dropout alpha_dropout feature_dropout feature_alpha_dropout clone contiguous alias detach "
        "to type_as _to_copy lift_fresh lift_fresh_copy resolve_conj resolve_neg conj "
        "conj_physical positive",
    ),
    **rows(_numel, "sym_numel numel"),
    **rows(free, "sym_size scalar_tensor empty_strided new_empty_strided"),
}
"""Operator -> rule; operators that PyTorch tags as pointwise need no row."""


EDITS: Mapping[str, Edit] = {}
"""Operator -> how the sizes in its arguments follow the labels."""


# --- where masked units give zero --------------------------------------------------------------


def is_nothing(flow: Flow, arg: Any) -> bool:
    """Whether the argument is zero everywhere: a number, or a constant of zeros."""
    value = known(flow, arg)
    return value is not None and not bool(value.any() if isinstance(value, Tensor) else value)


def zero_dims(flow: Flow, node: Node, arg: Any) -> set[int]:
    """Dimensions of the result whose masked entries meet zeros of this operand.

    An operand that is broadcast along a dimension has no entry to be masked there.
    """
    carried = flow.labels[node.name]
    labelled = {d for d, atoms in enumerate(carried) if atoms is not None}
    if is_nothing(flow, arg):
        return labelled
    own = flow.of(arg)
    pad = len(carried) - len(own)
    return {d for d in labelled if d >= pad and zero_along(flow, arg, d - pad)}


def _all_zero(flow: Flow, node: Node, operands: Iterable[Any]) -> bool:
    """A sum: zero where every operand is."""
    labelled = {d for d, atoms in enumerate(flow.labels[node.name]) if atoms is not None}
    return all(zero_dims(flow, node, arg) == labelled for arg in operands)


def _any_zero(flow: Flow, node: Node, operands: Iterable[Any]) -> bool:
    """A product: zero where any operand is."""
    labelled = {d for d, atoms in enumerate(flow.labels[node.name]) if atoms is not None}
    return set().union(*(zero_dims(flow, node, arg) for arg in operands)) == labelled


def _first(flow: Flow, node: Node) -> bool:
    return _all_zero(flow, node, node.args[:1])


def _second(flow: Flow, node: Node) -> bool:
    return _all_zero(flow, node, node.args[1:2])


def _sum(flow: Flow, node: Node) -> bool:
    return _all_zero(flow, node, node.args[:2])


def _product(flow: Flow, node: Node) -> bool:
    return _any_zero(flow, node, node.args[:2])


def _branches(flow: Flow, node: Node) -> bool:
    return len(node.args) > 2 and _all_zero(flow, node, node.args[1:3])


def _filled(flow: Flow, node: Node) -> bool:
    return _first(flow, node) and is_nothing(flow, node.args[2])


def _added_product(flow: Flow, node: Node) -> bool:
    return _first(flow, node) and _any_zero(flow, node, node.args[1:3])


def _added_ratio(flow: Flow, node: Node) -> bool:
    return _first(flow, node) and _all_zero(flow, node, node.args[1:2])


def _power(flow: Flow, node: Node) -> bool:
    exponent = node.args[1]
    return not isinstance(exponent, Ref) and exponent > 0 and _first(flow, node)


def _within(flow: Flow, node: Node) -> bool:
    """Bounds with 0 between them."""
    low, high = (node.argument(name) for name in BOUNDS[node.kind.removesuffix("_")])
    numbers = not isinstance(low, Ref) and not isinstance(high, Ref)
    inside = numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return inside and _first(flow, node)


BOUNDS = {
    **dict.fromkeys(("clamp", "clip"), ("min", "max")),
    "clamp_min": ("min", "none"),
    "clamp_max": ("none", "max"),
    "hardtanh": ("min_val", "max_val"),
}
"""Operator that limits its input -> names of the limits."""


def _above(flow: Flow, node: Node) -> bool:
    """What is not above the threshold becomes a value."""
    limit, value = node.args[1:3]
    return (limit < 0 or value == 0) and _first(flow, node)


def _nothing(flow: Flow, node: Node) -> bool:
    return True


def _filled_with_nothing(flow: Flow, node: Node) -> bool:
    return is_nothing(flow, node.args[1])


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(
        "relu relu6 gelu silu tanh hardswish leaky_relu elu selu celu mish softshrink hardshrink "
        "rrelu sin asin arcsin tan atan arctan sinh asinh arcsinh atanh arctanh sign sgn neg "
        "negative abs absolute sqrt square expm1 special_expm1 log1p special_log1p erf special_erf "
        "erfinv special_erfinv trunc fix round floor ceil frac deg2rad rad2deg nan_to_num dropout "
        "alpha_dropout feature_dropout feature_alpha_dropout clone contiguous alias detach to "
        "type_as _to_copy lift_fresh lift_fresh_copy resolve_conj resolve_neg conj conj_physical "
        "positive real imag prelu div divide true_divide floor_divide remainder fmod xlogy "
        "special_xlogy copysign polar fake_quantize_per_tensor_affine "
        "fake_quantize_per_channel_affine".split(),
        _first,
    ),
    **dict.fromkeys("mul multiply logical_and bitwise_and __and__".split(), _product),
    **dict.fromkeys(
        "add sub subtract rsub maximum minimum fmax fmin lerp hypot atan2 arctan2 logical_or "
        "logical_xor bitwise_or bitwise_xor __or__ __xor__ gt greater lt less ne not_equal "
        "complex".split(),
        _sum,
    ),
    **dict.fromkeys(BOUNDS, _within),
    **dict.fromkeys(("pow", "float_power"), _power),
    "copy": _second,
    "where": _branches,
    "masked_fill": _filled,
    "addcmul": _added_product,
    "addcdiv": _added_ratio,
    "threshold": _above,
    "zero": _nothing,
    "fill": _filled_with_nothing,
}
"""Operator, in place or not -> whether its value is zero at masked units."""
