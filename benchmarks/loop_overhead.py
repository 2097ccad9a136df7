"""What rarefy's training loop costs beside a bare PyTorch loop that does the same.

Both train a ResNet-20 on random images with SGD, momentum, decay, a cosine of the learning rate and
the mean loss of the epoch. They run in turn in one process, a short training each, which of the two
comes first alternating; the time of a step is taken between the calls of the loss, so that setting
up does not count. Printed are the medians over all steps, and their ratio.

    python benchmarks/loop_overhead.py [--rounds 20] [--steps 12] [--batch 16]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cifar import CifarResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rarefy as rf
from rarefy.training.options import TrainOptions, optimizer_of, schedule_of

OPTIONS = TrainOptions(epochs=1, lr=0.01)

Loss = Callable[[Tensor, Tensor], Tensor]


class Clock:
    """Cross entropy that notes when it is called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return F.cross_entropy(logits, labels)

    def steps(self) -> list[float]:
        """Seconds of every step but the first, which is from one loss to the next."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def bare(model: nn.Module, data: DataLoader[tuple[Tensor, ...]], loss: Loss) -> float:
    """The loop that one writes by hand."""
    model = copy.deepcopy(model).train()
    optimizer, schedule = optimizer_of(model, OPTIONS), schedule_of(OPTIONS, len(data))
    total = 0.0
    for step, (x, y) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS.lr * schedule(step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        total += value.item()
    return total / len(data)


def ours(model: nn.Module, data: DataLoader[tuple[Tensor, ...]], loss: Loss) -> float:
    """The same by rarefy."""
    found = rf.train(model, data, loss=loss, options=OPTIONS, progress=False)
    mean: float = found.trained.epochs[0].loss
    return mean


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CifarResNet(3)
    n = asked.steps * asked.batch
    data = DataLoader(
        TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))), asked.batch
    )
    loops = {"bare": bare, "rarefy": ours}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    ratios = []
    for turn in range(asked.rounds + 1):
        means, medians = {}, {}
        for name in sorted(loops, reverse=bool(turn % 2)):
            clock = Clock()
            means[name] = loops[name](model, data, clock)
            if turn:  # the first round warms up
                seconds[name] += clock.steps()
                medians[name] = statistics.median(clock.steps())
        if abs(means["bare"] - means["rarefy"]) > 1e-4:
            raise SystemExit(f"the loops differ: {means}")
        if turn:
            ratios.append(medians["rarefy"] / medians["bare"])
    found = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in found.items():
        print(f"{name:8} {1000 * median:8.2f} ms a step, median of {len(seconds[name])}")
    print(f"overhead {found['rarefy'] / found['bare'] - 1:+.1%} (ratio of the medians)")
    print(f"         {statistics.median(ratios) - 1:+.1%} (median over rounds of their ratio)")


if __name__ == "__main__":
    main()
