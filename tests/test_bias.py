"""Bias correction: mean outputs of the layers are those of the float network."""

import torch
from torch import nn

from quantized_networks import build
from rarefy.graph.stubs import plain_graph
from rarefy.quantization.bias import correct_biases
from rarefy.quantization.calibration import Calibration
from rarefy.quantization.fold import fold_batch_norms
from rarefy.quantization.quantize import quantize
from rarefy.schemes import Int8


def coarse(model):
    """Weights of which most fall between the steps of an 8-bit grid, all on one side."""
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.abs_()
                module.weight[:, 0] *= 200
    return model.eval()


def outputs(net, x):
    with torch.no_grad():
        return net(x)


def test_mean_outputs_are_those_of_the_float_network():
    torch.manual_seed(0)
    model = coarse(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)))
    x = torch.rand(256, 16)
    exact = outputs(model, x).mean(0)
    plain, corrected = (
        outputs(quantize(model, [x], Int8(correct_bias=on)), x).mean(0) for on in (False, True)
    )
    assert (corrected - exact).abs().max() < 0.2 * (plain - exact).abs().max()


def test_the_float_network_and_the_quantized_one_keep_their_biases():
    model, data = build("resnet")
    net = fold_batch_norms(plain_graph(model, data[0]))
    job = Calibration(net, data, Int8())
    placement = job.placement({})
    quantized = quantize(model, data)
    biases = {k: v.clone() for k, v in quantized.state_dict().items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    corrected = correct_biases(net, quantized, placement, data[0])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(biases[k], v) for k, v in quantized.state_dict().items())
    assert not torch.equal(corrected.tensor("head.bias"), quantized.tensor("head.bias"))


def test_layers_without_a_bias_and_shared_ones_are_left():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = nn.Linear(6, 6)
            self.plain = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.plain(self.twice(self.twice(x)))

    torch.manual_seed(0)
    model, data = Shared(), [torch.randn(32, 6)]
    net = quantize(model, data, Int8(correct_bias=True))
    assert torch.equal(net.tensor("twice.bias"), model.twice.bias)
