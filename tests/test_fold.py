"""BatchNorm folding: the same function, fewer nodes, and what must not be folded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.graph.capture import capture, graph_model
from rarefy.quantization.fold import BATCH_NORM, fold_batch_norms, pairs


def randomized(model):
    """The model in eval mode with BatchNorms that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def folded(model, x):
    before = copy.deepcopy(model.state_dict())
    net = graph_model(model, capture(model, x))
    result = fold_batch_norms(net)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-4)
    return result, sum(n.op == BATCH_NORM for n in result.graph.nodes)


image = torch.randn(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), image),
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), image),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.BatchNorm2d(4), image),
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), image),
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), image[..., 0]),
        (nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), torch.randn(2, 2, 5, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(5, 4)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), torch.randn(5, 4)),
    ],
)
def test_folds_to_the_same_function(layer, norm, x):
    result, left = folded(randomized(nn.Sequential(layer, norm, nn.ReLU())), x)
    assert left == 0
    assert set(dict(result.named_parameters())) == {"0.weight", "0.bias"}


class Shared(nn.Module):
    """One convolution called twice, with one norm or with two."""

    def __init__(self, norms):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x):
        x = self.norms[0](self.conv(x)).relu()
        return self.norms[-1](self.conv(x)).relu()


@pytest.mark.parametrize(("norms", "left"), [(1, 0), (2, 2)])
def test_shared_convolution_folds_only_with_one_norm(norms, left):
    assert folded(randomized(Shared(norms)), image)[1] == left


class Observed(nn.Module):
    """A convolution whose value is read before the norm, and a norm without statistics."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        x = self.norm(x) + x
        return F.batch_norm(self.other(x), None, None, training=True)


def test_read_values_and_missing_statistics_are_left_alone():
    model = randomized(Observed())
    net = graph_model(model, capture(model, image))
    assert pairs(net.graph) == ()
    assert folded(model, image)[1] == 2
