"""``rf.compress`` of a trained ResNet on CIFAR-10: pruned, repaired, distilled, quantized, stored.

    python benchmarks/compressed.py --sparsity 0.85 --epochs 6 --augmented --fold

Accuracy and bytes are those of each stage's file, read again; the first line is the size of the
file that ``safetensors`` writes of the float network.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cifar
import torch
from distillation import crop_and_flip
from fine_tuning import Shuffled

import rarefy as rf
from rarefy.recipe import (
    DistillStage,
    PruneStage,
    QuantizeStage,
    RepairStage,
    SparsifyStage,
    Stages,
)
from rarefy.schemes import Int8, WeightOnly


def stages(chosen: argparse.Namespace) -> Stages:
    """What is done, from the arguments."""
    scheme = (
        QuantizeStage(int8=Int8())
        if chosen.bits == 8
        else QuantizeStage(weights=WeightOnly(bits=chosen.bits, fold=chosen.fold))
    )
    sparsify = None if chosen.sparsity is None else SparsifyStage(sparsity=chosen.sparsity)
    whole = PruneStage(macs=1.0)
    narrow = PruneStage(params=chosen.params, criterion=chosen.criterion)
    return Stages(
        prune=whole if chosen.params == 1 else narrow,
        repair=None if chosen.params == 1 else RepairStage(samples=1024),
        sparsify=sparsify,
        distill=DistillStage(epochs=chosen.epochs, lr=chosen.lr, label_weight=chosen.label_weight),
        quantize=scheme,
    )


def main() -> None:
    """Print one row per stage, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--params", type=float, default=1.0, help="share that is kept")
    parser.add_argument("--sparsity", type=float, help="share of the weights set to zero")
    parser.add_argument("--criterion", default="fisher")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--label-weight", type=float, default=0.1)
    parser.add_argument("--augmented", action="store_true", help="shift and mirror the images")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--fold", action="store_true", help="BatchNorms into the layers before")
    parser.add_argument("--images", type=int, help="training images; all if not given")
    parser.add_argument("--test", type=int, help="test images; all if not given")
    chosen = parser.parse_args()

    torch.set_num_threads(1)
    model = cifar.network(chosen.depth)
    x, y = cifar.images("test", chosen.test)
    test = list(zip(x.split(250), y.split(250), strict=True))
    change = crop_and_flip if chosen.augmented else None
    train = Shuffled(*cifar.images("train", chosen.images), 128, change)
    size = cifar.plain_bytes(model)
    with tempfile.TemporaryDirectory() as folder:
        done = rf.compress(
            model,
            train=train,
            val=test,
            example_inputs=x[:2],
            stages=stages(chosen),
            out=Path(folder, "run"),
            progress=False,
        )
        base = rf.evaluate(model, test)
        print(f"ResNet-{chosen.depth}, {len(y)} test images; plain file {size:,} bytes, {base:.2%}")
        print("\n| stage | parameters | bytes | times smaller | top-1 | lost |")
        print("| --- " * 6 + "|")
        for stage in done.report.stages:
            lost = 100 * (base - stage.accuracy)
            print(
                f"| {stage.name} | {stage.params:,} | {stage.bytes:,} | {size / stage.bytes:.1f} | "
                f"{stage.accuracy:.2%} | {lost:+.2f} |"
            )


if __name__ == "__main__":
    main()
