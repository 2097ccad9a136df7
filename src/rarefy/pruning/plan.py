"""What goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rarefy.graph.blocks import Block
from rarefy.graph.groups import Group, Mask
from rarefy.graph.trace import Network

Scores = Sequence[NDArray[np.float64]]
"""One array per group, shape (units,)."""


@dataclass(frozen=True)
class Plan:
    """What goes.

    Attributes:
        removed: for each unit of the network's coupling, whether it goes.
        gone: for each atom, whether it goes.
        whole: groups that were left whole so that the user's forward can carry the plan out, by
            number, each with the reason.
        blocks: residual blocks that are bypassed. Where a plan has any, only they are taken out:
            the units beside them are counted, and chosen anew in the network without the blocks.
        left: the share that remains of what the budget counts; None where that was not counted.
        missed: how many of the units that a sparsity takes its limits hold, or empty.
    """

    removed: Mask
    gone: Mask
    whole: Mapping[int, str] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    left: float | None = None
    missed: str = ""

    @classmethod
    def of(cls, network: Network, removed: Mask, whole: Mapping[int, str] | None = None) -> Plan:
        """The plan that removes these units and all that goes with them."""
        return cls(removed, network.coupling.gone(removed), whole or {})

    @classmethod
    def without(cls, network: Network, blocks: Sequence[Block]) -> Plan:
        """The plan that bypasses these blocks."""
        nothing = np.zeros(network.coupling.units, np.bool_)
        return cls(nothing, network.coupling.gone(nothing), {}, tuple(blocks))

    def kept(self, network: Network, group: Group) -> int:
        """Number of units of a group that stay."""
        return int((~self.removed[group.units]).sum())
