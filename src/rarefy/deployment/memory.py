"""Peak memory of an exported file, in a process of its own.

What counts is the growth of the resident set from before the file is loaded to its highest, in a
process that has imported the runtime already and that does nothing else: weights in the form that
the runtime keeps, activations, and what the runtime sets up for itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rarefy.batches import map_tensors
from rarefy.errors import RarefyError
from rarefy.types import Inputs

CALLS = 3
"""Calls after which memory grows no more."""

SECONDS = 600
"""Wall time after which the process is given up."""

STATUS = Path("/proc/self/status")
"""Where Linux tells the resident set and its highest."""

RESET = Path("/proc/self/clear_refs")
"""Where Linux is told to forget the highest."""


def peak_mb(path: Path, inputs: Inputs, runtime: str, threads: int) -> float | None:
    """Megabytes (10^6 bytes) that loading and calling a file takes at most.

    Args:
        path: an ONNX, ``.pt2`` or ``.pte`` file.
        inputs: what it is called with.
        runtime: one that serves such files.
        threads: intra-op threads.

    Returns:
        None where the system does not tell it: it is read as Linux tells it.

    Raises:
        RarefyError: the process failed.
    """
    if not STATUS.is_file():
        return None
    with TemporaryDirectory(prefix="rarefy-") as folder:
        given = Path(folder) / "inputs.pt"
        content = BytesIO()  # where a disk is full, PyTorch's writer of files ends the process
        torch.save(map_tensors(lambda t: t.detach().cpu(), inputs), content)
        given.write_bytes(content.getbuffer())
        code = "from rarefy.deployment.memory import report; report()"
        arguments = [str(path.resolve()), str(given), runtime, str(threads)]
        found = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["it was ended"])[-1]
        raise RarefyError(
            f"memory of {path.name!r} in {runtime}",
            f"the process that measures it failed: {last[:300]}",
            "Check that the file runs there, or leave memory out",
        )
    return float(found.stdout.split()[-1]) / 1e6


def report() -> None:
    """In a process of its own: load, call, and print the bytes that this took at most."""
    from rarefy.deployment.executorch_session import load_executorch
    from rarefy.deployment.opening import opened
    from rarefy.deployment.runtimes import load_onnxruntime, load_openvino

    path, given, runtime, threads = sys.argv[1:]
    inputs: Inputs = torch.load(given, weights_only=True)
    loaders = {
        "onnxruntime": load_onnxruntime,
        "openvino": load_openvino,
        "executorch": load_executorch,
    }
    loaders.get(runtime, lambda: None)()
    with suppress(OSError):
        RESET.write_text("5", encoding="ascii")  # forget the highest of the imports
    before = _kilobytes("VmRSS")
    with opened(path, inputs, runtime, int(threads)) as (session, _):
        feed = session.feed(inputs)
        for _ in range(CALLS):
            session.run(feed)
    print(1024 * max(_kilobytes("VmHWM") - before, 0))


def _kilobytes(name: str) -> int:
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
