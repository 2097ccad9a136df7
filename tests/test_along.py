"""What is zero along one dimension only: summed over where it is, frozen where it is not."""

import pytest
import torch
from torch import Tensor, nn

from masking import check_masking, holders
from rarefy.graph.trace import trace

torch.set_num_threads(1)
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """``out(function)`` of two layers, of 8 units, and of 6 centers among these."""

    def __init__(self, function) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.y, self.z, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(6, 2)
            self.centers = nn.Parameter(torch.randn(6, 8))
            self.weight = nn.Parameter(torch.randn(6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self, self.y(x), self.z(x)))


def over_time(net: Net, y: Tensor, z: Tensor) -> Tensor:
    """A state of centers times features, read by the features."""
    state = torch.zeros_like(y[:, None] * net.centers)
    for _ in range(12):
        state = torch.exp(net.centers) * state + z[:, None] * net.centers.sigmoid()
    return (state * y[:, None]).sum(-1)


def overwritten(value: Tensor) -> Tensor:
    value[:, 0] = 1
    return value


ZERO = {
    "squared distance": lambda n, y, z: (y[:, None] - n.centers).pow(2).sum(-1),
    "difference": lambda n, y, z: (y.unsqueeze(1) - n.centers).abs().sum(2),
    "reversed difference": lambda n, y, z: torch.rsub(y[:, None], n.centers).square().sum(-1),
    "transposed": lambda n, y, z: (y[:, None] - n.centers).transpose(1, 2).relu().sum(1),
    "permuted": lambda n, y, z: (y[:, None] - n.centers).permute(2, 0, 1).tanh().sum(0),
    "product with what is not zero": lambda n, y, z: (z[:, None] * n.centers.sigmoid()).sum(-1),
    "nested": lambda n, y, z: ((z[:, None] * n.centers.exp()) * y.sigmoid()[:, None]).sum(-1),
    "one of several": lambda n, y, z: (y[:, None, None] - n.centers).select(1, 0).sum(-1),
    "product of matrices": lambda n, y, z: torch.einsum(
        "bcf,bf->bc", z[:, None] * n.centers.sigmoid(), y.exp()
    ),
    "over time": over_time,
    "both factors, each along one": lambda n, y, z: torch.linalg.vector_norm(
        (y[:, None] - n.centers.tanh()) * n.centers.sum(1).mul(n.weight)[:, None], dim=2
    ),
}

NOT_ZERO = {
    "shifted": lambda n, y, z: (y[:, None] - n.centers + 1).sum(-1),
    "one side only": lambda n, y, z: (y.exp()[:, None] - n.centers).sum(-1),
    "negative power": lambda n, y, z: (y[:, None] - n.centers).cosh().pow(-1).sum(-1),
    "wave": lambda n, y, z: (y[:, None] - n.centers).cos().sum(-1),
    "divisor": lambda n, y, z: (1 / (y[:, None] * n.centers.exp())).sum(-1),
    "written in place": lambda n, y, z: overwritten(y[:, None] - n.centers).sum(-1),
}


@pytest.mark.parametrize("function", ZERO.values(), ids=ZERO)
def test_what_is_zero_along_the_sum_goes(function) -> None:
    net = Net(function)
    assert holders(trace(net, X.float()), "centers", 1) == {8}
    check_masking(net, X)


@pytest.mark.parametrize("function", NOT_ZERO.values(), ids=NOT_ZERO)
def test_what_is_not_zero_along_the_sum_stays(function) -> None:
    net = Net(function)
    assert not holders(trace(net, X.float()), "centers", 1)
    check_masking(net, X)


def test_masked_centers_are_not_summed_over() -> None:
    net = Net(lambda n, y, z: (y[:, None] - n.centers).pow(2).sum(1))
    net.out = nn.Linear(8, 2)
    network = trace(net, X.float())
    assert not holders(network, "centers", 0)
    assert holders(network, "centers", 1) == {8}
    check_masking(net, X)
