"""Every criterion under one protocol: one-shot pruning, before and after repair, no training.

Scores, repair and accuracy are of the same images for all; the cost of scoring is told as a
multiple of a plain forward and backward pass over the same images, both in turn, medians.

Run it: python benchmarks/criteria.py --depth 56 --macs 0.5
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import cifar
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy as rf
from rarefy.graph.trace import Network
from rarefy.pruning.scoring.compensated import Compensated, respond
from rarefy.pruning.scoring.criteria import CRITERIA, Criterion, needs, scored
from rarefy.pruning.scoring.gather import gather

ALL: Mapping[str, Criterion | Compensated] = {**CRITERIA, "compensated": Compensated()}


def cost(
    model: nn.Module,
    network: Network,
    criterion: Criterion | Compensated,
    data: list[tuple[Tensor, Tensor]],
) -> float:
    """Processor time of scoring over that of training's forward and backward, medians of three."""

    def score() -> None:
        if isinstance(criterion, Compensated):
            respond(model, network, data, criterion)
            return
        evidence = gather(model, network, needs(criterion), data)
        for group in network.groups:
            scored(group, evidence, criterion)

    def plain() -> None:
        for x, y in data:
            loss = F.cross_entropy(model(x), y)
            torch.autograd.grad(loss, list(model.parameters()))

    rounds = [(seconds(score), seconds(plain)) for _ in range(3)]
    first, second = (statistics.median(side) for side in zip(*rounds, strict=True))
    return first / second


def seconds(call: Callable[[], None]) -> float:
    """Processor seconds of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def main() -> None:
    """Print one row per criterion, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument(
        "--samples", type=int, default=1024, help="training images to score and repair"
    )
    parser.add_argument("--timed", type=int, default=256, help="images to time the scoring on")
    parser.add_argument("--criteria", nargs="+", default=list(ALL), choices=list(ALL))
    chosen = parser.parse_args()

    model = cifar.network(chosen.depth)
    x, y = cifar.images("test", chosen.test)
    test = list(zip(x.split(250), y.split(250), strict=True))
    x, y = cifar.images("train", chosen.samples)
    data = list(zip(x.split(64), y.split(64), strict=True))
    timed = data[: max(1, chosen.timed // 64)]
    example = torch.zeros(2, 3, 32, 32)
    network = rf.trace(model, example)
    print(f"ResNet-{chosen.depth}, {len(test) * 250} test images, {len(x)} training images")
    print(f"base {rf.evaluate(model, test):.2%}, {chosen.macs:g} of the MACs kept\n")
    print("| criterion | removed | repaired | scoring over forward-backward |")
    print("| --- | --- | --- | --- |")
    for name in chosen.criteria:
        criterion = ALL[name]
        small = rf.prune(
            model, example, rf.Budget(macs=chosen.macs), criterion=name, data=data, heal=False
        )
        healed = rf.repair(model, small, data, samples=chosen.samples)
        on_data = isinstance(criterion, Compensated) or needs(criterion)
        times = f"{cost(model, network, criterion, timed):.2f}" if on_data else "no data"
        print(
            f"| {name} | {rf.evaluate(small, test):.2%} | {rf.evaluate(healed, test):.2%} "
            f"| {times} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
