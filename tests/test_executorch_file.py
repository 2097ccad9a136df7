"""Files of ExecuTorch: proven, small, and in integers where the network is."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy as rf
from quantized_networks import NETWORKS, build
from rarefy.batches import call, map_tensors, tensors
from rarefy.deployment import executorch_file as module
from rarefy.deployment.executorch_file import ExecuTorchFile
from rarefy.deployment.executorch_session import ExecuTorchSession
from rarefy.deployment.proof import outputs
from rarefy.errors import ExportError

pytest.importorskip("executorch", reason="executorch is not installed")

SLOW = [pytest.param(name, marks=() if name == "lenet" else pytest.mark.slow) for name in NETWORKS]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ExecuTorchFile]:
    """The files that are written in a test, as they were made."""
    found: list[ExecuTorchFile] = []
    save = ExecuTorchFile.save

    def noted(self: ExecuTorchFile, path: Path) -> None:
        found.append(self)
        save(self, path)

    monkeypatch.setattr(ExecuTorchFile, "save", noted)
    return found


def layers(file: ExecuTorchFile) -> tuple[list[bool], list[str]]:
    """For each layer in XNNPACK whether its weight is int8, and the layers outside of it."""
    graph = file.edge.exported_program().graph_module
    inside = [child.original_module for _, child in graph.named_children()]
    calls = [node for part in inside for node in part.graph.nodes if is_layer(node)]
    integer = ["dequantize_per_channel" in str(node.args[1].target) for node in calls]
    return integer, [str(node.target) for node in graph.graph.nodes if is_layer(node)]


def is_layer(node: torch.fx.Node) -> bool:
    names = ("aten.convolution", "aten.linear", "aten.addmm", "aten.mm")
    return node.op == "call_function" and any(name in str(node.target) for name in names)


@pytest.mark.parametrize("scheme", [None, rf.Int8()], ids=["float", "int8"])
@pytest.mark.parametrize("name", SLOW)
def test_networks_run_at_any_batch_up_to_the_examples(
    name: str, scheme: rf.Int8 | None, made: list[ExecuTorchFile], tmp_path: Path
) -> None:
    model, data = build(name)
    net = model if scheme is None else rf.quantize(model, data, scheme)
    path = rf.export(net, tmp_path / "net.pte", data[0])
    session = ExecuTorchSession(path, None)
    for count in (16, 3, 1):
        given = map_tensors(lambda t, n=count: t[:n], data[0])
        with torch.no_grad():
            pairs = zip(tensors(call(net, given)), session(given), strict=True)
        for expected, found in pairs:
            assert float((expected - found).norm() / expected.norm()) < (0.05 if scheme else 1e-5)
    session.close()
    integer, outside = layers(made[0])
    assert not outside
    if scheme is not None:
        assert sum(integer) >= len(net.quantization.layers)  # one may be called twice
        assert integer.count(False) == (name == "signal")  # its transposed convolution


def test_a_file_in_integers_is_a_quarter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 256, 3), nn.ReLU(), nn.Conv2d(256, 128, 3)).eval()
    x = torch.randn(4, 8, 6, 6)
    sizes = [
        rf.export(one, tmp_path / "net.pte", x).stat().st_size
        for one in (net, rf.quantize(net, [x], rf.Int8()))
    ]
    assert 3.8 < sizes[0] / sizes[1] < 4


def test_a_fixed_batch_is_written_where_forward_needs_it(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, 6) * 2

    x = torch.randn(4, 2, 3)
    session = ExecuTorchSession(rf.export(Fixed(), tmp_path / "net.pte", x), None)
    assert torch.equal(session(x)[0], x.reshape(4, 6) * 2)
    session.close()


@pytest.mark.parametrize("graph", [False, True])
def test_operator_without_kernel_is_named_with_its_module(graph: bool, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.lgamma(x)

    net = nn.ModuleDict({"body": nn.Linear(6, 4), "odd": Odd()})
    net.forward = lambda x: net["odd"](net["body"](x))  # type: ignore[method-assign]
    x = torch.randn(4, 6)
    given = rf.quantize(net, [x], rf.Int8()) if graph else net
    with pytest.raises(ExportError, match=r"module 'odd'.*aten::lgamma.out"):
        rf.export(given, tmp_path / "net.pte", x)
    assert not list(tmp_path.iterdir())


def test_operator_that_fails_is_named_with_its_module(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    with pytest.raises(ExportError, match=r"module '0'.* in operator aten::convolution\.out"):
        rf.export(net, tmp_path / "net.pte", torch.randn(2, 1, 4, 5, 5))
    assert not list(tmp_path.iterdir())


def test_control_flow_on_values_is_refused(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="cannot follow its forward"):
        rf.export(Branch(), tmp_path / "net.pte", torch.randn(4, 6))
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pte"
    path.write_bytes(b"older")
    run = ExecuTorchSession.run
    monkeypatch.setattr(module.ExecuTorchSession, "run", lambda *a: [1.01 * t for t in run(*a)])
    with pytest.raises(ExportError, match="differ in output 0"):
        rf.export(nn.Linear(6, 4), path, torch.randn(4, 6))
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["net.pte"]


def test_nothing_of_the_model_changes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    x, before, state = torch.randn(4, 6), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    expected = outputs(net, x)[0]
    rf.export(net, tmp_path / "net.pte", {"input": x})
    assert net.training
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs(net, x)[0], expected)
    assert capfd.readouterr() == ("", "")


def test_weights_that_were_rounded_alone_are_floats(tmp_path: Path) -> None:
    x = torch.randn(4, 64)
    net = nn.Linear(64, 256).eval()
    small = rf.quantize(net, None, rf.WeightOnly(bits=8, method="rtn"))
    path = rf.export(small, tmp_path / "net.pte", x)
    assert path.stat().st_size > 64 * 256 * 4
