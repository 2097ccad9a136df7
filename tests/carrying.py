"""A small network around one function, and the check that removing its units equals masking."""

import dis
from collections.abc import Callable
from types import FunctionType

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.graph.model import GraphModel
from rarefy.graph.trace import Network, trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import prove
from rarefy.pruning.structure.surgery import rewrite

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def reads(function: Callable[..., Tensor], name: str) -> bool:
    """Whether the code of a function, or of one around which it closes, names this."""
    if not isinstance(function, FunctionType):
        return True
    named = {repr(i.argval) for i in dis.get_instructions(function)}
    inner = (cell.cell_contents for cell in function.__closure__ or ())
    return any(repr(name) in each for each in named) or any(
        reads(value, name) for value in inner if callable(value)
    )


class Net(nn.Module):
    """``y`` and ``z`` (3, 8) from two layers, a function of both, and a last layer.

    It holds no parameter that the function does not read: those have it captured in training, too.
    """

    def __init__(self, function: Callable[..., Tensor], width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.y, self.z, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(width, 2)
            self.table = nn.Parameter(torch.randn(8, 8))
        if not reads(function, "table"):
            del self.table
        if not reads(function, "z"):
            self.z = self.y
        self.register_buffer("order", torch.tensor([3, 1, 7, 0, 2, 5, 4, 6]))
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self, self.y(x), self.z(x)))


def removals(network: Network) -> list[np.ndarray]:
    """Removals to try: one unit of every group, and a third of all."""
    size = network.coupling.units
    single = [np.arange(size) == g.units[u] for g in network.groups for u in (0, len(g) // 2)]
    third = np.zeros(size, bool)
    for group in network.groups:
        third[group.units[1::3]] = True
    return [removed for removed in (*single, third) if removed.any()]


def each(labels: object) -> list[np.ndarray]:
    """All label arrays of a value."""
    if isinstance(labels, np.ndarray):
        return [labels]
    return [a for part in labels for a in each(part)] if isinstance(labels, tuple) else []


def leaves_entries(network: Network, plan: Plan) -> bool:
    """Whether every dimension of every value keeps an entry."""
    values = network.flow.labels.values()
    return not any(plan.gone[a].all() for labels in values for a in each(labels))


def prunable(network: Network) -> set[tuple[str, int]]:
    """(path, dimension) of everything that can shrink."""
    return {(m.path, m.dim) for g in network.groups for m in g.members}


def halved(net: nn.Module, x: object = X, share: float = 0.4) -> GraphModel:
    """The rewritten graph without a share of every group's units, proven."""
    network = trace(net, x)
    removed = np.zeros(network.coupling.units, bool)
    for group in network.groups:
        removed[group.units[: int(share * len(group))]] = True
    plan = Plan.of(network, removed)
    prove(net, x, network, plan, lambda m, p: rewrite(m, network, p))
    return rewrite(net, network, plan)


def check_carried(net: nn.Module, x: object = X) -> Network:
    """Something can be removed, every operator has a rule, and removing equals masking."""
    network = trace(net, x)
    assert network.groups, "nothing can be removed"
    assert not network.unknown
    check_proven(net, x, network)
    return network


def check_proven(net: nn.Module, x: object, network: Network) -> None:
    """Removing any unit of any group, or a third of all, equals masking."""
    for removed in removals(network):
        plan = Plan.of(network, removed)
        if leaves_entries(network, plan):
            assert prove(net, x, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-3
