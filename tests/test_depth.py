"""Blocks are removed from the user's class and from the graph: equal to branches that are zero."""

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from rarefy.errors import ProofError
from rarefy.graph.count import count
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import Stub, plain_graph, stubs
from rarefy.graph.trace import trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.depth import BlockError, bypass, bypassed
from rarefy.pruning.structure.reference import without_branches
from rarefy.storage.format import load, save
from residual_networks import Case, Residual, cases, inputs

torch.set_num_threads(1)


def switched_off(model: Residual, gone: tuple[int, ...]) -> Residual:
    """The network whose own code makes these branches zero."""
    reference = copy.deepcopy(model)
    for number in gone:
        reference.blocks[number].off = True
    return reference


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@given(cases())
@settings(max_examples=6, deadline=None)
def test_without_blocks_a_network_is_as_with_branches_of_zeros(case: Case) -> None:
    model, x = Residual(case.kinds, case.seed), inputs(case.seed)
    network = trace(model, x)
    assert len(network.blocks) == len(case.kinds)
    blocks = [network.blocks[n] for n in case.gone]
    small, reason, error = bypass(model, x, network, blocks)
    graph = bypassed(model, network, blocks)
    with torch.no_grad():
        expected = switched_off(model, case.gone)(x)
        for found in (small, graph, plain_graph(small, x)):
            close(found(x), expected)
    assert (type(small), reason) == (Residual, "")
    assert error < 1e-7
    macs = count(model, x).macs - sum(block.macs for block in blocks)
    assert count(small, x).macs == count(graph, x).macs == macs
    assert not set(graph.graph.tensor_paths) & {p for block in blocks for p in block.tensors}


@given(cases())
@settings(max_examples=4, deadline=None)
def test_what_was_saved_is_loaded_into_a_fresh_instance(tmp_path_factory, case: Case) -> None:
    model, x = Residual(case.kinds, case.seed), inputs()
    network = trace(model, x)
    small, _, _ = bypass(model, x, network, [network.blocks[n] for n in case.gone])
    path = save(small, tmp_path_factory.mktemp("depth") / "a.safetensors")
    for fresh in (Residual(case.kinds, 1), small):
        again = load(path, fresh)
        assert stubs(again).keys() == stubs(small).keys()
        assert again.state_dict().keys() == small.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(again(x), small(x))
    assert save(again, path.with_name("b.safetensors")).read_bytes() == path.read_bytes()


@given(cases())
@settings(max_examples=3, deadline=None)
def test_a_graph_goes_the_same_way(case: Case) -> None:
    model, x = Residual(case.kinds, case.seed), inputs()
    network = trace(model, x)
    graph = bypassed(model, network, ())
    again = trace(graph, x)
    assert [b.macs for b in again.blocks] == [b.macs for b in network.blocks]
    small, reason, _ = bypass(graph, x, again, [again.blocks[n] for n in case.gone])
    assert isinstance(small, GraphModel)
    assert "graph already" in reason
    with torch.no_grad():
        close(small(x), switched_off(model, case.gone)(x))


def test_a_result_trains_and_copies() -> None:
    x = inputs()
    model = Residual(("Basic", "PreNorm", "PostNorm", "Half"))
    network = trace(model, x)
    for keep in (network.blocks[1:3], network.blocks):
        small, _, _ = bypass(model, x, network, keep)
        small = copy.deepcopy(small).train()
        before = [p.detach().clone() for p in small.parameters()]
        optimizer = torch.optim.SGD(small.parameters(), 0.1)
        small(x).square().sum().backward()
        optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True)]
        assert any(changed)
        assert model.stem.weight.grad is None


def test_whole_blocks_hand_on_their_input_and_parts_give_zeros() -> None:
    x = inputs()
    model = Residual(("Basic", "PostNorm"))
    network = trace(model, x)
    found = stubs(bypass(model, x, network, network.blocks)[0])
    assert {path: stub.stub_gives for path, stub in found.items()} == {
        "blocks.0": "input",  # relu of what a relu gave
        "blocks.1.conv": "zeros",
    }


class Own(nn.Module):
    """Blocks in many ways of writing them; ``body`` is the forward."""

    def __init__(self, body) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
            self.wide = nn.Linear(6, 12)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.body = body
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


T = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def remove_all(model: nn.Module, x=T, **options):
    network = trace(model, x)
    assert network.blocks
    return bypass(model, x, network, network.blocks, **options)


def test_modules_that_return_tuples() -> None:
    model = Own(lambda m, x: m.a(x + m.attention(x, x, x, need_weights=False)[0]))
    small, _, _ = remove_all(model)
    assert isinstance(small.attention, Stub)
    assert small.attention.stub_outputs == 2
    close(small(T), model.a(T))


@pytest.mark.parametrize("first", [False, True])
def test_layers_of_pytorch_run_without_their_perceptrons(first) -> None:
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first)] * 2
    net = nn.Sequential(*map(copy.deepcopy, layers)).eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    network = trace(net, x)
    (block,) = [block for block in network.blocks if block.name == "1.linear1"]
    small, reason, _ = bypass(net, x, network, [block])
    assert not reason
    assert type(small[1]) is nn.TransformerEncoderLayer
    plain = small(x)
    with torch.no_grad():  # where the fast path is open
        torch.testing.assert_close(small(x), plain)


def test_modules_that_are_called_by_keyword() -> None:
    model = Own(lambda m, x: m.a(x + m.b(input=m.c(input=x))))
    small, _, _ = remove_all(model)
    close(small(T), model.a(T))
    assert {*stubs(small)} == {"b", "c"}


def test_code_that_does_not_take_zeros_of_another_shape_becomes_a_graph() -> None:
    def body(m, x):
        return m.a(x + m.wide(x).unflatten(-1, (2, 6)).sum(2))

    small, reason, _ = remove_all(Own(body))
    assert isinstance(small, GraphModel)
    assert "needs modules of the blocks that go" in reason
    with pytest.raises(BlockError, match="does not work without"):
        remove_all(Own(body), keep_class=True)


def test_code_that_computes_by_itself_becomes_a_graph() -> None:
    def body(m, x):
        h = m.b(x)
        return m.a(x + m.c(torch.softmax(h @ h.transpose(1, 2), -1) @ h))

    small, reason, _ = remove_all(Own(body))
    assert isinstance(small, GraphModel)
    assert "computes with what they give in code of its own" in reason
    close(small(T), trace_only(small).a(T))


def trace_only(small: GraphModel) -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.load_state_dict({"weight": small.tensor("a.weight"), "bias": small.tensor("a.bias")})
    return type("Holder", (), {"a": layer})()


def test_a_module_of_several_blocks_goes_alone_from_the_graph_only() -> None:
    model = Own(lambda m, x: [x := x + m.a(x) for _ in range(3)][-1])
    network = trace(model, T)
    assert [block.shared for block in network.blocks] == [("a.weight", "a.bias")] * 3
    assert [block.params for block in network.blocks] == [0] * 3
    small, reason, _ = bypass(model, T, network, network.blocks[:2])
    assert isinstance(small, GraphModel)
    assert reason
    close(small(T), T + model.a(T))
    small, _, _ = bypass(model, T, network, network.blocks)
    assert type(small) is Own  # all at once go from the class
    close(small(T), T)


def test_the_error_names_the_block_that_the_class_needs() -> None:
    def body(m, x):
        x = x + m.b(x)
        return x + m.a(x) * (m.a.weight.sum() * 0 + 1)  # reads the weight of what is to go

    model = Own(body)
    network = trace(model, T)
    with pytest.raises(BlockError) as caught:
        bypass(model, T, network, network.blocks, keep_class=True)
    assert [block.name for block in caught.value.blocks] == ["a"]


def test_writes_in_place_after_the_sum_do_not_reach_the_trunk() -> None:
    def body(m, x):
        x = m.a(x)
        y = x + m.b(x)
        y[:, 0] = 0
        return m.c(y) * x

    model = Own(body)
    network = trace(model, T)
    graph = bypassed(model, network, network.blocks)
    x = model.a(T)
    y = x.clone()
    y[:, 0] = 0
    close(graph(T), model.c(y) * x)


def test_a_wrong_surgery_is_refused(monkeypatch) -> None:
    model, x = Residual(("Half", "Less")), inputs()
    network = trace(model, x)
    right = bypassed(model, network, network.blocks[:1])
    monkeypatch.setattr("rarefy.pruning.structure.depth.bypassed", lambda *_: right)
    monkeypatch.setattr("rarefy.pruning.structure.depth.places", lambda *_, **__: {})
    with pytest.raises(ProofError, match="differs from masking"):
        bypass(model, x, network, network.blocks)


def test_the_reference_is_the_network_itself_where_nothing_goes() -> None:
    model, x = Residual(("Basic", "Gated")), inputs()
    network = trace(model, x)
    with torch.no_grad():
        close(without_branches(model, network, Plan.without(network, ()))(x), model(x))
