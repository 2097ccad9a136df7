"""Operators in which entries along a dimension meet: pooling, sums, softmax, resampling.

A sum, or a norm, over units that are zero where masked is exact. All else that is reduced or
normalized over units (a mean, a maximum, a softmax) is by convention computed over the units that
remain (``Flow.over_survivors``). Whatever answers with positions (argmax, sort, top-k) would count
differently over fewer entries: it freezes them.
"""

from __future__ import annotations

from collections.abc import Mapping

from rarefy.graph.editor import Edit
from rarefy.graph.flow import Carried, Flow, Rule, Zero, rows, zero_as_first
from rarefy.graph.labels import Labels
from rarefy.graph.program import Node, Spec
from rarefy.graph.rules.along import zero_along
from rarefy.graph.rules.elementwise import pointwise
from rarefy.graph.rules.windows import window


def _each_result(node: Node, labels: Labels) -> Carried:
    """The same labels for one result, or for each of several."""
    if isinstance(node.value, tuple):
        return tuple(labels for _ in node.value)
    return labels


def _pool(flow: Flow, node: Node) -> Carried:
    """Windows over the last dimensions: units stay apart where each has a window of its own."""
    labels = list(flow.of(node.args[0]))
    spatial = len(node.args[1]) if isinstance(node.args[1], list | tuple) else 1
    first = len(labels) - max(spatial, _rank(node.kind))
    for d in range(first, len(labels)):
        sliding = window(node, d - first) if node.kind in SLIDING else None
        atoms = labels[d]
        if atoms is None:
            continue
        labels[d] = None if sliding is None else sliding.slid_over(atoms)
        if labels[d] is None:
            flow.freeze(node, atoms, "is pooled over")
        elif sliding is not None and sliding.size > 1:
            flow.over_survivors.add(node.name)
    return _each_result(node, tuple(labels))


def _rank(kind: str) -> int:
    """2 for ``max_pool2d``; 1 where the name says nothing."""
    for rank in (1, 2, 3):
        if f"{rank}d" in kind:
            return rank
    return 1


def _dims(node: Node, ndim: int) -> list[int]:
    """The dimensions that are reduced; all where none is named."""
    given = node.argument("dim")
    given = [given] if isinstance(given, int) else given
    return [d % max(ndim, 1) for d in given] if given else list(range(ndim))


def _without(node: Node, labels: Labels, dims: list[int]) -> Carried:
    """Labels of the result, with or without the reduced dimensions."""
    first = node.value[0] if isinstance(node.value, tuple) else node.value
    assert isinstance(first, Spec)
    if len(first.shape) == len(labels):
        left = tuple(None if d in dims else label for d, label in enumerate(labels))
    else:
        left = tuple(label for d, label in enumerate(labels) if d not in dims)
    return _each_result(node, left)


def _statistic(flow: Flow, node: Node) -> Carried:
    """A mean, a variance, a maximum: of the entries that remain."""
    labels = flow.of(node.args[0])
    dims = _dims(node, len(labels))
    if any(labels[d] is not None for d in dims):
        flow.over_survivors.add(node.name)
    return _without(node, labels, dims)


def _sum(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    dims = _dims(node, len(labels))
    if not flow.zero(node.args[0]):
        reason = "is summed over, and masked units do not give zero"
        loud = [d for d in dims if not zero_along(flow, node.args[0], d)]
        labels = flow.freeze_dims(node, labels, loud, reason)
    return _without(node, labels, dims)


def _norm(flow: Flow, node: Node) -> Carried:
    """Zeros add nothing to the norm of a vector, whatever its order from 0 to infinity."""
    order = node.argument("p" if node.kind == "norm" else "ord")
    plain = order is None or order == "fro" or (isinstance(order, int | float) and order >= 0)
    dims = node.argument("dim")
    if node.kind == "linalg_norm" and order is not None and not isinstance(dims, int):
        plain = plain and (order == "fro" or (dims is not None and len(dims) == 1))
    if plain:
        return _sum(flow, node)
    labels = flow.of(node.args[0])
    found = _dims(node, len(labels))
    labels = flow.freeze_dims(node, labels, found, "zeros change a norm of this order")
    return _without(node, labels, found)


def _extreme(flow: Flow, node: Node) -> Carried:
    """Maxima of the entries that remain, where nobody asks for their positions."""
    return _place(flow, node) if _asks_places(flow, node) else _statistic(flow, node)


def _asks_places(flow: Flow, node: Node) -> bool:
    """Whether the second of two results, the positions, is read."""
    users = flow.graph.users[node.name]
    whole = (isinstance(node.value, tuple) and u.op != "operator.getitem" for u in users)
    return any(whole) or any(u.op == "operator.getitem" and u.args[1] == 1 for u in users)


def _place(flow: Flow, node: Node) -> Carried:
    """Positions of, or picked from, the entries along one dimension or all."""
    labels = flow.of(node.args[0])
    dims = _dims(node, len(labels))
    reason = "is searched for positions"
    return _without(node, flow.freeze_dims(node, labels, dims, reason), dims)


def _order(flow: Flow, node: Node) -> Carried:
    """Sorting and picking: entries along one dimension change places."""
    labels = flow.of(node.args[0])
    dim = node.argument("dim")
    dims = [0 if node.kind == "msort" else -1 if dim is None else dim]
    return _each_result(node, flow.freeze_dims(node, labels, dims, "is sorted along"))


def _along_dim(flow: Flow, node: Node) -> Carried:
    """Softmax, cumulative sums: entries along one dimension meet, those that remain."""
    labels = flow.of(node.args[0])
    dim = node.argument("dim")
    if labels and labels[dim] is not None:
        flow.over_survivors.add(node.name)
    return labels


def _upsample(flow: Flow, node: Node) -> Carried:
    labels = flow.of(node.args[0])
    return flow.freeze_dims(node, labels, range(2, len(labels)), "is resampled")


SLIDING = frozenset(f"{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 2, 3))
"""Poolings whose arguments state their windows, and that answer with no positions."""

POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d"
)

UPSAMPLERS = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
    "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d"
)

ROWS: Mapping[str, Rule] = {
    **rows(_pool, POOLS),
    **rows(
        _statistic,
        "mean nanmean var std var_mean std_mean amax amin prod any all logsumexp aminmax",
    ),
    **rows(_extreme, "max min"),
    "aten.max.other": pointwise,
    "aten.min.other": pointwise,
    **rows(_sum, "sum nansum count_nonzero"),
    **rows(_norm, "norm linalg_vector_norm linalg_norm"),
    **rows(_place, "argmax argmin median nanmedian mode kthvalue"),
    **rows(_order, "sort topk argsort msort cummax cummin"),
    **rows(
        _along_dim,
        "softmax log_softmax _softmax _log_softmax special_softmax special_log_softmax cumsum "
        "cumprod logcumsumexp",
    ),
    **rows(_upsample, UPSAMPLERS),
}
"""Operator -> rule."""


EDITS: Mapping[str, Edit] = {}
"""Operator -> how the sizes in its arguments follow the labels."""


def _values_zero(flow: Flow, node: Node) -> bool:
    """Maxima of zeros are zero; their positions are not."""
    if node.op.endswith(".other"):
        return all(flow.zero(a) for a in node.args[:2])
    return flow.zero(node.args[0]) and not _asks_places(flow, node)


ZEROS: Mapping[str, Zero] = {
    **dict.fromkeys(
        f"{POOLS} {UPSAMPLERS} mean nanmean sum nansum count_nonzero amax amin aminmax prod any "
        "var std var_mean std_mean norm linalg_vector_norm linalg_norm cumsum cumprod".split(),
        zero_as_first,
    ),
    **dict.fromkeys(("max", "min"), _values_zero),
}
"""Operator -> whether its value is zero at masked units, where it is not taken over them."""
