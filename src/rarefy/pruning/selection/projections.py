"""LSTMs that project their hidden units: more of these have to stay than of the projections.

PyTorch makes no LSTM with fewer, and takes one with equally many for one without projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rarefy.graph.trace import Network


@dataclass(frozen=True)
class Projection:
    """What multiplies the hidden units of an LSTM.

    Attributes:
        hidden: the group of hidden units, how many there are, and how many go with a unit.
        projected: likewise of the projections; the group is -1 where they cannot go.
    """

    hidden: tuple[int, int, int]
    projected: tuple[int, int, int]

    def most(self, counts: Mapping[int, int]) -> int:
        """How many units of the hidden group may go.

        Args:
            counts: group -> how many of its units go.

        Example:
            >>> Projection((0, 20, 1), (1, 8, 1)).most({1: 5})
            16
        """
        group, size, each = self.projected
        left = size - each * counts.get(group, 0)
        _, size, each = self.hidden
        return max(size - left - 1, 0) // each


def projections(network: Network) -> Iterator[Projection]:
    """All of a network, by the groups of its trace."""
    shapes = {n.path: n.shape for n in network.captured.graph.nodes if n.op == "tensor"}
    found = {
        (member.path, member.dim): (g, shapes[member.path][member.dim], len(member.indices[0]))
        for g, group in enumerate(network.groups)
        for member in group.members
        if member.path.rpartition(".")[2].startswith("weight_hr_l")
    }
    for (path, dim), hidden in found.items():
        if dim == 1:
            yield Projection(hidden, found.get((path, 0), (-1, shapes[path][0], 1)))
