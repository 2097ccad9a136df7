"""Time and peak memory of ``repair``, each case in a process of its own.

Run it: python benchmarks/repair_memory.py --depth 56 --samples 1024

The process holds the network, what was made of it and the images before; what counts is how far
its resident memory rises above that, sampled every few milliseconds while the repair runs.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cifar
import torch
from torch import Tensor, nn

import rarefy as rf

EXAMPLE = torch.zeros(2, 3, 32, 32)
INTERVAL = 0.005
"""Seconds between two looks at the resident memory."""

CASES: Mapping[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "half the MACs": lambda model, images: rf.prune(model, EXAMPLE, rf.Budget(macs=0.5)),
    "90 % zeros": lambda model, images: rf.prune(
        model, EXAMPLE, rf.Budget(sparsity=0.9), structure="weight"
    ),
    "2:4": lambda model, images: rf.prune(model, EXAMPLE, structure="2:4"),
    "int8": lambda model, images: rf.quantize(model, [images[:256]]),
}
"""What is repaired, made without the images that it is repaired with where that can be."""


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak(threading.Thread):
    """The highest resident memory between entering and leaving."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = resident()
        self._stop_now = threading.Event()

    def run(self) -> None:
        """Look at it until told to stop."""
        while not self._stop_now.wait(INTERVAL):
            self.highest = max(self.highest, resident())

    def __enter__(self) -> "Peak":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        self.join()


def measure(depth: int, samples: int, test: int, case: str) -> str:
    """One row of the table."""
    imported = resident()
    model = cifar.network(depth)
    images = cifar.images("train", samples)[0]
    small = CASES[case](model, images)
    before = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    with Peak() as peak:
        healed = rf.repair(model, small, [images], samples=samples)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    accuracies = ["", ""]
    if test:
        x, y = cifar.images("test", test)
        shown = list(zip(x.split(250), y.split(250), strict=True))
        accuracies = [f"{rf.evaluate(network, shown):.2%}" for network in (small, healed)]
    used = healed.repaired.samples
    rises = f"{peak.highest - before:.0f} | {peak.highest - imported:.0f}"
    return f"| {case} | {used} | {' | '.join(accuracies)} | {cpu:.0f} | {wall:.0f} | {rises} |"


def main() -> None:
    """Print one row per case, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=56, choices=(20, 56))
    parser.add_argument("--samples", type=int, default=1024, help="unlabelled images")
    parser.add_argument("--test", type=int, default=1000, help="test images; 0 for none")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--here", action="store_true", help="measure one case in this process")
    chosen = parser.parse_args()
    if chosen.here:
        print(measure(chosen.depth, chosen.samples, chosen.test, chosen.cases[0]))
        return
    print(f"ResNet-{chosen.depth}, {torch.get_num_threads()} threads, MB = 10^6 bytes\n")
    print("| case | images | as it was | repaired | CPU s | wall s ", end="")
    print("| peak MB above what was held | peak MB above the imports |")
    print("| --- " * 8 + "|", flush=True)
    for case in chosen.cases:
        options = ["--depth", str(chosen.depth), "--samples", str(chosen.samples)]
        options += ["--test", str(chosen.test), "--here", "--cases", case]
        subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
