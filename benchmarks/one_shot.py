"""Accuracy after pruning without labels or gradient steps, Torch-Pruning beside.

Run it: python benchmarks/one_shot.py --depth 56 --macs 0.5 0.7 --draws 3

Every method gets the same unlabelled images of a draw, and is shown as it leaves the network, with
BatchNorm statistics estimated anew on these images, and, where it is rarefy's, repaired by least
squares, with and without new statistics. Torch-Pruning prunes globally by L2 magnitude, with its
normalization by the mean, once everything but the classifier and once, as its authors do for
residual networks by hand, the inner channels of the blocks alone.
"""

import argparse
import copy
import resource
import time
from collections.abc import Callable, Mapping
from functools import partial

import cifar
import peers
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.graph.count import count

EXAMPLE = torch.zeros(2, 3, 32, 32)
Method = Callable[[nn.Module, float, Tensor], nn.Module]
"""(network, share of the MACs, images) -> smaller network."""


def by_criterion(criterion: str, model: nn.Module, share: float, images: Tensor) -> nn.Module:
    """rarefy, with one criterion, not repaired."""
    options = {"data": [images]} if criterion == "compensated" else {}
    budget = rf.Budget(macs=share)
    return rf.prune(model, EXAMPLE, budget, criterion=criterion, heal=False, **options)


def torch_pruning(model: nn.Module, share: float, images: Tensor, *, inner: bool) -> nn.Module:
    """Torch-Pruning, iterated to the share of the MACs."""
    return peers.torch_pruning(model, EXAMPLE, share, cifar.kept_whole(model, inner=inner))


METHODS: Mapping[str, Method] = {
    "rarefy, compensated": partial(by_criterion, "compensated"),
    "rarefy, magnitude": partial(by_criterion, "magnitude"),
    "Torch-Pruning": partial(torch_pruning, inner=False),
    "Torch-Pruning, inner channels": partial(torch_pruning, inner=True),
}


def fresh_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose BatchNorm statistics are those of these images."""
    found = copy.deepcopy(model)
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    found.train()
    with torch.no_grad():
        for part in images.split(256):
            found(part)
    return found.eval()


def main() -> None:
    """Print one row per method, share and draw, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--samples", type=int, default=1024, help="unlabelled images")
    parser.add_argument("--draws", type=int, default=1, help="disjoint sets of these")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repaired-only", action="store_true")
    chosen = parser.parse_args()

    model = cifar.network(chosen.depth)
    x, y = cifar.images("test", chosen.test)
    test = list(zip(x.split(250), y.split(250), strict=True))
    train = cifar.images("train", chosen.samples * chosen.draws)[0]
    whole = count(model, EXAMPLE).macs
    print(f"ResNet-{chosen.depth}, {len(y)} test images, {chosen.samples} unlabelled images")
    print(f"unpruned {rf.evaluate(model, test):.2%}\n")
    print("| method | draw | MACs kept | removed | + statistics | repaired | + statistics ", end="")
    print("| prune s | repair s | peak MB |\n" + "| --- " * 10 + "|", flush=True)
    for draw, images in enumerate(train.split(chosen.samples)):
        for share in chosen.macs:
            for name in chosen.methods:
                begin = time.perf_counter()
                small = METHODS[name](model, share, images)
                pruned = time.perf_counter()
                cells = ["", "", "", ""]
                if not chosen.repaired_only:
                    cells[0] = f"{rf.evaluate(small, test):.2%}"
                    cells[1] = f"{rf.evaluate(fresh_statistics(small, images), test):.2%}"
                seconds = ""
                if name.startswith("rarefy"):
                    again = time.perf_counter()
                    healed = rf.repair(model, small, [images], samples=chosen.samples)
                    seconds = f"{time.perf_counter() - again:.0f}"
                    cells[2] = f"{rf.evaluate(healed, test):.2%}"
                    if not chosen.repaired_only:
                        cells[3] = f"{rf.evaluate(fresh_statistics(healed, images), test):.2%}"
                kept = count(small, EXAMPLE).macs / whole
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
                print(
                    f"| {name} | {draw} | {kept:.3f} | {' | '.join(cells)} | {pruned - begin:.0f} "
                    f"| {seconds} | {peak} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
