"""The demo: the main job on scikit-learn's handwritten digits."""

from __future__ import annotations

from pathlib import Path

import torch

from rarefy.batches import seeded
from rarefy.pipeline import Compressed, compress
from rarefy.recipe.options import DistillStage, PruneStage, QuantizeStage, Stages, TrainStage
from rarefy.tasks.vision import digits, resnet20
from rarefy.types import Target

STAGES = Stages(
    train=TrainStage(epochs=8, lr=0.1),
    prune=PruneStage(macs=0.35, round_to=8),
    distill=DistillStage(epochs=4, lr=0.02),
    quantize=QuantizeStage(),
)
TARGET = Target(speedup=2, size=8, max_drop=0.01)


def run(
    out: Path, resume: bool = False, overwrite: bool = False, seed: int = 0, progress: bool = True
) -> Compressed:
    """Train a ResNet-20 on digits, halve it, retrain it as a student, quantize it, measure it.

    Args:
        out: folder of the artifacts and the report.
        resume: continue an interrupted run.
        overwrite: replace an earlier run.
        seed: of the network's initialization, the split and the training.
        progress: show progress.

    Raises:
        MissingExtraError: scikit-learn or the ``onnx`` extra is not installed.
        OutputError: ``out`` cannot be written or holds an earlier run.
    """
    splits = digits()
    with seeded(seed):
        teacher = resnet20(width=24)
    return compress(
        teacher,
        train=splits.train,
        val=splits.val,
        test=splits.test,
        example_inputs=torch.zeros(2, 1, 32, 32),
        target=TARGET,
        stages=STAGES,
        out=out,
        title="ResNet-20 on handwritten digits",
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
