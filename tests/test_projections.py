"""LSTMs that project: any budget leaves what PyTorch can make again."""

import pytest
import torch
from torch import nn

from rarefy.graph.trace import trace
from rarefy.pruning.prune import prune
from rarefy.pruning.selection.projections import Projection, projections
from rarefy.types import Budget

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


class Net(nn.Module):
    """An LSTM whose projections are outputs, or are read by another layer."""

    def __init__(self, *, read: bool, **options: object) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 10, batch_first=True, proj_size=4, **options)
        outputs = 8 if options.get("bidirectional") else 4
        self.head = nn.Linear(outputs, 3) if read else nn.Identity()

    def forward(self, x):
        return self.head(self.lstm(x)[0])


X = torch.randn(2, 3, 6)


@pytest.mark.parametrize(("share", "scope"), [(0.45, "global"), (0.55, "local"), (0.9, "global")])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("read", [True, False])
def test_what_remains_can_be_made_again(read, options, share, scope) -> None:
    net = Net(read=read, **options).eval()
    small = prune(net, X, Budget(sparsity=share, scope=scope))
    sizes = small.lstm.hidden_size, small.lstm.proj_size
    assert sizes[0] > sizes[1]
    again = nn.LSTM(6, sizes[0], batch_first=True, proj_size=sizes[1], **options)
    again.load_state_dict(small.lstm.state_dict())
    assert torch.equal(small.head(again(X)[0]), small(X))


def test_as_many_go_as_leave_more_than_the_projections() -> None:
    (found,) = projections(trace(Net(read=True), X))
    assert found == Projection(hidden=(0, 10, 1), projected=(1, 4, 1))
    assert [found.most({1: n}) for n in range(4)] == [5, 6, 7, 8]
    (found,) = projections(trace(Net(read=False), X))
    assert found == Projection(hidden=(0, 10, 1), projected=(-1, 4, 1))
