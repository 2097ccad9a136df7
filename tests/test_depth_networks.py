"""Depth on networks of torchvision and transformers: equal to branches of zeros, nothing left."""

from collections.abc import Callable

import onnx
import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import rarefy as rf
from rarefy.batches import call, tensors
from rarefy.graph.capture import graph_model
from rarefy.graph.count import count
from rarefy.graph.model import GraphModel
from rarefy.graph.trace import trace

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
CV = torchvision.models
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = IMAGE[:, :, :32, :32].contiguous()
IDS = {"input_ids": torch.arange(26).reshape(2, 13) % 50}
HF = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}
NONE = {"use_cache": False, "bos_token_id": None, "eos_token_id": None}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], object, int]] = {
    "resnet18": (lambda: CV.resnet18(), IMAGE, 5),
    "resnet50": (lambda: CV.ResNet(CV.resnet.Bottleneck, [2, 2, 1, 1]), SMALL, 2),
    "mobilenet_v2": (lambda: CV.mobilenet_v2(), IMAGE, 10),
    "convnext": (lambda: CV.ConvNeXt([CV.convnext.CNBlockConfig(16, 32, 3)]), SMALL, 3),
    "swin": (lambda: CV.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4]), IMAGE, 8),
    "vit": (lambda: CV.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=5), SMALL, 4),
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**HF)), IDS, 4
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, **NONE)), IDS, 4
    ),
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**HF, **NONE, num_key_value_heads=2)
        ),
        IDS,
        4,
    ),
}  # fmt: skip
"""Name -> how it is made, what it is called with, its number of blocks."""


def _bert_dense(block: str) -> str:
    """The layer that gives the branch of a block, attention or perceptron."""
    if block.endswith(".attention"):
        return f"{block}.output.dense"
    return f"{block.rpartition('.')[0]}.output.dense"


BRANCHES = {
    "resnet18": lambda net, name: (net.get_submodule(f"{name}.bn2"),),
    "resnet50": lambda net, name: (net.get_submodule(f"{name}.bn3"),),
    "convnext": lambda net, name: (net.get_submodule(f"{name}.block"),),
    "bert": lambda net, name: (net.get_submodule(_bert_dense(name)),),
}
"""Network -> (network, block's name) -> modules whose outputs are the branch, where the name of the
block is not that of such a module itself."""


def made(name: str) -> tuple[nn.Module, object]:
    make, inputs, _ = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():  # layer scales and biases that are all but zero
            parameter.data += 0.02 * torch.randn(parameter.shape)
    return model, inputs


def output(model: nn.Module, inputs: object) -> Tensor:
    with torch.no_grad():
        return tensors(call(model, inputs))[0]


def zeros(_: object, __: object, output: object) -> object:
    """A hook that makes what a module returns zero."""
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_blocks_of_a_network_go(name, tmp_path) -> None:
    model, inputs = made(name)
    network = trace(model, inputs)
    assert len(network.blocks) == NETWORKS[name][2]
    small = rf.prune(model, inputs, rf.Budget(sparsity=0.5), structure="depth", criterion="random")
    assert small.pruned.kind == "module", small.pruned.reason
    assert len(small.pruned.blocks) == NETWORKS[name][2] // 2
    saved = sum(b.macs for b in network.blocks if b.name in small.pruned.blocks)
    before = count(graph_model(model, network.captured), inputs).macs
    assert count(small, inputs).macs == before - saved

    branch = BRANCHES.get(name, lambda net, path: (net.get_submodule(path),))
    hooks = [
        module.register_forward_hook(zeros)
        for block in small.pruned.blocks
        for module in branch(model, block)
    ]
    expected = output(model, inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(output(small, inputs), expected, rtol=1e-4, atol=1e-4)

    again = rf.load(rf.save(small, tmp_path / "a.safetensors"), made(name)[0])
    assert torch.equal(output(again, inputs), output(small, inputs))


@pytest.mark.parametrize("name", ["resnet18", "vit", "bert"])
def test_nothing_of_a_block_is_left_in_the_exported_file(name, tmp_path) -> None:
    model, inputs = made(name)
    kinds = ("Conv", "MatMul", "Gemm", "Add", "ConstantOfShape", "Expand", "Relu", "Mul")
    found = {}
    small = rf.prune(model, inputs, rf.Budget(blocks=2), structure="depth", criterion="random")
    graph = rf.prune(
        _captured(model, inputs), inputs, rf.Budget(blocks=2), structure="depth", criterion="random"
    )
    assert graph.pruned.blocks == small.pruned.blocks
    for key, net in (("class", small), ("graph", graph)):
        path = rf.export(net, tmp_path / f"{key}.onnx", inputs)
        nodes = [node.op_type for node in onnx.load(path).graph.node]
        found[key] = {kind: nodes.count(kind) for kind in kinds}
    assert found["class"] == found["graph"]


def _captured(model: nn.Module, inputs: object) -> GraphModel:
    from rarefy.graph.stubs import plain_graph

    return plain_graph(model, inputs)


def test_width_and_depth_of_a_transformer_share_a_budget() -> None:
    model, inputs = made("bert")
    with torch.no_grad():
        for part in ("intermediate", "output"):
            model.get_submodule(f"bert.encoder.layer.1.{part}.dense").weight *= 1e-3
    small = rf.prune(model, inputs, rf.Budget(macs=0.5), structure=("channel", "depth"))
    assert small.pruned.kind == "module"
    assert small.pruned.blocks
    assert small.pruned.error < 1e-4
    assert 0.4 < count(small, inputs).macs / count(model, inputs).macs <= 0.5
