"""Programs of torch.export whose graph, signature and tensors change together."""

import pytest
import torch
from torch import nn

from rarefy.deployment.editing import Editor

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """One weight that two layers read, and a buffer that forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.second(self.first(x))


@pytest.fixture
def editor() -> Editor:
    program = torch.export.export(Tied().eval(), (X,))
    return Editor(program.run_decompositions({}))  # so that what is written is in the signature


def named(editor: Editor, end: str) -> list[torch.fx.Node]:
    return [node for node, path in editor.tensors() if path.endswith(end)]


def test_a_weight_of_two_parts_computes_the_same(editor: Editor) -> None:
    expected = editor.program.module()(X)
    add = torch.ops.aten.add.Tensor
    for node in [node for node in named(editor, "weight") if node.users]:
        value = editor.value(node)
        assert value is not None
        half = editor.add_input(node, "first.part", value.detach() / 2)
        with editor.graph.inserting_before(next(iter(node.users))):
            whole = editor.call(add, half, half)
        assert whole.meta["val"].shape == (4, 4)
        for reader in list(node.users):
            reader.replace_input_with(node, whole)
        editor.forget(node)
    editor.finish()
    state = editor.program.state_dict
    assert {"first.part", "first.bias", "second.bias", "calls"} <= state.keys()
    assert torch.equal(editor.program.module()(X), expected)


def test_what_is_written_or_given_has_no_value(editor: Editor) -> None:
    assert not named(editor, "calls")
    given = editor.nodes[str(editor.signature.user_inputs[0])]
    assert editor.value(given) is None


def test_tensors_that_only_an_erased_call_read_are_forgotten(editor: Editor) -> None:
    layers = [n for n in editor.graph.nodes if n.target is torch.ops.aten.linear.default]
    layers[-1].replace_all_uses_with(layers[0])
    editor.erase(layers[-1])
    editor.finish()
    assert "second.bias" not in editor.program.state_dict
    assert "first.bias" in editor.program.state_dict
    assert editor.program.module()(X).shape == (3, 4)
