"""MACs against PyTorch's own counter, which counts two operations for each."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rarefy.graph.capture import capture, graph_model
from rarefy.graph.count import count

torch.set_num_threads(1)


def reference(model: nn.Module, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() / 2 / inputs[0].shape[0]


X = torch.randn(3, 4, 9, 8)
NETWORKS = {
    "conv": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, bias=False),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
    "transposed grouped": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "linear": nn.Linear(8, 5),
    "norm and activation": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_counted_as_pytorch_counts_them(name) -> None:
    assert count(NETWORKS[name], X).macs == reference(NETWORKS[name], X)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank) -> None:
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[rank]
    x = torch.randn(2, 3, *[5] * rank)
    assert count(kind(3, 4, 3), x).macs == reference(kind(3, 4, 3), x)


class Products(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.flatten(2)
        b = torch.bmm(a, a.transpose(1, 2))
        heads = a.unflatten(1, (2, 2))
        return b @ a + nn.functional.scaled_dot_product_attention(heads, heads, heads).flatten(1, 2)


def test_products_are_counted() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert count(Products(), X).macs == reference(Products(), X)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_whole_networks(name) -> None:
    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(1, 3, 64, 64)
    cost = count(model, x)
    assert cost.macs == reference(model, x)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert sum(cost.by_layer.values()) == cost.macs
    assert not cost.uncounted


def test_the_batch_does_not_matter_and_a_graph_counts_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(252, 3))
    costs = {count(net, x).macs for x in (X, X[:1], X[:2])}
    costs.add(count(graph_model(net, capture(net, X)), X).macs)
    assert len(costs) == 1


def test_shared_parameters_count_once_and_their_macs_each_time() -> None:
    layer = nn.Linear(8, 8)
    cost = count(nn.Sequential(layer, layer), torch.randn(2, 8))
    assert cost.params == 72
    assert cost.macs == 128


def test_what_is_not_counted_is_named() -> None:
    cost = count(nn.LSTM(4, 3), torch.randn(5, 2, 4))
    assert cost.uncounted == {"lstm": 1}
