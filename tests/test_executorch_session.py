"""Programs of ExecuTorch in its runtime: what it takes, refuses, and leaves as it was."""

import contextlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.deployment.bench import bench
from rarefy.deployment.executorch_session import ExecuTorchSession, contained, load_executorch
from rarefy.deployment.proof import outputs
from rarefy.errors import FormatError, InputError, MissingExtraError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("executorch", reason="executorch is not installed")
    return rf.export(net, tmp_path_factory.mktemp("executorch") / "net.pte", X)


def pool() -> int:
    module = load_executorch("executorch.extension.pybindings.portable_lib")
    return int(module._threadpool_get_thread_count())


def test_computes_what_the_network_does(net: nn.Module, path: Path) -> None:
    session = ExecuTorchSession(path)
    for count in (4, 1, 3):
        [expected], [found] = outputs(net, X[:count]), session(X[:count])
        torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-5)
    kept = found.clone()
    session(-X)
    assert torch.equal(found, kept)  # the next call overwrites nothing
    assert torch.equal(session.logits(X[:3]), kept)
    assert session.declared == [((4, 6), torch.float32)]
    assert session.version.startswith("executorch 1.")
    session.close()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.cat([X, X]), "maximum capacity"),
        (torch.ones(4, 6, dtype=torch.int64), "expected Float"),
        ((X, X), "number of inputs"),
        (torch.ones(4, 2, 3), "refuses the inputs"),
    ],
)
def test_inputs_of_other_kinds_are_refused(
    inputs: object, message: str, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message):
        rf.measure(path, inputs, runtime="executorch", calls=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", [0.0, 0.1, 0.9])
def test_files_that_are_cut_off_are_refused(
    part: float, path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = path.read_bytes()
    cut = tmp_path / "cut.pte"
    cut.write_bytes(content[: int(part * len(content))])
    with pytest.raises(FormatError, match="executorch cannot load it"):
        rf.measure(cut, X, runtime="executorch")
    assert capfd.readouterr() == ("", "")


def test_what_is_no_file_or_of_another_runtime_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        rf.measure(tmp_path / "absent.pte", X, runtime="executorch")
    with pytest.raises(InputError, match=r"a program of ExecuTorch\. Use 'executorch'"):
        rf.measure(path, X)
    (tmp_path / "net.pt2").write_bytes(b"")
    with pytest.raises(InputError, match=r"a program of torch.export. Use 'eager' or 'compile'"):
        rf.measure(tmp_path / "net.pt2", X, runtime="executorch")


def test_files_and_networks_are_measured_side_by_side(net: nn.Module, path: Path) -> None:
    file, again = rf.measure([path, net], X, runtime="executorch", calls=20)
    assert (file.bytes, file.batch, file.threads) == (path.stat().st_size, 4, 1)
    assert again.share is not None
    [one] = bench([path], runtime="executorch", calls=3).measured
    assert one.batch == 4


def test_threads_are_the_pool_s_while_a_session_is_open(path: Path) -> None:
    before = pool()
    session = ExecuTorchSession(path, threads=before + 1)
    assert pool() == before + 1
    other = ExecuTorchSession(path, threads=before + 1)
    with pytest.raises(InputError, match="has loaded"):
        ExecuTorchSession(path, threads=before)
    other.close()
    session.close()
    assert pool() == before
    for threads in (0, True, 1.5):
        with pytest.raises(InputError, match="threads"):
            ExecuTorchSession(path, threads=threads)


def test_missing_extra_names_its_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rarefy\[executorch\]'"):
        rf.export(nn.Linear(6, 2), tmp_path / "net.pte", X)
    assert not list(tmp_path.iterdir())


def test_imports_leave_filters_environment_and_logging() -> None:
    before = list(warnings.filters), dict(os.environ), list(logging.root.handlers)
    with contextlib.suppress(MissingExtraError):
        load_executorch()
    assert (list(warnings.filters), dict(os.environ), list(logging.root.handlers)) == before


@pytest.mark.slow
def test_the_first_call_of_a_process_prints_nothing(path: Path) -> None:
    code = """
import sys, torch, rarefy as rf
rf.measure(sys.argv[1], torch.ones(4, 6), runtime="executorch", calls=1)
rf.export(torch.nn.Linear(6, 2), sys.argv[1] + ".pte", torch.ones(4, 6))
"""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (found.stdout, found.stderr, found.returncode) == ("", "", 0)


def test_what_is_printed_is_kept_back(capfd: pytest.CaptureFixture[str]) -> None:
    with contained() as said:
        os.write(1, b"below ")
        print("above", file=sys.stderr)
        assert said().split() == ["below", "above"]
        os.write(2, b"after")
    print("behind")
    os.write(2, b"back")
    assert capfd.readouterr() == ("behind\n", "back")


def test_an_error_leaves_no_output_kept_back(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(ZeroDivisionError), contained():
        raise ZeroDivisionError
    os.write(1, b"back")
    assert capfd.readouterr().out == "back"
