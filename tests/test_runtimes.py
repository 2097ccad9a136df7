"""All runtimes behind one small contract."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rarefy.deployment import modules, runtimes
from rarefy.deployment.export import export
from rarefy.deployment.modules import CompiledSession, EagerSession
from rarefy.deployment.opening import opened
from rarefy.deployment.runtimes import (
    RUNTIMES,
    OnnxSession,
    OpenVinoSession,
    optimized_ops,
    runtime_named,
)
from rarefy.errors import FormatError, InputError, MissingExtraError
from tiny_networks import perceptron

torch.set_num_threads(1)
openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
FILES = [OnnxSession, pytest.param(OpenVinoSession, marks=openvino)]
ALL = [
    "onnxruntime",
    pytest.param("openvino", marks=openvino),
    "eager",
    pytest.param("compile", marks=pytest.mark.slow),
]
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Sum(nn.Module):
    def forward(self, left, right):
        return left + 2 * right


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "sum.onnx"
    return export(Sum(), path, {"left": torch.ones(2, 3), "right": torch.ones(2, 3)})


@pytest.mark.parametrize("kind", FILES)
def test_takes_all_forms_of_inputs(kind, path):
    session = kind(path)
    left, right = torch.ones(4, 3), torch.arange(12.0).reshape(4, 3)
    assert session.inputs == ("left", "right")
    for inputs in ((left, right), {"right": right, "left": left}):
        [result] = session(inputs)
        assert torch.equal(result, left + 2 * right)


@pytest.mark.parametrize("kind", FILES)
def test_wrong_inputs_and_files_are_refused(kind, path, tmp_path):
    session = kind(path)
    with pytest.raises(InputError, match="inputs were given"):
        session(torch.ones(2, 3))
    with pytest.raises(InputError, match="refuses"):
        session((torch.ones(2, 4), torch.ones(2, 3)))
    with pytest.raises(InputError, match="refuses"):
        session((torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)))
    with pytest.raises(InputError, match="no such file"):
        kind(tmp_path / "absent.onnx")
    for threads in (0, True, 1.5):
        with pytest.raises(InputError, match="threads"):
            kind(path, threads=threads)
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    with pytest.raises(FormatError, match=f"{kind.name} cannot load"):
        kind(tmp_path / "broken.onnx")


@pytest.mark.parametrize("name", ALL)
def test_every_runtime_computes_what_pytorch_does(name):
    model = perceptron().train()
    before = torch.get_num_threads()
    with opened(model, X, name) as (session, file):
        assert (file is None) == (RUNTIMES[name].serves == "module")
        feed = session.feed(X)
        session.run(feed)
        (found,) = session(X)
        kept = found.clone()
        session(-X)
        assert torch.equal(found, kept)  # the next call overwrites nothing
        assert torch.equal(session.logits(X), kept)
        assert name in session.version
    assert model.training
    assert torch.get_num_threads() == before
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("openvino", marks=openvino), "eager"])
def test_every_runtime_refuses_wrong_inputs(name):
    with opened(perceptron(), X, name) as (session, _), pytest.raises(InputError, match=name):
        session(torch.ones(4, 9))


def test_threads_of_pytorch_are_set_while_a_session_is_open():
    session = EagerSession(perceptron(), threads=2)
    assert torch.get_num_threads() == 2
    session.close()
    session.close()
    assert torch.get_num_threads() == 1


def test_what_a_runtime_does_not_serve_is_refused(path):
    for what, name, message in [
        (path, "eager", "is taken for an ONNX file. Use 'onnxruntime' or 'openvino'"),
        (len, "onnxruntime", "neither"),
        (perceptron(), "openvno", "mean 'openvino'"),
        (perceptron(), "tensorrt", "Use one of onnxruntime, openvino, eager, compile"),
    ]:
        with pytest.raises(InputError, match=message), opened(what, X, name):
            pass
    with pytest.raises(InputError):
        runtime_named(None)


InvalidCxxCompiler = type("InvalidCxxCompiler", (RuntimeError,), {})  # as PyTorch names it


def test_a_missing_compiler_is_named(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("backend") from InvalidCxxCompiler("no g++")

    monkeypatch.setattr(modules.torch, "compile", lambda *_, **__: fails)
    session = CompiledSession(perceptron())
    with pytest.raises(InputError, match=r"no C\+\+ compiler"):
        session.feed(X)
    session.close()


@pytest.mark.slow
def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        session = CompiledSession(nn.Sequential(nn.Linear(8, 8), nn.Softsign()))
        with pytest.raises(InputError, match=r"no C\+\+ compiler"):
            session.feed(X)
        session.close()


@openvino
def test_openvino_reports_nothing_and_writes_nothing(path, tmp_path):
    code = (
        "import sys; from rarefy.deployment.runtimes import OpenVinoSession; import torch;"
        f"OpenVinoSession({str(path)!r})((torch.ones(2, 3), torch.ones(2, 3)));"
        "sys.exit('openvino_telemetry' in sys.modules)"
    )
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **home}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not [file for file in Path(tmp_path).rglob("*") if "intel" in file.parts]


SIGNALS = """
import os, signal, sys, torch
from rarefy.deployment.runtimes import OpenVinoSession
noted = []
signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
for turn in range(2):
    one, other = OpenVinoSession(sys.argv[1]), OpenVinoSession(sys.argv[1])
    del one
    del other
    os.kill(os.getpid(), signal.SIGTERM)
print(len(noted))
"""


@openvino
@pytest.mark.skipif(os.name == "nt", reason="no process can send itself a signal there")
def test_signals_reach_a_process_that_closed_sessions(path):
    found = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SIGNALS, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (found.returncode, found.stdout) == (0, "2\n"), found.stderr


def test_optimized_ops(path):
    assert sum(optimized_ops(path).values()) == 2


@pytest.mark.parametrize(
    ("name", "extra"), [("onnx", "onnx"), ("onnxruntime", "onnx"), ("openvino", "openvino")]
)
def test_missing_extra_names_its_install_line(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'rarefy\[{extra}\]'"):
        getattr(runtimes, f"load_{name}")()


def test_importing_loads_nothing_optional():
    code = (
        "import sys, rarefy.deployment.export, rarefy.deployment.measure, "
        "rarefy.quantization.quantize; "
        "late = {'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir', 'openvino'}; "
        "sys.exit(bool(late & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
