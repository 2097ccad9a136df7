"""Mixed precision: which layers go back to float, how many evaluations that takes, what is said."""

import pytest
import torch
from torch import nn

from quantized_networks import build
from rarefy.errors import BudgetError, InputError
from rarefy.quantization.mixed import most
from rarefy.quantization.quantize import quantize
from rarefy.schemes import Int8, WeightOnly

PLAIN = Int8(smooth=None)
"""Smoothing would heal what these tests spoil."""


def spoiled(layers=6, spoiled=(2,)):
    """Linear layers, some with inputs whose one outlier hides all others from 8 bits."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for i in range(layers):
        net.append(nn.Linear(16, 16))
        nn.init.orthogonal_(net[-1].weight, 1.5)
        net.append(nn.Tanh())
        if i in spoiled:
            scale = torch.ones(16)
            scale[0] = 1e4
            with torch.no_grad():
                net[-2].weight[0], net[-2].bias[0] = 0, 1.0
            net.append(Scale(scale))
    return net.append(nn.Linear(16, 4)).eval(), [torch.randn(128, 16)]


class Scale(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x * self.scale


class Agreement:
    """How near a network's outputs are to those of a reference, counted."""

    def __init__(self, model, x):
        self.model, self.x, self.calls = model, x, 0

    def __call__(self, net):
        self.calls += 1
        assert not net.training
        with torch.no_grad():
            a, b = self.model(self.x), net(self.x)
        return 1 - float((a - b).norm() / a.norm())


def behind_scale(model):
    return [str(i + 1) for i, m in enumerate(model) if isinstance(m, Scale)]


def test_only_the_layers_that_spoil_the_metric_stay_in_float_with_their_reason():
    model, data = spoiled(spoiled=(1, 3))
    with torch.no_grad():
        for name in behind_scale(model):
            model[int(name)].weight[:, 0] /= 1e4
    metric = Agreement(model, data[0])
    plain = Agreement(model, data[0])(quantize(model, data, PLAIN))
    net = quantize(model, data, PLAIN, evaluate=metric, max_drop=0.05)
    assert plain < 0.95
    assert sorted(net.quantization.left) == sorted(behind_scale(model))
    for reason in net.quantization.left.values():
        assert "quantized alone it leaves" in reason
        assert "0.05 is the limit" in reason
    assert net.quantization.drop == pytest.approx(1 - Agreement(model, data[0])(net), abs=1e-6)
    assert net.quantization.drop <= 0.05
    assert metric.calls == net.quantization.evaluations <= most(7)


def test_a_good_network_is_evaluated_twice_and_keeps_all_layers():
    model, data = build("mlp")
    metric = Agreement(model, data[0])
    net = quantize(model, data, PLAIN, evaluate=metric, max_drop=0.1)
    assert metric.calls == net.quantization.evaluations == 2
    assert not net.quantization.left


def test_a_loss_may_be_the_metric():
    model, data = spoiled(spoiled=(1,))
    near = Agreement(model, data[0])
    net = quantize(
        model, data, PLAIN, evaluate=lambda n: 1 - near(n), max_drop=0.05, higher_is_better=False
    )
    assert 0 <= net.quantization.drop <= 0.05


def test_costs_decide_between_layers_that_spoil_alike():
    model, data = spoiled(spoiled=())
    layers = [str(i) for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    whole = 1 - Agreement(model, data[0])(quantize(model, data, PLAIN))

    def kept(dear):
        costs = {name: 1000.0 if name == dear else 1.0 for name in layers}
        net = quantize(
            model,
            data,
            PLAIN,
            evaluate=Agreement(model, data[0]),
            max_drop=0.9 * whole,
            costs=costs,
        )
        return set(net.quantization.left)

    dear = min(kept("none"))
    assert dear not in kept(dear)


def test_a_limit_that_nothing_reaches_is_refused_with_what_can_be_had():
    model, data = build("mlp")

    def metric(net):
        return float(all("fake" not in node.op for node in net.graph.calls))

    with pytest.raises(BudgetError, match="falls by 1 or more"):
        quantize(model, data, PLAIN, evaluate=metric, max_drop=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": 3}, "cannot be called"),
        ({"evaluate": len, "max_drop": -1}, "at least 0"),
        ({"evaluate": len, "max_drop": float("nan")}, "at least 0"),
        ({"evaluate": lambda net: float("nan")}, "returned nan"),
        ({"evaluate": lambda net: net.nothing}, "raised AttributeError"),
        ({"evaluate": lambda net: 1.0, "costs": {"0": 1.0}}, "no cost above 0"),
        ({"costs": {"0": 1.0}}, "without evaluate"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    model, data = build("mlp")
    with pytest.raises(InputError, match=message):
        quantize(model, data, **options)


def test_layers_to_skip_are_named_by_path_pattern_or_module():
    model, data = build("resnet")
    net = quantize(model, data, Int8(skip=("head", "blocks.1")))
    assert set(net.quantization.left) == {"head", "blocks.1.conv1", "blocks.1.conv2"}
    assert set(net.quantization.left.values()) == {"left in float by choice"}
    assert torch.equal(net.tensor("head.weight"), model.head.weight)
    net = quantize(model, data, Int8(skip=("*conv1",)))
    assert set(net.quantization.left) == {"blocks.0.conv1", "blocks.1.conv1"}
    with pytest.raises(InputError, match="Did you mean head"):
        quantize(model, data, Int8(skip=("haed",)))
    with pytest.raises(InputError, match="no layer can be quantized"):
        quantize(model, data, Int8(skip=("*",)))


@pytest.mark.parametrize("scheme", [Int8, WeightOnly])
@pytest.mark.parametrize("given", ["head", None, 3, [0], {"head": 1}, (name for name in ["head"])])
def test_what_is_no_list_of_paths_is_not_skipped(scheme, given) -> None:
    with pytest.raises(InputError, match=r"skip=.*it is no list of paths"):
        scheme(skip=given)
