"""Where the quantizers go, on the graph alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantized_networks import NETWORKS, build
from rarefy.graph.capture import capture, graph_model
from rarefy.quantization.fold import fold_batch_norms
from rarefy.quantization.placement import CONVOLUTIONS, LAYERS, carrier, place


def placed(model, data):
    graph = fold_batch_norms(graph_model(model, capture(model, data))).graph
    return graph, place(graph)


def ops(graph, names):
    return sorted(graph.by_name[name].op.removeprefix("aten.").split(".")[0] for name in names)


@pytest.mark.parametrize("name", NETWORKS)
def test_laws_that_hold_on_every_network(name):
    model, data = build(name)
    graph, placement = placed(model, data[0])
    for node in graph.calls:
        if node.name in placement.layers:
            assert node.args[0].name in placement.activations
            assert node.args[1].name in placement.weights
            if node.op in CONVOLUTIONS:
                assert carrier(graph, node).name in placement.activations
        elif node.op in LAYERS:
            raise AssertionError(f"{node.name} is neither quantized nor named")
    for name_, source in placement.activations.items():
        assert placement.activations[source] == source
        for user in graph.users[name_]:
            fused = user.name in placement.activations and len(graph.users[name_]) == 1
            assert not (user.op == "aten.relu.default" and fused) or source != name_
    assert all(graph.by_name[name].op != "tensor" for name in placement.activations)


def test_residual_additions_are_quantized_on_both_sides_and_behind_the_relu():
    model, data = build("resnet")
    graph, placement = placed(model, data[0])
    additions = [n for n in graph.calls if n.op == "aten.add.Tensor"]
    assert len(additions) == 2
    for node in additions:
        assert node.name not in placement.activations
        assert carrier(graph, node).name in placement.activations
        assert all(ref.name in placement.activations for ref in node.args)
    shortcut = graph.by_name[additions[1].args[1].name]
    assert "pad" in shortcut.op
    assert placement.activations[shortcut.name] == carrier(graph, additions[0]).name
    assert not placement.left


def test_relu_behind_the_pooling_gives_the_convolution_its_range():
    model, data = build("lenet")
    graph, placement = placed(model, data[0])
    convolution = next(n for n in graph.calls if n.op in CONVOLUTIONS)
    source = graph.by_name[placement.activations[convolution.name]]
    assert source.op == "aten.relu.default"


def test_concatenated_branches_share_the_range_of_the_result():
    model, data = build("fire")
    graph, placement = placed(model, data[0])
    joined = next(n for n in graph.calls if n.op == "aten.cat.default")
    pooled = graph.users[joined.name][0]
    for ref in joined.args[0]:
        assert placement.activations[ref.name] == joined.name
    assert placement.activations[pooled.name] == joined.name


def test_outputs_of_linear_layers_and_what_only_float_reads_stay_float():
    model, data = build("attention")
    graph, placement = placed(model, data[0])
    assert "linear" not in ops(graph, placement.activations)
    assert "add" not in ops(graph, placement.activations)
    output = graph.output.inputs[0]
    assert output not in placement.activations
    assert any("attention" in reason for reason in placement.left.values())


def test_transposed_convolution_is_left_and_named():
    model, data = build("signal")
    _, placement = placed(model, data[0])
    assert set(placement.layers.values()) == {"conv", "out"}
    assert "transposed" in placement.left["up"]


def test_clip_below_zero_keeps_its_input_quantized():
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(F.hardtanh(self.a(x), -1.0, 1.0))

    graph, placement = placed(Clip(), torch.randn(2, 3, 4, 4))
    assert ops(graph, placement.activations) == ["conv2d", "conv2d", "hardtanh", "input"]


def test_weight_computed_in_forward_is_left_and_named():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std(), self.bias)

    model = nn.Sequential(Standardized(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    _, placement = placed(model, torch.randn(2, 3, 4, 4))
    assert placement.left == {"0": "its weight is computed in forward"}
    assert set(placement.layers.values()) == {"2"}


def test_barred_tensor_takes_its_layers_with_it():
    model, data = build("mlp")
    graph, _ = placed(model, data[0])
    second = [n for n in graph.calls if n.op == "aten.linear.default"][1]
    placement = place(graph, {second.args[0].name: "it is 0"})
    assert placement.left == {"4": "it is 0"}
    assert second.args[0].name not in placement.activations


def test_tensor_written_in_place_carries_no_quantizer():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.a(x)
            y[:, 0] = 0
            return self.b(y)

    _, placement = placed(Written(), torch.randn(2, 3, 4, 4))
    assert set(placement.left) == {"a", "b"}
    assert all("in place" in reason for reason in placement.left.values())
