"""ONNX files: small, integer, proven, atomic."""

import copy
import logging
import math
import sys
import warnings
from dataclasses import replace

import onnx
import pytest
import torch
import torchvision
from torch import nn

from quantized_networks import NETWORKS, build
from rarefy.batches import call, take, tensors
from rarefy.deployment import proof as module
from rarefy.deployment.export import export
from rarefy.deployment.runtimes import OnnxSession, openvino_core, optimized_ops
from rarefy.errors import ExportError, InputError, MissingExtraError, OutputError
from rarefy.quantization.affine import sqnr
from rarefy.quantization.quantize import quantize

FLOAT_LAYERS = {"Conv", "FusedConv", "Gemm", "MatMul"}

FUSED = {
    "resnet": {"QLinearConv": 5, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "lenet": {"QLinearConv": 2, "QGemm": 2, "NhwcMaxPool": 2},
    "reused": {"QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "two inputs": {"QLinearConv": 1, "QLinearAdd": 1, "QGemm": 2},
    "fire": {"QLinearConv": 4, "QLinearConcat": 1},
    "inverted": {"QLinearConv": 5, "QLinearAdd": 1},
    "signal": {"QLinearConv": 2, "ConvTranspose": 1},
    "attention": {"QLinearConv": 1, "MatMulIntegerToFloat": 4, "QGemm": 1},
    "mlp": {"QGemm": 3},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_quantized_networks_run_in_integers_at_any_batch_size(name, tmp_path):
    model, data = build(name)
    net = quantize(model, data)
    path = export(net, tmp_path / "net.onnx", take(data[0], 1))
    ops = optimized_ops(path)
    assert {op: ops[op] for op in FUSED[name]} == FUSED[name]
    assert name == "attention" or not FLOAT_LAYERS & ops.keys()
    with torch.no_grad():
        for n in (1, 5):
            given = take(data[1], n)
            for a, b in zip(tensors(call(net, given)), OnnxSession(path)(given), strict=True):
                assert sqnr(a, b) > 25
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)
    model.eval()
    folder = tmp_path_factory.mktemp("resnet18")
    net = quantize(model, [x])
    return export(model, folder / "float.onnx", x), export(net, folder / "int8.onnx", x)


def test_resnet18_is_fused_whole(resnet18):
    ops = optimized_ops(resnet18[1])
    assert ops["QLinearConv"] == 20
    assert ops["QLinearAdd"] == 8
    assert ops["QGemm"] == 1
    assert not FLOAT_LAYERS & ops.keys()


def test_resnet18_file_is_a_quarter_and_holds_no_float_weight(resnet18):
    sizes = [path.stat().st_size for path in resnet18]
    assert sizes[0] / sizes[1] > 3.9
    model = onnx.load(resnet18[1])
    large = [t for t in model.graph.initializer if len(t.dims) > 1]
    assert {t.data_type for t in large} == {onnx.TensorProto.INT8}
    biases = [n.input[2] for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert len(biases) == 21
    made = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert {kinds[made[bias]] for bias in biases} == {onnx.TensorProto.INT32}
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
    onnx.checker.check_model(model)


def test_inputs_outputs_and_the_free_dimension_have_names(tmp_path):
    model, data = build("reused")
    path = export(model, tmp_path / "net.onnx", data[0])
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["x"]
    assert {value.name for value in graph.output} == {"logits", "features"}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_nothing_of_the_caller_changes(tmp_path, capfd):
    model, data = build("lenet")
    model.train()
    before = copy.deepcopy(model.state_dict())
    filters, level = list(warnings.filters), logging.getLogger("torch.onnx").level
    export(model, tmp_path / "net.onnx", data[0])
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert warnings.filters == filters
    assert logging.getLogger("torch.onnx").level == level
    assert capfd.readouterr() == ("", "")


class Head(nn.Module):
    def forward(self, x):
        return torch.igamma(x.abs() + 1, x.abs() + 1)


def test_operator_without_onnx_form_is_named_with_its_module(tmp_path):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4))
    model.add_module("odd", Head())
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path / "net.onnx", torch.randn(2, 4))
    assert "igamma" in str(caught.value)
    assert "'odd'" in str(caught.value)
    assert not list(tmp_path.iterdir())


class Short(nn.Module):
    """A convolution in bfloat16, for which onnxruntime has no kernel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, dtype=torch.bfloat16)

    def forward(self, x):
        return self.conv(x[:, None].to(torch.bfloat16)).float()[:, 0]


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_operator_without_kernel_in_onnxruntime_is_named_with_its_module(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Short()))
    with pytest.raises(ExportError, match=r"module '1\.1\.conv'.*made for aten\.conv1d"):
        export(model, tmp_path / "net.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())
    assert export(model, tmp_path / "net.pt2", torch.randn(2, 4)).is_file()


class Projected(nn.Module):
    """An LSTM that ONNX has no form of, though the exporter writes one."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 6, proj_size=3, batch_first=True)

    def forward(self, x):
        return self.recurrent(x)[0]


def test_operator_that_fails_in_onnxruntime_is_named_with_its_module(tmp_path):
    with pytest.raises(
        ExportError, match=r"module 'recurrent'.*cannot run it.*made for aten\.lstm"
    ):
        export(Projected(), tmp_path / "net.onnx", torch.randn(2, 5, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_module_whose_forward_cannot_be_followed_is_named(suffix, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branch()))
    with pytest.raises(ExportError, match=r"module '1\.1'.*cannot follow.*torch\.where"):
        export(model, tmp_path / f"net.{suffix}", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnx_ir", "onnxruntime"])
def test_missing_extra_names_its_install_line(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rarefy\[onnx\]'"):
        export(nn.Identity(), tmp_path / "net.onnx", torch.randn(2, 4))
    assert export(nn.Identity(), tmp_path / "net.pt2", torch.randn(2, 4)).is_file()


def test_difference_is_reported_and_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"older")
    monkeypatch.setattr(OnnxSession, "run", lambda self, feed: [next(iter(feed.values())) * 1.01])
    with pytest.raises(ExportError, match=r"differ in output 0 by 0\.0\d+ of its largest value"):
        export(nn.Identity(), path, torch.randn(3, 4))
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


SPOILED = {
    "zeros": torch.zeros_like,
    "one example of zeros": lambda y: torch.cat([y[:-1], 0 * y[-1:]]),
    "other classes": lambda y: y.roll(1, 1),
    "other examples": lambda y: y.roll(1, 0),
    "twice": lambda y: 2 * y,
    "scaled": lambda y: 1.4 * y,
    "negated": torch.neg,
    "NaN": lambda y: y * torch.nan,
}


@pytest.mark.parametrize("noise", [None, 1.0])
def test_spoiled_outputs_of_a_quantized_network_are_refused(noise, tmp_path, monkeypatch):
    model, data = build("mlp")
    net = quantize(model, data)
    if noise is not None:  # layers that quantization ruined do not widen the limits to anything
        net.quantization = replace(net.quantization, layers={"0": 20 * math.log10(1 / noise)})
    compare, refused = module._compare, set()

    def compared(where, expected, found, tolerance):
        compare(where, expected, found, tolerance)
        for kind, spoil in SPOILED.items():
            try:
                compare(where, expected, [spoil(y) for y in found], tolerance)
            except ExportError:
                refused.add(kind)

    monkeypatch.setattr(module, "_compare", compared)
    export(net, tmp_path / "net.onnx", data[0])
    assert refused == SPOILED.keys()  # of all examples, or of the first alone


def test_a_quantized_network_whose_file_computes_something_else_is_refused(tmp_path, monkeypatch):
    model, data = build("mlp")
    run = OnnxSession.run
    monkeypatch.setattr(OnnxSession, "run", lambda self, feed: [2 * y for y in run(self, feed)])
    with pytest.raises(ExportError, match="differ in output 0"):
        export(quantize(model, data), tmp_path / "net.onnx", data[0])
    assert not list(tmp_path.iterdir())


def test_what_an_offset_hides_from_the_norm_is_refused():
    a = 1 + 0.06 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    limits = module.QUANTIZED_TOLERANCE
    module._compare("export", [a], [a + 0.005 * a.roll(1, 1)], limits)
    assert module._errors(a.double(), a.roll(1, 1).double())[1] < limits.norm
    with pytest.raises(ExportError, match="correlation"):
        module._compare("export", [a], [a.roll(1, 1)], limits)


def test_the_largest_class_may_change_only_where_it_hardly_leads():
    a = torch.tensor([[0.0, 10.0], [0.0, 10.0], [9.9, 10.0], [10.0, 0.0]])
    limits = module.Tolerance(0.5, 0.1)
    module._compare("export", [a], [a + torch.tensor([0.1, -0.1])], limits)
    b = torch.tensor([[5.0, 5.0], [0.0, 10.0], [9.9, 10.0], [10.0, 0.0]])
    assert module._agreement(a, b, limits) == pytest.approx(2 / 3)


def test_network_that_runs_only_once_is_refused(tmp_path, monkeypatch):
    real, calls = module.outputs, []

    def outputs(model, inputs):
        calls.append(len(inputs))
        if len(inputs) == refused:
            raise RuntimeError("no more")
        return real(model, inputs)

    monkeypatch.setattr(module, "outputs", outputs)
    refused = 3
    with pytest.raises(ExportError, match=r"does not run on the example inputs.*no more"):
        export(nn.Linear(4, 2), tmp_path / "net.onnx", torch.randn(3, 4))
    refused = 1
    export(nn.Linear(4, 2), tmp_path / "net.onnx", torch.randn(3, 4))
    assert calls == [3, 3, 1]


def test_network_that_is_random_in_eval_mode_is_refused(tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(ExportError, match="differ"):
        export(Noisy(), tmp_path / "net.onnx", torch.randn(3, 4))


def test_fixed_batch_is_exported_where_forward_needs_it(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 3, 4).sum(1)

    path = export(Fixed(), tmp_path / "net.onnx", torch.randn(6, 4))
    assert OnnxSession(path)(torch.ones(6, 4))[0].shape == (2, 4)


@pytest.mark.parametrize("model", [None, "net.pt2"])
def test_what_is_no_network_is_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"export\(model\): a .* was given\. Give an nn\.Module"):
        export(model, tmp_path / "net.pt2", torch.randn(2, 4))


def test_place_that_cannot_be_written_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent" / "net.onnx"):
        with pytest.raises(OutputError):
            export(nn.Identity(), path, torch.randn(2, 2))


def test_errors_ignore_equal_infinities():
    a = torch.tensor([1.0, float("inf"), float("nan")], dtype=torch.float64)
    assert module._errors(a, a.clone()) == (0.0, 0.0)


def test_errors_are_relative_to_the_whole_output_however_much_of_it_is_equal():
    a = torch.tensor([3.0, -4.0, 1e-4, float("inf")], dtype=torch.float64)
    b = torch.tensor([3.0, -4.0, 1e-3, float("inf")], dtype=torch.float64)
    largest, norm = module._errors(a, b)
    assert largest == pytest.approx(9e-4 / 4)
    assert norm == pytest.approx(9e-4 / 5)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_an_infinity_or_nan_on_one_side_is_an_error(wrong):
    a, b = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[1.0, wrong]]).double()
    for one, other in ((a, b), (b, a)):
        assert not module._errors(one, other)[0] < 1


def test_tiny_outputs_of_a_quantized_network_are_compared_like_others(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(1e-7)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    assert export(quantize(model, [x]), tmp_path / "net.onnx", x).is_file()


def test_inputs_may_be_views_of_larger_tensors(tmp_path):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert export(nn.Linear(4, 2), tmp_path / "net.onnx", x[:, :4]).is_file()


@pytest.mark.parametrize("split", [False, True])
def test_joined_linear_layers_are_quantized_and_exported(tmp_path, split):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 3)

        def forward(self, x):
            y = torch.cat([self.a(x), self.b(x).relu()], 1)
            return self.o(torch.cat(y.split([5, 7], 1)[::-1], 1) if split else y)

    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    assert export(quantize(Joined(), [x]), tmp_path / "net.onnx", x).is_file()


def test_a_network_in_half_precision_is_held_to_half_precision(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()).half()
    x = torch.randn(16, 64).half()
    path = export(model, tmp_path / "half.onnx", x)
    assert sqnr(model(x).detach(), OnnxSession(path)(x)[0]) > 40


class PerExample(nn.Module):
    """A convolution whose number of groups is the batch, which ONNX cannot leave free."""

    def __init__(self):
        super().__init__()
        self.kernels, self.head = nn.Linear(6, 6 * 9), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        weight = self.kernels(x.mean((2, 3))).view(-1, 1, 3, 3)
        y = nn.functional.conv2d(x.reshape(1, -1, 8, 8), weight, padding=1, groups=len(weight))
        return self.head(y.view(x.shape))


def test_what_onnx_cannot_leave_free_is_written_for_the_batch_given(tmp_path):
    model, x = PerExample(), torch.randn(2, 6, 8, 8)
    path = export(model, tmp_path / "net.onnx", x)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


class Joined(nn.Module):
    """What was pooled beside what a layer made of it, normalized by a norm that only scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.norm = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 8, 1)
        for norm in (self.first, self.norm):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.running_var, 0.01, 1)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem(x), 2)
        return self.head(self.norm(torch.cat([x, self.layer(self.first(x).relu())], 1)).relu())


@pytest.mark.parametrize("seed", range(4))
def test_norms_that_shift_nothing_are_computed_alike(seed, tmp_path):
    pytest.importorskip("openvino")
    torch.manual_seed(seed)
    model, x = Joined().eval(), torch.rand(2, 3, 16, 16)
    small = quantize(model, [torch.rand(24, 3, 16, 16)])
    path = export(small, tmp_path / "net.onnx", x)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(path, "CPU", settings)
    found = torch.from_numpy(compiled([x.numpy()])[compiled.output(0)].copy())
    expected = small(x).detach()
    # a step of the output's 256 or two
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
