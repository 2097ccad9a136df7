"""What the figures of a run were measured with: versions and hardware."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from rarefy import __version__
from rarefy.types import Measurement


def environment(measured: Sequence[Measurement] = ()) -> dict[str, str]:
    """Versions and hardware, as they stand in a report.

    Args:
        measured: the measurements that the report's latencies are of, made side by side.

    Example:
        >>> "torch" in environment()
        True
    """
    facts = {
        "rarefy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("onnx", "onnxruntime", "openvino", "executorch")},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": str(os.cpu_count() or "unknown"),
        "training threads": str(torch.get_num_threads()),
        "latency": "; ".join(dict.fromkeys(map(_conditions, measured))),
        "order of calls": "each file in turn" if len(measured) > 1 else "",
    }
    return {name: value for name, value in facts.items() if value}


def _conditions(made: Measurement) -> str:
    threads = "1 thread" if made.threads == 1 else f"{made.threads} threads"
    return f"{made.runtime}, {threads}, batch {made.batch}, {made.calls} calls of each file"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The name of the processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
