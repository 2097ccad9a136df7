"""What the figures of a run were measured with: versions and hardware."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from rarefy import __version__


def environment() -> dict[str, str]:
    """Versions and hardware, as they stand in a report.

    Example:
        >>> "torch" in environment()
        True
    """
    facts = {
        "rarefy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("onnx", "onnxruntime")},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count() or "unknown"),
        "training threads": str(torch.get_num_threads()),
        "latency": "onnxruntime, 1 thread, batch 1, interleaved",
    }
    return {name: value for name, value in facts.items() if value}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
