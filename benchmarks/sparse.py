"""Accuracy with most weights at zero, without any training: magnitude, Wanda, SparseGPT.

Each is shown as it is and with BatchNorm statistics taken anew. That helps magnitude, whose outputs
shrank by accident, and harms reconstruction: least squares lets an output shrink by as much as the
inputs that are left cannot explain of it, and new statistics scale what is left of it up again.

Run it: python benchmarks/sparse.py --depth 20 --test 2000 --seeds 3
"""

import argparse
import copy
import time
from itertools import product

import cifar
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.pruning.sparsity.elements import ELEMENT_CRITERIA


def reestimated(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose BatchNorm statistics are the means over these images."""
    fresh = copy.deepcopy(model)
    norms = [m for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
    fresh.train()
    with torch.no_grad():
        for part in x.split(128):
            fresh(part)
    return fresh.eval()


def main() -> None:
    """Print one row per structure, scope and criterion, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--samples", type=int, default=512, help="unlabelled images")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the unlabelled images")
    parser.add_argument("--targets", nargs="+", default=["0.8", "0.9", "0.95", "2:4"])
    parser.add_argument("--scopes", nargs="+", default=["local", "global"])
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    chosen = parser.parse_args()

    model = cifar.network(chosen.depth)
    x, y = cifar.images("test", chosen.test)
    test = list(zip(x.split(250), y.split(250), strict=True))
    train = cifar.images("train", chosen.seeds * chosen.samples)[0].split(chosen.samples)
    example = torch.zeros(2, 3, 32, 32)
    print(f"ResNet-{chosen.depth}, {len(y)} test images, {chosen.samples} unlabelled images,")
    print(f"draws: {chosen.seeds}, base {rf.evaluate(model, test):.2%}\n")
    print("| zeros | scope | criterion | accuracy | with BatchNorm re-estimated | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for target, scope, criterion in product(chosen.targets, chosen.scopes, chosen.criteria):
        if ":" in target and scope != chosen.scopes[0]:
            continue  # N:M has no scope
        structure, budget = target, None
        if ":" not in target:
            structure, budget = "weight", rf.Budget(sparsity=float(target), scope=scope)
        plain, fresh, seconds = [], [], 0.0
        for images in train:
            asks = getattr(ELEMENT_CRITERIA[criterion], "needs", True)
            data = images.split(128) if asks else None
            begin = time.perf_counter()
            sparse = rf.prune(
                model, example, budget, structure=structure, criterion=criterion, data=data
            )
            seconds += time.perf_counter() - begin
            plain.append(rf.evaluate(sparse, test))
            fresh.append(rf.evaluate(reestimated(sparse, images), test))
        means = [sum(values) / len(values) for values in (plain, fresh)]
        print(
            f"| {target} | {'' if ':' in target else scope} | {criterion} | {means[0]:.2%} "
            f"| {means[1]:.2%} | {seconds / len(train):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
