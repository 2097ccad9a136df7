"""Files side by side: inputs from what they declare, and what is printed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper, save
from typer.testing import CliRunner, Result

from rarefy.cli import app
from rarefy.deployment.bench import bench, inputs_of
from rarefy.deployment.runtimes import OnnxSession
from rarefy.errors import FormatError, InputError

Sizes = list[int | str]


def write(
    path: Path,
    inputs: dict[str, tuple[int, Sizes]],
    nodes: list[NodeProto],
    **weights: np.ndarray,
) -> None:
    """An ONNX file as any tool may have made it."""
    declared = [helper.make_tensor_value_info(n, *of) for n, of in inputs.items()]
    kind = next(reversed(inputs.values()))[0]
    graph = helper.make_graph(
        nodes,
        "graph",
        declared,
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    save(model, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for name, width in (("small", 8), ("wide", 128)):
        write(
            folder / f"{name}.onnx",
            {"input": (TensorProto.FLOAT, ["batch", 3, 16, 16])},
            [helper.make_node("Conv", ["input", "w"], ["y"])],
            w=np.ones((width, 3, 5, 5), np.float32),
        )
    write(
        folder / "tokens.onnx",
        {
            "ids": (TensorProto.INT64, ["batch", 7]),
            "mask": (TensorProto.BOOL, ["batch", 7]),
            "scale": (TensorProto.FLOAT, ["batch", 7]),
        },
        [
            helper.make_node("Gather", ["table", "ids"], ["row"]),
            helper.make_node("Where", ["mask", "row", "scale"], ["y"]),
        ],
        table=np.arange(5, dtype=np.float32),
    )
    (folder / "no.onnx").write_bytes(b"no")
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def test_inputs_are_what_the_file_declares(folder: Path) -> None:
    made = inputs_of(folder / "tokens.onnx", {})
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in made.tensors.items()}
    assert shapes == {
        "ids": (torch.int64, (1, 7)),
        "mask": (torch.bool, (1, 7)),
        "scale": (torch.float32, (1, 7)),
    }
    assert "ids is batchx7; taken as 1x7" in made.notes
    assert OnnxSession(folder / "tokens.onnx")(made.tensors)[0].tolist() == [[1.0] * 7]
    wanted = inputs_of(folder / "small.onnx", {"": (4, 3, 16, 16)})
    assert tuple(wanted.tensors["input"].shape) == (4, 3, 16, 16)
    assert not wanted.notes
    assert np.unique(wanted.tensors["input"].numpy()).size > 1000


def test_a_wider_file_is_slower_and_larger(folder: Path) -> None:
    small, wide = bench([folder / "small.onnx", folder / "wide.onnx"], calls=60).measured
    assert wide.share.low > 1
    assert wide.bytes > small.bytes
    assert small.batch == 1


def test_files_with_inputs_of_their_own(folder: Path) -> None:
    shapes = ["ids=3x7", "mask=3,7", "scale=3x7"]
    found = bench([folder / "small.onnx", folder / "tokens.onnx"], shapes=shapes, calls=3)
    assert [one.batch for one in found.measured] == [1, 3]
    assert all(note.startswith("small.onnx: ") for note in found.notes)


def test_the_command_prints_a_table_or_json(folder: Path) -> None:
    files = (folder / "small.onnx", folder / "wide.onnx")
    table = invoke(*files, "--calls", 20, "--shape", "2x3x16x16")
    assert table.exit_code == 0, table.output
    assert all(text in table.stdout for text in ("small.onnx", "wide.onnx", "onnxruntime 1."))
    found = invoke(*files, "--calls", 20, "--json")
    held = json.loads(found.stdout)
    assert [Path(row["path"]).name for row in held["measured"]] == ["small.onnx", "wide.onnx"]
    assert held["measured"][1]["share"]["value"] > 1
    assert held["measured"][0]["throughput"] > 0
    assert "taken as 1x3x16x16" in held["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["absent.onnx"], "there is no such file"),
        (["no.onnx"], "is no ONNX file"),
        (["small.onnx", "--runtime", "openvin"], "mean 'openvino'"),
        (["small.onnx", "--runtime", "eager"], "is taken for an ONNX file"),
        (["small.onnx", "--shape", "2xthree"], "it is no shape"),
        (["small.onnx", "--shape", "0x3x16x16"], "it is no shape"),
        (["small.onnx", "--shape", "1x4x16x16"], "is batchx3x16x16"),
        (["small.onnx", "--shape", "x=1x3x16x16"], "The inputs are input"),
        (["tokens.onnx", "--shape", "1x7"], "has the inputs ids, mask, scale"),
    ],
)
def test_errors_say_what_is_wrong(folder: Path, arguments: list[str], expected: str) -> None:
    found = invoke(folder / arguments[0], *arguments[1:])
    assert found.exit_code in (1, 2)
    assert expected in found.stderr
    assert "Traceback" not in found.output


def test_inputs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    inputs: dict[str, tuple[int, Sizes]] = {"t": (TensorProto.STRING, [1])}
    write(tmp_path / "t.onnx", inputs, [helper.make_node("Identity", ["t"], ["y"])])
    with pytest.raises(FormatError, match="no tensor of numbers"):
        inputs_of(tmp_path / "t.onnx", {})
    with pytest.raises(InputError):
        bench([])
