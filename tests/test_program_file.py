"""Files of ``torch.export``: any batch, small integer weights, the network's own outputs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy as rf
from quantized_networks import build
from rarefy.batches import call, take, tensors
from rarefy.deployment import program_file
from rarefy.deployment.bench import bench, inputs_of
from rarefy.deployment.opening import opened
from rarefy.deployment.program_file import load_program
from rarefy.errors import ExportError, FormatError, InputError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )


def dtypes(path: Path) -> dict[str, torch.dtype]:
    program = torch.export.load(path)
    return {name: tensor.dtype for name, tensor in program.state_dict.items()}


@pytest.mark.parametrize("name", ["two inputs", "signal", "attention"])
@pytest.mark.parametrize("scheme", [None, rf.Int8(), rf.WeightOnly(bits=4, group=5, method="rtn")])
def test_any_network_at_any_batch_size(name, scheme, tmp_path):
    model, data = build(name)
    net = model if scheme is None else rf.quantize(model, data, scheme)
    path = rf.export(net, tmp_path / "net.pt2", take(data[0], 1))
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        for n in (1, 5):
            given = take(data[1], n)
            for a, b in zip(tensors(call(net, given)), tensors(call(loaded, given)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert list(tmp_path.iterdir()) == [path]


SCHEMES = {
    "int8": (rf.Int8(), torch.int8, 1),
    "int8 alone": (rf.WeightOnly(bits=8, method="rtn"), torch.int8, 1),
    "int4": (rf.WeightOnly(bits=4, method="rtn"), torch.uint8, 1 / 2),
    "int4 in groups": (rf.WeightOnly(bits=4, group=32, method="rtn"), torch.uint8, 1 / 2),
    "int3 in odd groups": (rf.WeightOnly(bits=3, group=7, method="rtn"), torch.uint8, 1 / 2),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_integers_in_the_file(name, tmp_path):
    scheme, dtype, each = SCHEMES[name]
    net = rf.quantize(network(), [X], scheme)
    path = rf.export(net, tmp_path / "net.pt2", X)
    held = torch.export.load(path).state_dict
    codes = {name: tensor for name, tensor in held.items() if name.endswith("_codes")}
    assert len(codes) == 3
    assert {tensor.dtype for tensor in codes.values()} == {dtype}
    padded = {7: 10 * 7 / 64}.get(getattr(scheme, "group", None), 1)
    middle = codes["2.weight_codes"]
    assert middle.nbytes == pytest.approx(64 * 64 * each * padded)
    assert not {name for name in held if name.endswith("weight")}
    with torch.no_grad():
        assert torch.equal(torch.export.load(path).module()(X), net(X))


def test_quantizers_of_weights_are_gone_and_those_of_activations_stay(tmp_path):
    net = rf.quantize(network(), [X], rf.Int8())
    program = torch.export.load(rf.export(net, tmp_path / "net.pt2", X))
    operators = [str(node.target) for node in program.graph.nodes]
    assert not [op for op in operators if "fake_quantize_per_channel" in op]
    assert [op for op in operators if "fake_quantize_per_tensor" in op]


def test_a_weight_that_left_its_grid_stays_in_float(tmp_path):
    net = rf.quantize(network(), None, rf.WeightOnly(bits=8, method="rtn"))
    with torch.no_grad():
        net[2].weight[0, 0] += 1e-3
    held = dtypes(rf.export(net, tmp_path / "net.pt2", X))
    assert held["2.weight"] == torch.float32
    assert held["0.weight_codes"] == torch.int8


def test_shared_weights_and_transposed_axes(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 6, 3)
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.up(self.second(self.first(x)))

    x = torch.randn(2, 4, 8)
    net = rf.quantize(Tied(), None, rf.WeightOnly(bits=4, group=5, method="rtn"))
    path = rf.export(net, tmp_path / "net.pt2", x)
    assert sum(name.endswith("_codes") for name in dtypes(path)) == 2
    with torch.no_grad():
        assert torch.equal(load_program(path)(x), net(x))


def test_pruned_networks_and_graphs(tmp_path):
    pruned = rf.prune(network(), X, rf.Budget(sparsity=0.5))
    graph = rf.load(rf.save(rf.quantize(network(), [X], rf.Int8()), tmp_path / "g.safetensors"))
    for net in (pruned, graph):
        path = rf.export(net, tmp_path / "net.pt2", X)
        with torch.no_grad():
            assert torch.equal(load_program(path)(X[:3]), net(X[:3]))


def test_examples_and_what_lies_beside_a_weight_are_not_in_the_file(tmp_path):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4000, 8)[:3])

        def forward(self, x):
            return x @ self.weight.T

    x = torch.randn(500, 8)
    path = rf.export(Part(), tmp_path / "net.pt2", x)
    assert torch.export.load(path).example_inputs is None
    assert path.stat().st_size < 16_000
    with zipfile.ZipFile(path) as archive:
        assert not [n for n in archive.namelist() if "sample_inputs" in n and archive.read(n)]


def test_other_suffixes_are_refused_and_the_known_ones_named(tmp_path):
    for name in ("net.pth", "net", "net.pt"):
        with pytest.raises(InputError, match=r"\.onnx .* \.pt2 .* \.pte"):
            rf.export(network(), tmp_path / name, X)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_handed_over(tmp_path, monkeypatch):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"older")
    forward = program_file.Program.forward
    monkeypatch.setattr(program_file.Program, "forward", lambda *a, **k: forward(*a, **k) * 1.01)
    with pytest.raises(ExportError, match="differ in output 0"):
        rf.export(network(), path, X)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_of_the_model_changes(tmp_path):
    net = rf.quantize(network(), None, rf.WeightOnly(bits=4, method="rtn")).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    held = dict(net.named_parameters())
    rf.export(net, tmp_path / "net.pt2", X)
    assert net.training
    assert all(dict(net.named_parameters())[name] is tensor for name, tensor in held.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


# --- measuring ---------------------------------------------------------------------------------


class Sum(nn.Module):
    def forward(self, left, right):
        return left + 2 * right


def test_a_file_is_measured_beside_a_network(tmp_path):
    net = network().eval()
    path = rf.export(net, tmp_path / "net.pt2", X)
    data = [(X, net(X).argmax(1))]
    file, same = rf.measure([path, net], X, runtime="eager", calls=5, data=data)
    assert file.accuracy == same.accuracy == 1.0
    assert file.bytes == path.stat().st_size
    assert same.share is not None
    with pytest.raises(InputError, match="Use 'eager' or 'compile'"):
        rf.measure(path, X)
    with opened(path, X, "eager") as (session, _), pytest.raises(InputError, match="does not run"):
        session(torch.ones(2, 9))


@pytest.mark.slow
def test_a_file_is_compiled_and_its_memory_measured(tmp_path):
    net = rf.quantize(network(), None, rf.WeightOnly(bits=4, method="rtn"))
    path = rf.export(net, tmp_path / "net.pt2", X)
    with opened(path, X, "compile") as (session, _):
        torch.testing.assert_close(session(X)[0], net(X), rtol=1e-4, atol=1e-5)
    assert rf.measure(path, X, runtime="eager", calls=2, memory=True).peak_mb > 0


def test_files_side_by_side_on_inputs_of_their_own(tmp_path):
    given = {"left": torch.ones(2, 3), "right": torch.ones(2, 3)}
    named = rf.export(Sum(), tmp_path / "named.pt2", given)
    ordered = rf.export(Sum(), tmp_path / "ordered.pt2", tuple(given.values()))
    assert inputs_of(named, {}).by_name
    assert not inputs_of(ordered, {}).by_name
    shapes = ["left=4x3", "right=4x3"]
    found = bench([named, ordered], runtime="eager", shapes=shapes, calls=3)
    assert [one.batch for one in found.measured] == [4, 4]
    notes = bench([named], runtime="eager", calls=1).notes
    assert any("taken as 1x3" in note for note in notes)
    with pytest.raises(InputError, match="Give a shape that fits"):
        bench([named], runtime="eager", shapes=["left=4x4"], calls=1)


def test_files_that_hold_no_program_are_refused(tmp_path):
    path = tmp_path / "net.pt2"
    with pytest.raises(InputError, match="no such file"):
        load_program(path)
    path.write_bytes(b"no")
    with pytest.raises(FormatError, match="it is no archive"):
        load_program(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"b")
    with pytest.raises(FormatError, match="cannot load it"):
        rf.measure(path, X, runtime="eager")


FULL = """
import resource, signal, sys, torch, rarefy as rf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    rf.export(torch.nn.Linear(64, 64), sys.argv[1], torch.ones(2, 64))
except rf.errors.OutputError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of file sizes")
def test_a_full_disk_ends_neither_the_process_nor_the_older_file(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"older")
    found = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "File too large" in found.stdout
    assert "free space" in found.stdout
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]
