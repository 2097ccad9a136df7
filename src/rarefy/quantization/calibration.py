"""What a network's tensors hold on the calibration data: ranges, and placements of known ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from rarefy.batches import answering, batches, call, evaluating
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node
from rarefy.quantization.affine import SMALLEST_RANGE
from rarefy.quantization.fold import named
from rarefy.quantization.observers import found, observer
from rarefy.quantization.placement import Placement, not_empty, place
from rarefy.schemes import Int8
from rarefy.types import Data

WHERE = "quantize(calibration)"


class Watched(GraphModel):
    """A network that shows the values of some nodes to a function as it runs.

    Args:
        model: shares its tensors.
        names: nodes to show.
        show: called with a node and its value.
    """

    def __init__(
        self, model: GraphModel, names: frozenset[str], show: Callable[[Node, Tensor], None]
    ) -> None:
        super().__init__(
            model.graph, dict(named(model.named_parameters)), dict(named(model.named_buffers))
        )
        self._names = names
        self._show = show
        self._inputs = [node for node in model.graph.nodes if node.op == "input"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's forward."""
        for node, value in zip(self._inputs, pytree.tree_leaves((args, kwargs)), strict=False):
            if node.name in self._names:
                self._show(node, value)
        return super().forward(*args, **kwargs)

    def step(self, node: Node, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """As the network's step."""
        result = super().step(node, function, values)
        if node.name in self._names:
            self._show(node, result)
        return result


def watch(
    net: GraphModel, names: Iterable[str], data: Data, show: Callable[[Node, Tensor], None]
) -> None:
    """Show the values of some nodes on all batches to a function.

    Raises:
        DataError: there are no data, or the network does not run on a batch.
    """
    watched = Watched(net, frozenset(names), show)
    with evaluating(watched):
        for inputs, _ in batches(data, WHERE):
            with answering(WHERE):
                call(watched, inputs)


class Calibration:
    """Ranges of a network's tensors on data, found when they are first asked for.

    Args:
        net: with BatchNorms folded.
        data: batches.
        scheme: how ranges are found.
    """

    def __init__(self, net: GraphModel, data: Data, scheme: Int8) -> None:
        self.net, self.data, self.scheme = net, data, scheme
        self.ranges: dict[str, tuple[float, float]] = {}
        self._barred: dict[str, str] = {}

    def planned(self, left: Mapping[str, str]) -> Placement:
        """A placement as far as ranges are known; see :meth:`placement`."""
        return place(self.net.graph, self._barred, left, self.scheme.functions == "fused")

    def placement(self, left: Mapping[str, str]) -> Placement:
        """A placement of which every range is known and not empty.

        Args:
            left: layer that stays in float -> reason.

        Raises:
            InputError: no layer remains.
            DataError: there are no data, or a tensor is not finite on them.
        """
        while True:
            placement = not_empty(self.planned(left))
            self.observe(placement.observed)
            empty = {n for n in placement.observed if _width(self.ranges[n]) <= SMALLEST_RANGE}
            if not empty:
                return placement
            for name, source in placement.activations.items():
                if source in empty:
                    self._barred[name] = "its input or output is 0 on all calibration data"

    def observe(self, names: Iterable[str]) -> None:
        """Find ranges that are not known yet, all in one pass over the data.

        Raises:
            DataError: there are no data, or a tensor is not finite on them.
        """
        unknown = set(names) - self.ranges.keys()
        if not unknown:
            return
        nodes = self.net.graph.by_name
        observers = {name: observer(self.scheme, _title(nodes[name])) for name in unknown}
        watch(self.net, unknown, self.data, lambda n, value: observers[n.name].update(value))
        self.ranges |= {name: found(self.scheme, seen) for name, seen in observers.items()}


def _width(span: tuple[float, float]) -> float:
    return max(span[1], 0.0) - min(span[0], 0.0)


def _title(node: Node) -> str:
    scope = f" of module {node.scope!r}" if node.scope else ""
    return f"{WHERE}: tensor {node.name!r}{scope}"
