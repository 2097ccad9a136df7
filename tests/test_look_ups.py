"""Look-ups in tables of integers: rows are read as integers, in both runtimes, at any size."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import rarefy as rf
from rarefy.deployment.look_ups import look_ups
from rarefy.deployment.runtimes import ExactOnnxSession, OpenVinoSession
from rarefy.errors import InputError

ir = pytest.importorskip("onnx_ir")
ml_dtypes = pytest.importorskip("ml_dtypes")
onnxruntime = pytest.importorskip("onnxruntime")


class Words(nn.Module):
    """Mean of looked-up rows, by a layer that may share the table."""

    def __init__(self, rows=40, columns=16, tied=False, padding=None):
        super().__init__()
        self.table = nn.Embedding(rows, columns, padding_idx=padding)
        self.inner = nn.Linear(columns, columns)
        self.head = nn.Linear(columns, rows, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.table(ids)).relu())
        return out


def stored(path):
    """Elements of the file's initializers, by type."""
    held = onnx.load(path).graph.initializer
    counts: dict[int, int] = {}
    for one in held:
        counts[one.data_type] = counts.get(one.data_type, 0) + int(np.prod(one.dims))
    return counts


SCHEMES = {
    "int8": rf.Int8(),
    "dynamic": rf.Int8(activations="dynamic"),
    "8 bits": rf.WeightOnly(bits=8),
    "8 bits, asymmetric": rf.WeightOnly(bits=8, symmetric=False),
    "4 bits": rf.WeightOnly(bits=4),
    "4 bits, blocks": rf.WeightOnly(bits=4, group=8, symmetric=False),
    "8 bits, blocks": rf.WeightOnly(bits=8, group=8),
}


@pytest.mark.parametrize(
    ("scheme", "tied"),
    [*((scheme, False) for scheme in SCHEMES), ("int8", True), ("4 bits, blocks", True)],
)
def test_no_table_of_real_numbers_is_stored_or_made(scheme, tied, tmp_path):
    model = Words(rows=3000, tied=tied, padding=0).eval()
    ids = torch.randint(3000, (4, 7))
    small = rf.quantize(model, [ids], SCHEMES[scheme])
    path = rf.export(small, tmp_path / "net.onnx", ids)
    assert stored(path).get(TensorProto.FLOAT, 0) < model.table.weight.numel() / 2
    made = {name for node in onnx.load(path).graph.node for name in node.output}
    readers = [node for node in onnx.load(path).graph.node if node.op_type == "Gather"]
    assert readers
    assert not any(node.input[0] in made for node in readers)
    for count in (1, 3):
        expected = small(ids[:count]).detach()
        for session in (ExactOnnxSession(path), OpenVinoSession(path)):
            found = session(ids[:count])[0]
            assert float((found - expected).abs().max()) <= 0.02 * float(expected.abs().max())


def test_a_table_that_a_layer_shares_is_stored_once(tmp_path):
    model, ids = Words(rows=3000, tied=True).eval(), torch.randint(3000, (4, 7))
    path = rf.export(rf.quantize(model, [ids]), tmp_path / "net.onnx", ids)
    assert stored(path)[TensorProto.INT8] < 1.1 * model.table.weight.numel()


def test_a_table_is_stored_once_where_the_layer_reads_it_as_it_is(tmp_path):
    model, ids = Words(rows=3000, tied=True).eval(), torch.randint(3000, (4,))
    path = rf.export(rf.quantize(model, [ids]), tmp_path / "net.onnx", ids)
    assert stored(path)[TensorProto.INT8] < 1.1 * model.table.weight.numel()


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_layer_of_many_outputs_is_stored_in_integers(activations, tmp_path):
    model, x = nn.Linear(8, 20_000).eval(), torch.randn(4, 8)
    small = rf.quantize(model, [x], rf.Int8(activations=activations))
    path = rf.export(small, tmp_path / "net.onnx", x)
    assert stored(path)[TensorProto.INT8] >= model.weight.numel()
    assert stored(path).get(TensorProto.FLOAT, 0) < model.weight.numel()


def test_int8_tables_have_a_scale_per_row():
    model = Words().eval()
    with torch.no_grad():
        model.table.weight[3] *= 100
    small = rf.quantize(model, [torch.randint(40, (8, 5))])
    found = dict(small.named_parameters())["table.weight"]
    error = (found - model.table.weight).abs().amax(1)
    limit = model.table.weight.abs().amax(1) / 127 / 2
    assert bool((error <= limit * 1.001).all())
    assert small.quantization.layers["table"] > 30
    assert "table" not in small.quantization.left


class Scored(Words):
    """A head that multiplies with the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return (self.inner(self.table(ids))[..., None, :] * self.table.weight).sum(-1)


def test_a_table_that_something_reads_in_float_stays_in_float():
    model, ids = Scored().eval(), torch.randint(40, (8, 5))
    small = rf.quantize(model, [ids])
    assert small.quantization.left["table"] == "its weight is read in float elsewhere"
    assert torch.equal(dict(small.named_parameters())["table.weight"], model.table.weight)


def test_a_table_can_be_left_alone_by_name():
    small = rf.quantize(Words().eval(), [torch.randint(40, (8, 5))], rf.Int8(skip=("table",)))
    assert small.quantization.left["table"] == "left in float by choice"


@pytest.mark.parametrize("name", ["table", "head", "hea?"])
def test_a_shared_weight_can_be_left_alone_by_each_of_its_names(name):
    model = Words(tied=True).eval()
    small = rf.quantize(model, [torch.randint(40, (8, 5))], rf.Int8(skip=(name,)))
    assert small.quantization.left == {"table": "left in float by choice"}
    assert sorted(small.quantization.layers) == ["inner"]


def test_sums_of_rows_are_named_and_written_in_float(tmp_path):
    model = nn.Sequential(nn.EmbeddingBag(40, 16), nn.Linear(16, 4)).eval()
    ids = torch.randint(40, (8, 5))
    small = rf.quantize(model, [ids])
    assert small.quantization.left == {"0": "runtimes have no int8 sums of rows"}
    path = rf.export(small, tmp_path / "net.onnx", ids)  # the exporter writes a loop
    torch.testing.assert_close(ExactOnnxSession(path)(ids)[0], small(ids), rtol=1e-4, atol=1e-4)


def test_a_table_that_is_not_finite_is_named():
    model = Words().eval()
    with torch.no_grad():
        model.table.weight[3, 2] = float("nan")
    with pytest.raises(InputError, match=r"table\.weight"):
        rf.quantize(model, [torch.randint(4, 40, (8, 5))])


def test_int8_tables_train_on_their_grid_and_come_back_from_their_file(tmp_path):
    model, ids = Words().eval(), torch.randint(40, (16, 5))
    small = rf.quantize(model, [ids])
    data = [(ids, torch.randint(40, (16, 5)))]
    trained = rf.distill(model, small, data, epochs=2, lr=0.05, progress=False)
    rf.save(trained, tmp_path / "net.safetensors")
    back = rf.load(tmp_path / "net.safetensors")
    assert torch.equal(back(ids), trained(ids))
    assert not torch.equal(trained(ids), small(ids))
    assert rf.export(back, tmp_path / "net.onnx", ids).is_file()


def graph_of(codes, scale, zero, indices, **attributes):
    """A graph that dequantizes a table and looks rows up."""
    given = {"codes": codes, "scale": scale, **({} if zero is None else {"zero": zero})}
    nodes = [
        helper.make_node("DequantizeLinear", [*given], ["table"], **attributes),
        helper.make_node("Gather", ["table", "ids"], ["found"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "look_up",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, indices.shape)],
        [
            helper.make_tensor_value_info(
                "found", TensorProto.FLOAT, (*indices.shape, codes.shape[1])
            )
        ],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(["int8", "uint8", "int4", "uint4"]),
    kind=st.sampled_from(["tensor", "rows", "blocks"]),
    zeros=st.sampled_from(["none", "alike", "each"]),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_dequantized_table(dtype, kind, zeros, seed):
    draw = np.random.default_rng(seed)
    kinds = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}
    low, high = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}[dtype]
    codes = draw.integers(low, high, (6, 8), endpoint=True)
    shape = {"tensor": (), "rows": (6,), "blocks": (6, 2)}[kind]
    scale = draw.uniform(0.1, 2, shape).astype(np.float32)
    zero = draw.integers(low, high, () if zeros == "alike" else shape, endpoint=True)
    zero = np.broadcast_to(zero, shape)
    wide = (
        (lambda held: np.repeat(held, 4, 1))
        if kind == "blocks"
        else (lambda held: held[:, None] if kind == "rows" else held)
    )
    indices = draw.integers(-6, 5, (2, 3))
    shift = 0 if zeros == "none" else wide(zero)
    expected = ((codes - shift) * wide(scale)).astype(np.float32)[indices]
    attributes = {"tensor": {}, "rows": {"axis": 0}, "blocks": {"axis": 1, "block_size": 4}}[kind]
    made = kinds.get(dtype, np.dtype(dtype))
    model = graph_of(
        codes.astype(made),
        scale,
        None if zeros == "none" else zero.astype(made),
        indices,
        **attributes,
    )
    look_ups(model)
    onnx_model = ir.to_proto(model)

    session = onnxruntime.InferenceSession(onnx_model.SerializeToString())
    assert "DequantizeLinear" not in {node.op_type for node in onnx_model.graph.node}
    np.testing.assert_allclose(session.run(None, {"ids": indices})[0], expected, rtol=1e-6)


def test_a_block_that_is_shorter_than_the_others_stays():
    codes, scale = np.ones((6, 8), np.int8), np.ones((6, 3), np.float32)
    model = graph_of(codes, scale, None, np.zeros((2,), np.int64), axis=1, block_size=3)
    look_ups(model)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Gather"]
