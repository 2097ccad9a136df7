"""CPU time and memory of the analysis, beside that of Torch-Pruning's dependency graph.

    python benchmarks/speed.py > benchmarks/speed.md

Every network is built and analysed in a process of its own, on one thread. Seconds are CPU seconds
of the process; memory is the peak above what was held before the analysis began. ``capture`` is
:func:`rarefy.graph.capture.capture` (of which ``torch.export`` is nearly all), ``coupling`` is the
walk over the graph with the resolution of what goes together and its grouping. Torch-Pruning's
graph (``DependencyGraph().build_dependency``) is given 90 seconds; it runs the network, so that it
cannot analyse one that holds no values.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

LIMIT = 90
"""Seconds after which an analysis is given up."""

NETWORKS = (
    "resnet50",
    "resnet152",
    "densenet201",
    "swin_b",
    "vit_l_16",
    "Llama decoder, 32 layers of 4096",
)


def build(name: str) -> tuple[Any, Any]:
    """A network with random weights and its inputs; the decoder on the meta device."""
    import torch

    if name.startswith("Llama"):
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.device("meta"):
            config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, use_cache=False)
            return LlamaForCausalLM(config), {"input_ids": torch.zeros(2, 13, dtype=torch.long)}
    import torchvision

    return getattr(torchvision.models, name)().eval(), torch.rand(2, 3, 224, 224)


def rarefy(model: Any, inputs: Any) -> dict[str, float]:
    """Seconds of the parts of :func:`rarefy.trace`."""
    import rarefy.graph.trace as stages
    from rarefy.graph.capture import capture

    start = time.process_time()
    captured = capture(model, inputs)
    middle = time.process_time()
    stages.capture = lambda model, inputs: captured
    network = stages.trace(model, inputs)
    end = time.process_time()
    units = sum(map(len, network.groups))
    return {"capture": middle - start, "coupling": end - middle, "units": units}


def torch_pruning(model: Any, inputs: Any) -> dict[str, float]:
    """Seconds of Torch-Pruning's dependency graph."""
    import torch_pruning

    start = time.process_time()
    torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
    return {"graph": time.process_time() - start}


TOOLS: dict[str, Callable[[Any, Any], dict[str, float]]] = {
    "rarefy": rarefy,
    "Torch-Pruning": torch_pruning,
}


def peak() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(tool: str, name: str) -> dict[str, float]:
    """One analysis in this process, after a first one that loads what is loaded once."""
    import torch

    torch.set_num_threads(1)
    model, inputs = build(name)
    warm = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    TOOLS[tool](warm, torch.rand(2, 4))
    before = peak()
    found = TOOLS[tool](model, inputs)
    return found | {"memory": peak() - before}


def run(tool: str, name: str) -> dict[str, float] | str:
    """One analysis in a process of its own, or why there is none."""
    command = [sys.executable, __file__, tool, name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return f"over {LIMIT} s"
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1].partition(":")[0].rpartition(".")[2]
        return f"fails ({error})"
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str) -> str:
    """One line of the table."""
    own, other = run("rarefy", name), run("Torch-Pruning", name)
    if isinstance(own, str):
        first = [own, "", "", ""]
    else:
        first = [f"{own['units']:,}", f"{own['capture']:.1f}", f"{own['coupling']:.2f}"]
        first.append(f"{own['memory']:.0f}")
    second = [other, ""] if isinstance(other, str) else [f"{other['graph']:.1f}"]
    if not isinstance(other, str):
        second.append(f"{other['memory']:.0f}")
    return f"| {' | '.join([name, *first, *second])} |"


def main() -> None:
    """Print the table in Markdown."""
    import torch

    print("# Speed of the analysis\n")
    print("    python benchmarks/speed.py > benchmarks/speed.md\n")
    print(
        f"PyTorch {torch.__version__}, one thread of {platform.machine()}; load of the "
        f"machine at the beginning: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores. "
        "CPU seconds, and MB above the model; see the head of the script for what they are.\n"
    )
    print("| network | units | capture, s | coupling, s | MB | Torch-Pruning, s | MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in NETWORKS:
        print(row(name), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
