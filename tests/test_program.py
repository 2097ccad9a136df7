"""Graphs as data, and the module that runs them."""

import copy

import pytest
import torch
from torch import nn

from rarefy.errors import FormatError, InputError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.program import (
    GraphModel,
    Node,
    Ref,
    Spec,
    last_use,
    refs,
    resolve,
    schema,
    shares_memory,
    substitute,
    writes,
)

torch.set_num_threads(1)
X = torch.randn(4, 3, 6, 6)


def network() -> tuple[nn.Module, GraphModel]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        ).eval()
    return net, graph_model(net, capture(net, X))


def test_references_are_found_and_replaced_at_any_depth() -> None:
    nested = (Ref("a"), [Ref("b"), {"k": Ref("c")}], slice(Ref("d"), None), 3)
    assert [r.name for r in refs(nested)] == ["a", "b", "c", "d"]
    assert substitute(nested[:2], lambda r: r.name) == ("a", ["b", {"k": "c"}])


def test_nodes_answer_for_their_values() -> None:
    node = Node("y", "aten.relu.default", (Ref("x"),), value=Spec((2, 3), torch.float32))
    assert node.shape == (2, 3)
    assert node.inputs == ("x",)
    assert node.options == {}
    with pytest.raises(InputError, match="node y"):
        _ = Node("y", "aten.split.Tensor", value=(Spec((1,), torch.float32),)).shape


@pytest.mark.parametrize("op", ["os.system", "aten.nothing.default", "aten.relu", "torch.load", ""])
def test_other_operators_do_not_resolve(op) -> None:
    with pytest.raises(FormatError, match="operator"):
        resolve(op)
    assert schema(op) is None


@pytest.mark.parametrize(
    ("op", "shares", "written"),
    [
        ("aten.relu.default", False, False),
        ("aten.relu_.default", True, True),
        ("aten.view.default", True, False),
        ("aten.reshape.default", True, False),
        ("aten.chunk.default", True, False),
        ("aten.split.Tensor", True, False),
        ("aten.dropout.default", True, False),
        ("aten.type_as.default", True, False),
        ("operator.getitem", True, False),
        ("aten.conv2d.default", False, False),
        ("aten.copy_.default", True, True),
    ],
)
def test_who_shares_memory_and_who_writes(op, shares, written) -> None:
    assert (shares_memory(op), writes(op)) == (shares, written)


class Writes(nn.Module):
    """A value that is read, written through another and read again."""

    def __init__(self, write) -> None:
        super().__init__()
        self.write = write

    def forward(self, x, y):
        before = y * 2
        self.write(x, y)
        return before, y * 3


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: torch.broadcast_tensors(x, y)[1].mul_(2),
        lambda x, y: torch.atleast_2d(x, y)[1].mul_(2),
        lambda x, y: torch.add(x, 1, out=y),
        lambda x, y: torch._foreach_mul_([x, y], 2),
        lambda x, y: y[:, :1].mul_(2),
    ],
)
def test_what_is_written_is_known_by_all_of_its_names(write) -> None:
    graph = capture(Writes(write), (torch.randn(3, 2), torch.randn(3, 2))).graph
    (written,) = (node for node in graph.calls if writes(node.op))
    before, after = (node for node in graph.calls if node.op == "aten.mul.Tensor")
    assert after.name in graph.effects[written.name]
    assert before in graph.readers[graph.owner[written.name]]
    assert graph.output.name in graph.effects[written.name]


def test_a_graph_model_is_a_module_like_any_other() -> None:
    net, model = network()
    assert torch.equal(model(X), net(X))
    assert torch.equal(model(X[:1]), net(X[:1]))
    assert torch.equal(copy.deepcopy(model)(X), net(X))
    assert model.state_dict().keys() == net.state_dict().keys() - {"1.num_batches_tracked"}
    assert model.tensor("0.weight") is net[0].weight
    model(X).sum().backward()
    assert net[0].weight.grad is not None


def test_training_switches_batch_norm_and_dropout() -> None:
    model = copy.deepcopy(network()[1]).train()
    before = model.tensor("1.running_mean").clone()
    assert (model(X) == 0).float().mean() > (model.eval()(X) == 0).float().mean()
    assert not torch.equal(before, model.tensor("1.running_mean"))


def test_missing_tensors_and_other_arguments_are_refused() -> None:
    _, model = network()
    with pytest.raises(InputError, match=r"0\.weight"):
        GraphModel(model.graph, {}, {})
    with pytest.raises(InputError, match="structured"):
        model(X, X)


def test_values_are_dropped_after_their_last_use() -> None:
    _, model = network()
    done = last_use(model.graph)
    dropped = [name for names in done.values() for name in names]
    kept = set(model.graph.output.inputs)
    assert sorted(dropped + list(kept)) == sorted({n.name for n in model.graph.nodes[:-1]} | kept)
