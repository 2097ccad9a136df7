"""Students of networks of torchvision and transformers: the teacher with layers bypassed."""

from collections.abc import Callable

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import rarefy as rf
from rarefy.batches import call, tensors

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
CV = torchvision.models
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = IMAGE[:, :, :32, :32].contiguous()
IDS = {"input_ids": torch.arange(26).reshape(2, 13) % 50}
BERT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 4, "n_head": 4, "use_cache": False}
ENDS = {"bos_token_id": None, "eos_token_id": None}
T5 = {
    "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
    "use_cache": False,
}  # fmt: skip

NETWORKS: dict[str, tuple[Callable[[], nn.Module], object, dict[str, tuple[int, ...]]]] = {
    "resnet18": (CV.resnet18, IMAGE, {f"layer{n}": (1,) for n in range(1, 5)}),
    "vit": (
        lambda: CV.VisionTransformer(32, 8, 4, 2, 32, 48, num_classes=5),
        SMALL,
        {"encoder.layers": (1, 2)},
    ),
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
        IDS,
        {"bert.encoder.layer": (1, 2)},
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, **ENDS)),
        IDS,
        {"transformer.h": (1, 2)},
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        {**IDS, "decoder_input_ids": torch.arange(14).reshape(2, 7)},
        {"encoder.block": (1,), "decoder.block": (1,)},
    ),
}
"""Name -> how it is made, what it is called with, and what goes of half of its layers."""


def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name][0]().eval()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def output(model: nn.Module, inputs: object) -> Tensor:
    with torch.no_grad():
        return tensors(call(model, inputs))[0]


def handed_on(_: object, args: tuple[Tensor, ...], output: object) -> object:
    """A hook that makes a layer return what it is given, with whatever else it returns."""
    return args[0] if isinstance(output, Tensor) else (args[0], *output[1:])


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_layers_go(name, tmp_path) -> None:
    teacher, (_, inputs, gone) = made(name), NETWORKS[name]
    small = rf.student(teacher, inputs, depth=0.5)
    assert {stack.path: stack.gone for stack in small.derived.layers} == gone
    hooks = [
        list(teacher.get_submodule(path).children())[number].register_forward_hook(handed_on)
        for path, numbers in gone.items()
        for number in numbers
    ]
    expected = output(teacher, inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(output(small, inputs), expected, rtol=1e-4, atol=1e-4)
    if small.derived.kind == "module":
        again = rf.load(rf.save(small, tmp_path / "a.safetensors"), made(name))
        assert torch.equal(output(again, inputs), output(small, inputs))


@pytest.mark.parametrize("name", ["resnet18", "bert"])
def test_a_student_of_both_kinds_is_exported(name, tmp_path) -> None:
    teacher, (_, inputs, _) = made(name), NETWORKS[name]
    small = rf.student(teacher, inputs, width=0.5, depth=0.5)
    assert small.derived.kind == "module"
    before, after = small.derived.params
    assert after < 0.35 * before
    rf.export(small, tmp_path / "small.onnx", inputs)  # checked against PyTorch
