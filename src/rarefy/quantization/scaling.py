"""Channels rescaled where they are made and scaled back where they are read.

Between a layer (or a norm's weights) and the layers that read it, with nothing in between but what
commutes with positive factors, channel j may be divided by any s_j > 0 when the weights that read
it are multiplied by s_j: the network computes the same, and its tensors are easier to quantize.
SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438) chooses s to move outliers of
activations into weights; cross-layer equalization (Nagel et al. 2019,
https://arxiv.org/abs/1906.04721, section 4.1) chooses it to give both weights equal ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Ref
from rarefy.quantization.calibration import watch
from rarefy.quantization.fold import named
from rarefy.quantization.placement import CONVOLUTIONS, LAYERS, averages
from rarefy.types import Data

KEY = "rescaled"
"""Attribute of a network: what :func:`rescaled` returns."""

SMALLEST = 1e-5
"""Channels whose largest activation or weight is smaller keep their scale."""

SWEEPS = 30
"""How often all pairs are equalized, at most: each changes its neighbors' ranges."""

SETTLED = 1e-3
"""Largest change of a channel's scale, as a share, at which equalization is done."""

Dims = tuple[int, ...]
"""Dimensions that the channels are divided over, in their order."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads rescaled channels.

    Attributes:
        source: node that it reads.
        dim: dimension of the channels in that node's value.
        weight: path of its weight, input channels second.
        groups: of channels.
    """

    source: str
    dim: int
    weight: str
    groups: int


@dataclass(frozen=True)
class Fold:
    """Channels that can be rescaled.

    Attributes:
        made: paths of what makes them, channels first: weight and bias.
        readers: all that read them.
        maker: operator that makes them: a layer, or a norm's (or another) product with a vector.
    """

    made: tuple[str, ...]
    readers: tuple[Reader, ...]
    maker: str


def folds(graph: Graph) -> tuple[Fold, ...]:
    """All channels that can be rescaled, in the order of the graph.

    Left alone are channels that anything else reads, such as a residual stream, and tensors that
    are used more than once.
    """
    return tuple(_folds(graph))


def _folds(graph: Graph) -> Iterator[Fold]:
    for node in graph.calls:
        source = _MAKERS.get(node.op)
        made = source(graph, node) if source else None
        if made is None:
            continue
        dim = 1 if node.op in CONVOLUTIONS else len(node.shape) - 1
        readers = _readers(graph, node, dim)
        if readers:
            yield Fold(made, readers, node.op)


# --- what makes channels -------------------------------------------------------------------------


def _own(graph: Graph, *arguments: object) -> tuple[str, ...] | None:
    """Paths of tensors that one call alone reads; None where an argument is no such tensor."""
    found = []
    for argument in arguments:
        if argument is None:
            continue
        node = graph.by_name[argument.name] if isinstance(argument, Ref) else None
        if node is None or node.op != "tensor" or len(graph.users[node.name]) > 1:
            return None
        if sum(other.op == "tensor" and other.path == node.path for other in graph.nodes) > 1:
            return None
        found.append(node.path)
    return tuple(found)


def _layer(graph: Graph, node: Node) -> tuple[str, ...] | None:
    if node.op in CONVOLUTIONS and len(node.shape) != len(graph.by_name[node.args[1].name].shape):
        return None
    return _own(graph, node.args[1], node.argument("bias"))


def _norm(graph: Graph, node: Node) -> tuple[str, ...] | None:
    if len(node.argument("normalized_shape")) != 1:
        return None
    return _own(graph, node.argument("weight"), node.argument("bias")) or None


def _product(graph: Graph, node: Node) -> tuple[str, ...] | None:
    """A product with a vector, as norms that are written out end with."""
    refs = [arg for arg in node.args[:2] if isinstance(arg, Ref)]
    vectors = [ref for ref in refs if graph.by_name[ref.name].op == "tensor"]
    if len(refs) != 2 or len(vectors) != 1:
        return None
    shape = graph.by_name[vectors[0].name].shape
    return _own(graph, vectors[0]) if shape == node.shape[-1:] else None


_MAKERS: Mapping[str, Callable[[Graph, Node], tuple[str, ...] | None]] = {
    **dict.fromkeys(LAYERS, _layer),
    "aten.layer_norm.default": _norm,
    "aten.rms_norm.default": _norm,
    "aten.mul.Tensor": _product,
}
"""Operators that make channels -> the tensors that scale them; None where they cannot."""


# --- what reads them -----------------------------------------------------------------------------


def _readers(graph: Graph, node: Node, dim: int) -> tuple[Reader, ...] | None:
    """All layers that read a node's channels; None where anything else does."""
    found: list[Reader] = []
    waiting: list[tuple[Node, Dims]] = [(node, (dim,))]
    while waiting:
        current, dims = waiting.pop()
        for user in graph.users[current.name]:
            reader = _reader(graph, user, current, dims[0]) if len(dims) == 1 else None
            if reader is not None:
                found.append(reader)
                continue
            passes = _PASSES.get(user.kind)
            after = passes(graph, user, current, dims) if passes else None
            if after is None:
                return None
            waiting.append((user, after))
    return tuple(found)


def _reader(graph: Graph, user: Node, source: Node, dim: int) -> Reader | None:
    if user.op not in LAYERS or user.inputs.count(source.name) != 1:
        return None
    own = _own(graph, user.args[1]) if user.args[0] == Ref(source.name) else None
    if not own:
        return None
    rank, own_rank = len(source.shape), len(graph.by_name[user.args[1].name].shape)
    if user.op in CONVOLUTIONS:
        fits, groups = dim == 1 and rank == own_rank, int(user.argument("groups"))
    else:
        fits, groups = dim == rank - 1 and own_rank == 2, 1
    return Reader(source.name, dim, own[0], groups) if fits else None


def _same(graph: Graph, user: Node, source: Node, dims: Dims) -> Dims | None:
    return dims


def _leaky(graph: Graph, user: Node, source: Node, dims: Dims) -> Dims | None:
    return dims if float(user.argument("negative_slope")) >= 0 else None


def _pooled(graph: Graph, user: Node, source: Node, dims: Dims) -> Dims | None:
    rank = len(source.shape)
    window = int(user.kind[-2])
    return dims if dims == (1,) and rank == window + 2 and len(user.shape) == rank else None


def _averaged(graph: Graph, user: Node, source: Node, dims: Dims) -> Dims | None:
    return dims if dims == (1,) and averages(graph, user) else None


def _viewed(graph: Graph, user: Node, source: Node, dims: Dims) -> Dims | None:
    """Positions that are one are dropped, or channels divided into heads, or heads joined."""
    before, after = source.shape, user.shape
    if dims == (1,) and all(size == 1 for size in before[2:]) and after == before[:2]:
        return dims
    first, last = dims[0], dims[-1]
    if after[:first] != before[:first] or last - first != len(dims) - 1:
        return None
    behind = len(before) - last - 1
    made = after[first : len(after) - behind]
    whole = prod(before[first : last + 1]) == prod(made)
    if not whole or after[len(after) - behind :] != before[last + 1 :] or not made:
        return None
    return tuple(range(first, first + len(made)))


def _turned(graph: Graph, user: Node, source: Node, dims: Dims) -> Dims | None:
    """Dimensions that change places."""
    rank = len(source.shape)
    order = list(range(rank))
    if user.kind == "permute":
        order = [d % rank for d in user.argument("dims")]
    else:
        one, two = (user.argument(name) for name in ("dim0", "dim1"))
        if not isinstance(one, int) or not isinstance(two, int):
            return None
        order[one % rank], order[two % rank] = two % rank, one % rank
    return tuple(order.index(d) for d in dims)


def _weighed(graph: Graph, user: Node, source: Node, dims: Dims) -> Dims | None:
    """Values of attention: sums over their tokens, weighed by what does not depend on them.

    Not where several heads of the queries share one of the values.
    """
    place = {"matmul": 1, "scaled_dot_product_attention": 2}[user.kind]
    rank = len(source.shape)
    if user.args[place] != Ref(source.name) or user.inputs.count(source.name) != 1:
        return None
    kept = all(user.shape[d] == source.shape[d] for d in dims) and len(user.shape) == rank
    return dims if kept and rank - 2 not in dims and rank > 2 else None


_PASSES: Mapping[str, Callable[[Graph, Node, Node, Dims], Dims | None]] = {
    **dict.fromkeys("relu dropout clone contiguous alias detach".split(), _same),
    "leaky_relu": _leaky,
    **{
        f"{name}_pool{d}d": _pooled
        for name in ("max", "avg", "adaptive_avg", "adaptive_max")
        for d in (1, 2)
    },
    "mean": _averaged,
    **dict.fromkeys("flatten view reshape squeeze unflatten _unsafe_view".split(), _viewed),
    **dict.fromkeys("transpose permute".split(), _turned),
    **dict.fromkeys("matmul scaled_dot_product_attention".split(), _weighed),
}
"""Operators that commute with positive factors of channels -> where the channels are afterwards."""


# --- scales --------------------------------------------------------------------------------------


def smooth(net: GraphModel, data: Data, strength: float) -> GraphModel:
    """Move outliers of activations into the weights that read them (SmoothQuant).

    Of activations behind norms, and of those that a linear layer makes: behind a relu, or the
    values of attention. Layers in front of anything else, or of several readers of different kinds,
    are left alone.

    ``s_j = max|X_j| ** strength / max|W_j| ** (1 - strength)`` for channel j.

    Args:
        net: left as it is.
        data: batches, on which activations are seen.
        strength: 0 leaves all to the activations, 1 to the weights.

    Returns:
        A network that computes the same up to rounding.
    """
    found = [fold for fold in folds(net.graph) if fold.maker not in CONVOLUTIONS]
    dims = {reader.source: reader.dim for fold in found for reader in fold.readers}
    if not dims:
        return net
    reach: dict[str, Tensor] = {}

    def show(node: Node, value: Tensor) -> None:
        others = [d for d in range(value.ndim) if d != dims[node.name]]
        largest = value.detach().abs().amax(others)
        reach[node.name] = torch.maximum(reach.get(node.name, largest), largest)

    watch(net, dims, data, show)
    values, divided = _values(net), dict(rescaled(net))
    for fold in found:
        seen = torch.stack([reach[reader.source] for reader in fold.readers]).amax(0).double()
        weights = _read_ranges(values, fold)
        s = seen**strength / weights ** (1 - strength)
        s = torch.where(_usable(seen) & _usable(weights), s, 1.0)
        _rescale(values, divided, fold, s)
    return _with(net, values, divided)


def equalize(net: GraphModel) -> GraphModel:
    """Give consecutive layers the same weight range in every channel.

    ``s_j = sqrt(range of row j of the first / range of column j of the second)``, again and again
    over all pairs until nothing changes.

    Args:
        net: left as it is; BatchNorms folded.

    Returns:
        A network that computes the same up to rounding.
    """
    found = [fold for fold in folds(net.graph) if fold.maker in LAYERS]
    values, divided = _values(net), dict(rescaled(net))
    for _ in range(SWEEPS):
        moved = 0.0
        for fold in found:
            rows = values[fold.made[0]].flatten(1).abs().amax(1)
            columns = _read_ranges(values, fold)
            s = torch.where(_usable(rows) & _usable(columns), (rows / columns).sqrt(), 1.0)
            _rescale(values, divided, fold, s)
            moved = max(moved, float((s - 1).abs().max()))
        if moved < SETTLED:
            break
    return _with(net, values, divided)


def rescaled(net: GraphModel) -> Mapping[str, Tensor]:
    """Path of a layer's weight -> what its outputs were divided by, for each channel."""
    found: Mapping[str, Tensor] = vars(net).get(KEY, {})
    return found


def _usable(ranges: Tensor) -> Tensor:
    return (ranges > SMALLEST) & ranges.isfinite()


def _columns(weight: Tensor, groups: int) -> Tensor:
    """A view of a layer's weight: (groups, outputs of one, inputs of one, positions)."""
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _read_ranges(values: Mapping[str, Tensor], fold: Fold) -> Tensor:
    """Largest weight that reads each channel, over all readers."""
    found = [
        _columns(values[r.weight], r.groups).abs().amax((1, 3)).flatten() for r in fold.readers
    ]
    return torch.stack(found).amax(0)


def _rescale(values: dict[str, Tensor], divided: dict[str, Tensor], fold: Fold, s: Tensor) -> None:
    """Divide what makes the channels, multiply what reads them, in place."""
    if fold.maker in LAYERS:
        divided[fold.made[0]] = divided.get(fold.made[0], 1.0) * s
    for path in fold.made:
        values[path] /= s.reshape(-1, *[1] * (values[path].ndim - 1))
    for reader in fold.readers:
        _columns(values[reader.weight], reader.groups).mul_(s.reshape(reader.groups, 1, -1, 1))


def _values(net: GraphModel) -> dict[str, Tensor]:
    """Double-precision copies of all real tensors, by path."""
    held = [*named(net.named_parameters), *named(net.named_buffers)]
    return {
        path: tensor.detach().double().contiguous().clone()
        for path, tensor in held
        if tensor.is_floating_point()
    }


def _with(
    net: GraphModel, values: Mapping[str, Tensor], divided: Mapping[str, Tensor]
) -> GraphModel:
    """The network with other values of its tensors, and a record of what was divided."""
    parameters = {
        path: nn.Parameter(values[path].to(p.dtype), requires_grad=p.requires_grad)
        if path in values
        else p
        for path, p in named(net.named_parameters)
    }
    buffers = {
        path: values[path].to(b.dtype) if path in values else b
        for path, b in named(net.named_buffers)
    }
    result = GraphModel(net.graph, parameters, buffers)
    vars(result)[KEY] = divided
    return result
