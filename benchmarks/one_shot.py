"""Accuracy after pruning without any training: removed, repaired, quantized.

Run it: python benchmarks/one_shot.py --depth 56 --macs 0.5 0.7
"""

import argparse
import time

import cifar
import torch

import rarefy as rf
from rarefy.graph.count import count


def main() -> None:
    """Print one row per share of the MACs, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--samples", type=int, default=1024, help="unlabelled images for repair")
    chosen = parser.parse_args()

    model = cifar.network(chosen.depth)
    x, y = cifar.images("test", chosen.test)
    test = list(zip(x.split(250), y.split(250), strict=True))
    calibration = [cifar.images("train", chosen.samples)[0]]
    example = torch.zeros(2, 3, 32, 32)
    whole = count(model, example).macs
    print(f"ResNet-{chosen.depth}, {len(y)} test images, {chosen.samples} unlabelled images")
    print(f"base {rf.evaluate(model, test):.2%}\n")
    print("| MACs kept | removed | repaired | int8 | prune s | repair s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for share in chosen.macs:
        begin = time.perf_counter()
        small = rf.prune(model, example, rf.Budget(macs=share))
        pruned = time.perf_counter()
        healed = rf.repair(model, small, calibration, samples=chosen.samples)
        done = time.perf_counter()
        int8 = rf.quantize(healed, calibration)
        print(
            f"| {count(small, example).macs / whole:.3f} | {rf.evaluate(small, test):.2%} "
            f"| {rf.evaluate(healed, test):.2%} | {rf.evaluate(int8, test):.2%} "
            f"| {pruned - begin:.1f} | {done - pruned:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
