"""Quantization for a runtime: kinds of layers that int8 does not speed up stay in float."""

from contextlib import nullcontext

import pytest
import torch

import rarefy as rf
from quantized_networks import build
from rarefy import gains
from rarefy.errors import DataError, InputError
from rarefy.gains import _kinds
from rarefy.graph.stubs import plain_graph
from rarefy.schemes import Int8
from rarefy.types import Latency, Measurement, Ratio


@pytest.fixture
def timed(monkeypatch):
    """Networks are timed by a table: milliseconds of each layer in float and in int8."""
    files = {}

    def use(costs):
        def milliseconds(path):
            layers = getattr(getattr(files[path], "quantization", None), "layers", {})
            return sum(pair[layer in layers] for layer, pair in costs.items())

        def relative(before, after, **options):
            share = milliseconds(after) / milliseconds(before)
            return None, None, Ratio(share, share - 0.01, share + 0.01)

        monkeypatch.setattr(gains, "relative", relative)

    def export(net, path, inputs):
        files[path] = net
        return path

    monkeypatch.setattr(gains, "export", export)
    return use


COSTS = {
    "expand.0": (2, 1),
    "depth.0": (1, 3),
    "gate.1": (2, 1),
    "project": (2, 1),
    "head": (4, 1),
}


def test_kinds_that_are_faster_in_float_stay_there_and_say_why(timed):
    model, data = build("inverted")
    timed(COSTS)
    net = rf.quantize(model, data, runtime="onnxruntime")
    assert set(net.quantization.layers) == COSTS.keys() - {"depth.0"}
    assert "every depthwise convolution in float" in net.quantization.left["depth.0"]
    assert "onnxruntime" in net.quantization.left["depth.0"]
    assert net.served.faster
    assert net.served.share == pytest.approx(5 / 11)


@pytest.mark.parametrize("evaluate", [None, lambda n: 1.0])
@pytest.mark.parametrize("depthwise", [0.5, 3])
def test_no_network_is_made_or_written_twice(timed, monkeypatch, evaluate, depthwise):
    model, data = build("inverted")
    timed(COSTS | {"depth.0": (1, depthwise)})
    written, made = [], []

    def counted(counts, call):
        return lambda *given, **named: counts.append(given[0]) or call(*given, **named)

    monkeypatch.setattr(gains, "export", counted(written, gains.export))
    quantize = gains.quantization.quantize
    monkeypatch.setattr(gains.quantization, "quantize", counted(made, quantize))
    options = {} if evaluate is None else {"evaluate": evaluate}
    net = rf.quantize(model, data, runtime="onnxruntime", **options)
    tried = 1 + 4  # all in int8, then without one kind of layers after the other
    assert len(written) == tried + 1  # and the float network
    assert len(made) == tried + (evaluate is not None)
    assert written[-1] is model
    assert ("depth.0" in net.quantization.left) == (depthwise > 1)


@pytest.mark.parametrize(("runtime", "way"), [("onnxruntime", "split"), ("openvino", "fused")])
@pytest.mark.parametrize("pays", [True, False])
def test_functions_are_computed_as_the_runtime_does_it_faster(monkeypatch, runtime, way, pays):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU(), torch.nn.Conv2d(4, 4, 3))
    schemes, quantize = [], gains.quantization.quantize

    def noted(net, data, scheme, **options):
        schemes.append(scheme)
        return quantize(net, data, scheme, **options)

    def relative(before, after, **options):
        share = 0.9 if pays and "/2." in str(after) else 1.1
        return None, None, Ratio(share, share - 0.01, share + 0.01)

    monkeypatch.setattr(gains.quantization, "quantize", noted)
    monkeypatch.setattr(gains, "export", lambda net, path, inputs: path)
    monkeypatch.setattr(gains, "relative", relative)
    with nullcontext() if pays else pytest.warns(RuntimeWarning, match="not faster"):
        net = rf.quantize(model.eval(), [torch.randn(4, 3, 8, 8)], runtime=runtime)
    assert [scheme.functions for scheme in schemes][:2] == ["apart", way]
    quantizers = sum("fake_quantize" in node.op for node in net.graph.calls)
    kept = quantize(model, [torch.randn(4, 3, 8, 8)], Int8(functions=way if pays else "apart"))
    assert quantizers == sum("fake_quantize" in node.op for node in kept.graph.calls)


def test_a_result_that_is_not_faster_is_warned_of(timed):
    model, data = build("inverted")
    timed(dict.fromkeys(COSTS, (1, 2)))
    with pytest.warns(RuntimeWarning, match="not faster in onnxruntime"):
        net = rf.quantize(model, data, runtime="onnxruntime")
    assert not net.served.faster
    assert net.quantization.layers


def test_the_metric_is_kept_beside_and_what_is_skipped_stays_so(timed):
    model, data = build("inverted")
    timed(COSTS)
    net = rf.quantize(
        model, data, Int8(skip=("head",)), runtime="openvino", evaluate=lambda n: 1.0, max_drop=0
    )
    assert set(net.quantization.left) == {"head", "depth.0"}
    assert net.quantization.evaluations == 2


def test_kinds_of_layers():
    model, data = build("inverted")
    graph = plain_graph(model, data[0]).graph
    assert _kinds(graph, dict.fromkeys(COSTS, 0.0)) == {
        "convolution of one position": ["gate.1"],
        "pointwise convolution": ["expand.0", "project"],
        "depthwise convolution": ["depth.0"],
        "larger convolution": ["head"],
    }


def test_runtimes_in_which_nothing_is_compared_are_refused():
    model, data = build("mlp")
    with pytest.raises(InputError, match="computes quantized networks in float"):
        rf.quantize(model, data, runtime="eager")
    with pytest.raises(InputError, match="take too long to write"):
        rf.quantize(model, data, runtime="executorch")
    with pytest.raises(InputError, match="onnxruntime"):
        rf.quantize(model, data, runtime="onnxruntim")


@pytest.mark.slow
def test_a_network_is_timed_in_onnxruntime():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8))
    net = rf.quantize(model.eval(), [torch.randn(64, 256)], runtime="onnxruntime")
    assert isinstance(net.served.after, Measurement)
    assert isinstance(net.served.after.latency_ms, Latency)


LAYER, ROWS = torch.nn.Linear(4, 3), torch.randn(8, 4)


@pytest.mark.parametrize(
    ("model", "scheme", "message"),
    [
        (lambda x: x, None, "a function was given"),
        (LAYER, "int8", "it is no scheme"),
        (torch.nn.Linear(4, 3, device="meta"), rf.Half(), "'weight'.*no values"),
        (torch.nn.LazyLinear(3), rf.WeightOnly(method="rtn"), "'weight'.*no values"),
        (rf.quantize(LAYER, [ROWS]), rf.Half(), "quantized already"),
        (rf.quantize(LAYER, [ROWS]), rf.WeightOnly(method="rtn"), "quantized already"),
    ],
)
def test_what_is_no_float_network_or_no_scheme_is_refused(model, scheme, message):
    with pytest.raises(InputError, match=message):
        rf.quantize(model, [ROWS], scheme)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_weights_that_are_no_numbers_are_refused_by_name(bad, activations):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    model[1].weight.data[0, 0] = bad
    with pytest.raises(InputError, match=r"'1\.weight'.*NaN or infinite"):
        rf.quantize(model, [ROWS], Int8(activations=activations))


def test_a_later_batch_on_which_the_network_does_not_run_is_named():
    with pytest.raises(DataError, match="does not run on a batch"):
        rf.quantize(LAYER, [ROWS, torch.randn(8, 5)])


@pytest.mark.parametrize("scheme", [Int8(), rf.WeightOnly(), rf.WeightOnly(method="rtn")])
def test_data_that_can_be_read_only_once_are_refused(scheme):
    data = (x for x in [torch.randn(4, 4)] * 2)
    with pytest.raises(DataError, match=r"a generator can be read only once.*list"):
        rf.quantize(torch.nn.Linear(4, 2), data, scheme)
    assert len(list(data)) == 2
