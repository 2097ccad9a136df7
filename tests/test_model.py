"""The module that runs a graph."""

import copy

import pytest
import torch
from torch import nn

from rarefy.errors import InputError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.model import GraphModel, last_use

torch.set_num_threads(1)
X = torch.randn(4, 3, 6, 6)


def network() -> tuple[nn.Module, GraphModel]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        ).eval()
    return net, graph_model(net, capture(net, X))


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
