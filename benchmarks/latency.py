"""Budgets of latency: what was asked for, and what an independent measurement finds afterwards.

Run it: python benchmarks/latency.py --runtimes onnxruntime openvino --shares 0.7 0.5

Networks have random weights, which serve for time. Each is pruned to a share of its latency in a
runtime; then the original and the result are exported anew and called in turn, one thread, and the
share of the processor's time is printed with its 95 % interval, beside what is left of the MACs. A
budget that is out of reach is an error of ``prune``, which the row shows.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping

import cifar
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.errors import RarefyError
from rarefy.graph.count import count

SIDE = 160
"""Pixels of the images for torchvision's networks."""


def _of_torchvision(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    def made() -> tuple[nn.Module, Tensor]:
        try:
            import torchvision
        except ImportError:
            sys.exit("skipped: pip install torchvision")
        size = {"image_size": SIDE} if name.startswith("vit") else {}
        model = torchvision.models.get_model(name, weights=None, **size)
        return model.eval(), torch.randn(1, 3, SIDE, SIDE)

    return made


NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet56 (CIFAR)": lambda: (cifar.CifarResNet(9).eval(), torch.randn(1, 3, 32, 32)),
    **{
        n: _of_torchvision(n)
        for n in ("resnet18", "mobilenet_v2", "vit_b_32", "shufflenet_v2_x1_0")
    },
}


def row(name: str, runtime: str, share: float, structure: tuple[str, ...]) -> str:
    """One budget."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    head = f"| {name} | {runtime} | {' and '.join(structure)} | {share:g} |"
    begin = time.perf_counter()
    budget = rf.Budget(latency=share)
    try:
        small = rf.prune(model, x, budget, runtime=runtime, structure=structure)
    except RarefyError as error:
        return f"{head} {str(error)[:120]} | | |"
    seconds = time.perf_counter() - begin
    _, found = rf.measure([model, small], x, runtime=runtime)
    ratio = found.share
    macs = count(small, x).macs / count(model, x).macs
    measured = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    return f"{head} {measured} | {macs:.3f} | {seconds:.0f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--structure", nargs="+", default=["channel"])
    chosen = parser.parse_args()
    print("| network | runtime | structure | latency asked | latency found | MACs left | s |")
    print("| --- " * 7 + "|", flush=True)
    for name in chosen.networks:
        for runtime in chosen.runtimes:
            for share in chosen.shares:
                print(row(name, runtime, share, tuple(chosen.structure)), flush=True)


if __name__ == "__main__":
    main()
