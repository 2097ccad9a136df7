"""Fake quantizers as the calls in which ExecuTorch finds integers; PyTorch can run them, too."""

import pytest
import torch
from torch import nn

import rarefy as rf
from quantized_networks import NETWORKS, build
from rarefy.batches import tensors
from rarefy.deployment.executorch_session import load_executorch
from rarefy.deployment.proof import outputs
from rarefy.deployment.tracing import fake_quantize_shapes, quiet, trace
from rarefy.deployment.xnnpack import integers

pytest.importorskip("executorch", reason="executorch is not installed")


def turned(net: nn.Module, x: object) -> torch.export.ExportedProgram:
    """The program of a network, with integers."""
    load_executorch("executorch.exir")
    with quiet(), fake_quantize_shapes():
        program = trace(net, x).program
        integers(program)
    return program


def called(program: torch.export.ExportedProgram, name: str) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if name in str(node.target)]


def run(program: torch.export.ExportedProgram, x: object) -> list[torch.Tensor]:
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    with quiet():
        module = program.module(check_guards=False)  # of two inputs they name what is not there
        return tensors(torch.utils._pytree.tree_leaves(module(*args, **kwargs)))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / a.norm()).detach())


@pytest.mark.parametrize("name", NETWORKS)
def test_integers_compute_what_the_network_does(name: str) -> None:
    model, data = build(name)
    net = rf.quantize(model, data, rf.Int8())
    program = turned(net, data[0])
    assert not called(program, "fake_quantize")
    state = program.state_dict
    codes = [path for path, tensor in state.items() if tensor.dtype == torch.int8]
    layers = net.quantization.layers
    assert {path.removesuffix(".weight_codes") for path in codes} == set(layers)
    assert not {f"{layer}.weight" for layer in layers} & state.keys()
    for expected, found in zip(outputs(net, data[0]), run(program, data[0]), strict=True):
        assert expected.shape == found.shape
        assert distance(expected, found) < 0.02  # inputs of the last layer are rounded once more


def test_grids_are_the_same_bit_for_bit() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Sigmoid()).eval()
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    net = rf.quantize(net, [x], rf.Int8())
    program = turned(net, x)
    assert not called(program, "choose_qparams")
    [expected], [found] = outputs(net, x), run(program, x)
    assert torch.equal(expected, found)
    for node in called(program, "quantize_per_tensor.default"):
        _, _, zero, *grid = node.args
        assert grid == [-128, 127, torch.int8]
        assert -128 <= zero <= 127
    # Behind the relu nothing is below 0, the smallest integer.
    assert -128 in [node.args[2] for node in called(program, "quantize_per_tensor.default")]


def test_each_reader_has_a_call_of_its_own() -> None:
    model, data = build("resnet")
    program = turned(rf.quantize(model, data, rf.Int8()), data[0])
    decoded = called(program, "dequantize_per_tensor")
    assert len(decoded) > len(called(program, ".quantize_per_tensor"))
    again = "choose_qparams"  # reads what is rounded once more, beside what rounds it
    for node in decoded:
        assert len([user for user in node.users if again not in str(user.target)]) == 1


def test_layers_whose_result_is_not_rounded_find_ranges_or_stay_in_float() -> None:
    model, data = build("inverted")
    net = rf.quantize(model, data, rf.Int8(functions="fused"))
    program = turned(net, data[0])
    kinds = {}
    for node in called(program, "conv2d"):
        source, weight = (str(n.target) for n in node.all_input_nodes[:2])
        layer = next(iter(node.meta["nn_module_stack"].values()), ("",))[0]
        kinds[node.all_input_nodes[0], layer] = ("tensor.tensor" in source, "per_channel" in weight)
    found = sorted(kinds.values())
    assert found == [(False, False), (False, True), (False, True), (False, True), (True, True)]
    assert torch.float32 in {
        tensor.dtype for path, tensor in program.state_dict.items() if path.startswith("depth.0")
    }


def test_ranges_of_each_call_are_the_layers_own() -> None:
    model, data = build("attention")
    net = rf.quantize(model, data, rf.Int8(activations="dynamic"))
    program = turned(net, data[0])
    for gone in ("fake_quantize", "aten.min", "aten.clamp", "assert_tensor"):
        assert not called(program, gone)
    assert len(called(program, "choose_qparams")) == len(net.quantization.layers)
    [expected], [found] = outputs(net, data[0]), run(program, data[0])
    assert distance(expected, found) < 0.02


def test_a_dropout_does_not_part_a_layer_from_its_quantizer() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    program = turned(rf.quantize(net, [x], rf.Int8()), x)
    assert not called(program, "dropout")
    assert len(called(program, "choose_qparams")) == 1  # that of the last layer


def test_a_weight_that_left_its_grid_is_stored_on_it() -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    net = rf.quantize(nn.Linear(8, 4).eval(), [x], rf.Int8())
    weight = dict(net.named_parameters())["weight"]
    with torch.no_grad():
        weight += 0.3 * dict(net.named_buffers())["weight_scale"][:, None]
    [expected], [found] = outputs(net, x), run(turned(net, x), x)
    assert distance(expected, found) < 0.02
    assert weight.dtype == torch.float32  # that of the network is as it was


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_a_table_are_looked_up_as_integers(tied: bool) -> None:
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 50)).eval()
    if tied:
        net[3].weight = net[0].weight
    x = torch.randint(50, (4, 5), generator=torch.Generator().manual_seed(0))
    small = rf.quantize(net, [x], rf.Int8())
    program = turned(small, x)
    floats = [t for t in program.state_dict.values() if t.dtype == torch.float32]
    assert max(tensor.numel() for tensor in floats) <= 64
    [expected], [found] = outputs(small, x), run(program, x)
    assert distance(expected, found) < 0.02
