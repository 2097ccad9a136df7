"""Quantized networks: what they compute, what they promise, what they refuse."""

import copy

import pytest
import torch
from torch import nn

from quantized_networks import NETWORKS, build
from rarefy.batches import call, tensors
from rarefy.errors import DataError, InputError
from rarefy.graph.model import GraphModel
from rarefy.quantization.affine import sqnr
from rarefy.quantization.insertion import PER_CHANNEL, PER_TENSOR
from rarefy.quantization.quantize import quantize
from rarefy.quantization.summary import QuantizationSummary
from rarefy.schemes import Int8


@pytest.mark.parametrize("name", NETWORKS)
def test_quantized_network_is_near_the_float_one_and_leaves_it_alone(name):
    model, data = build(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    net = quantize(model, data)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        for a, b in zip(tensors(call(model, data[0])), tensors(call(net, data[0])), strict=True):
            assert sqnr(a, b) > 20
    assert min(net.quantization.layers.values()) > 20


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_every_observer_and_a_captured_network(observer):
    model, data = build("resnet")
    scheme = Int8(observer=observer)
    net = quantize(model, data, scheme)
    assert len(net.quantization.layers) == 6
    assert not net.quantization.left


def test_weights_are_on_their_grids_and_activations_have_256_values():
    model, data = build("resnet")
    net = quantize(model, data)
    weight, scale = net.tensor("stem.0.weight"), net.tensor("stem.0.weight_scale")
    steps = weight.detach() / scale.reshape(-1, 1, 1, 1)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert int(steps.round().abs().max()) == 127
    assert net.tensor("stem.0.weight_zero_point").dtype == torch.int32
    for node in net.graph.calls:
        if node.op == PER_TENSOR:
            assert node.args[3:] == (0, 255)
            source = net.graph.by_name[node.args[0].name]
            assert "relu" not in source.op or node.args[2] == 0
            assert source.op not in (PER_TENSOR, PER_CHANNEL)


def test_summary_and_outputs_survive_a_copy():
    model, data = build("mlp")
    net = quantize(model, data)
    again = copy.deepcopy(net)
    assert isinstance(again.quantization, QuantizationSummary)
    assert again.quantization == net.quantization
    assert torch.equal(again(data[0]), net(data[0]))


def test_quantized_network_trains():
    model, data = build("lenet")
    net = quantize(model, data)
    target = torch.randint(5, (16,), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(net(data[0]), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_layer_that_is_always_zero_is_left_and_named():
    model, data = build("mlp")
    nn.init.constant_(model[2].bias, -1e4)
    net = quantize(model, data)
    assert "0 on all calibration data" in net.quantization.left["4"]
    assert "1" in net.quantization.layers


def test_dead_channels_and_large_biases_keep_their_values():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] *= 1e-9
        model[0].bias[1:3] = 3.0
    data = [torch.randn(8, 3, 4, 4)]
    net = quantize(model, data)
    assert net.quantization.layers["0"] > 25


def test_tied_weight_read_in_float_keeps_its_values():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 8)

        def forward(self, tokens):
            found = self.embed(tokens)
            near = (found[..., None, :] * self.embed.weight).sum(-1)
            return nn.functional.linear(found, self.embed.weight) + near

    model = Tied()
    net = quantize(model, [torch.arange(7).reshape(1, 7).repeat(3, 1)])
    assert torch.equal(net.tensor("embed.weight"), model.embed.weight)


def test_a_weight_that_is_joined_with_another_keeps_its_values_there():
    class Joined(nn.Linear):
        def forward(self, x):
            joined = torch.cat([self.weight, self.weight[:1]])
            return nn.functional.linear(x, self.weight, self.bias).relu() + joined.square().sum()

    model = Joined(8, 8)
    net = quantize(model, [torch.randn(16, 8)])
    assert list(net.quantization.layers)
    assert torch.equal(net.tensor("weight"), model.weight)


def test_calibration_that_cannot_be_used_is_refused():
    model, data = build("mlp")
    with pytest.raises(DataError):
        quantize(model, [])
    with pytest.raises(DataError, match="not finite"):
        quantize(model, [data[0] * float("nan")])


def test_nan_in_a_weight_is_refused_with_its_path():
    model, data = build("lenet")
    model.conv2.weight.data[0] = float("nan")
    with pytest.raises(InputError, match=r"'conv2\.weight'.*NaN"):
        quantize(model, data)


def test_overflow_inside_of_the_network_is_refused_with_its_module():
    model, data = build("lenet")
    model.conv1.weight.data *= 1e38
    model.conv2.weight.data *= 1e38
    with pytest.raises(DataError, match="not finite"):
        quantize(model, data)


def test_nothing_to_quantize_and_twice_are_refused():
    with pytest.raises(InputError, match="no layer"):
        quantize(nn.Sequential(nn.Flatten(), nn.LayerNorm(12)), [torch.randn(4, 3, 2, 2)])
    model, data = build("mlp")
    net = quantize(model, data)
    with pytest.raises(InputError, match="already"):
        quantize(net, data)
    assert isinstance(net, GraphModel)
