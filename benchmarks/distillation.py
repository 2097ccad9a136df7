"""Accuracy of a small student under every way to teach it, torchdistill's losses beside.

Run it: python benchmarks/distillation.py --epochs 12 --seeds 3

The teacher is a pretrained ResNet-56 whose soft labels are stored once, with as many augmented
views as epochs that they are cycled over. Students of about 80,000 parameters, a ResNet-8 from
scratch and a network cut from the teacher, learn on the first images of CIFAR-10 with one optimizer
and one schedule. Accuracy is that of the last epoch on all test images. Where torchdistill is
installed, its losses train the same student in the same loop. ``--speed`` tells instead how long an
epoch takes with the live teacher and with the store, what reading the store takes of it, and how
long writing the store takes beside the teacher's plain inference on the same batches.
"""

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cifar
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from turns import in_turn

import rarefy as rf
from rarefy.distillation.losses import AT, CRD, DIST, DKD, KD, SP, FitNet, Loss, Standardized
from rarefy.training.stored import Joined

OPTIONS: Mapping[str, Any] = {"lr": 0.1, "weight_decay": 5e-4, "progress": False}


def crop_and_flip(image: Tensor) -> Tensor:
    """An image (3, 32, 32), shifted by up to four pixels either way and mirrored at random."""
    down, right = torch.randint(9, (2,)).tolist()
    moved = nn.functional.pad(image, (4, 4, 4, 4))[:, down : down + 32, right : right + 32]
    return moved.flip(-1) if torch.rand(()) < 0.5 else moved


def scratch(_: nn.Module, seed: int) -> nn.Module:
    """A ResNet-8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cifar.CifarResNet(1)


def cut(teacher: nn.Module, _: int) -> nn.Module:
    """A third of the teacher's blocks, narrower, of as many parameters as a ResNet-8."""
    size = sum(p.numel() for p in cifar.CifarResNet(1).parameters())
    share = size / sum(p.numel() for p in teacher.parameters())
    return rf.student(teacher, torch.zeros(2, 3, 32, 32), depth=1 / 3, params=share)


STUDENTS: Mapping[str, Callable[[nn.Module, int], nn.Module]] = {
    "ResNet-8": scratch,
    "cut from the teacher": cut,
}

STANDARDIZED = 9
"""The weight that its authors give to the loss of standardized logits."""

PEER = "torchdistill"

LOSSES: Mapping[str, Callable[[], Any]] = {
    "none": lambda: None,
    "KD": lambda: KD(4),
    "DKD": lambda: DKD(temperature=4),
    "DIST": lambda: DIST(),
    "standardized KD": lambda: STANDARDIZED * Standardized(KD(2)),
    "KD + AT": lambda: KD(4) + 100 * AT().at("layer3"),
    "KD + SP": lambda: KD(4) + 100 * SP().at("layer3"),
    "KD + FitNet": lambda: KD(4) + FitNet().at("layer3"),
    "KD + CRD": lambda: KD(4) + 0.5 * CRD().at("layer3"),
}
"""Name to the loss against the teacher; half the weight is that of the labels."""


@dataclass(frozen=True)
class Theirs(Loss):
    """A loss of torchdistill, called as its training boxes call it.

    Attributes:
        module: reads logits at the path ``"."`` of both networks.
        mixes: whether it adds the loss against the labels itself.
    """

    against = "teacher"
    needs_labels = True

    module: Any
    mixes: bool = False

    def __call__(self, logits: Any, reference: Any, mask: Any = None, labels: Any = None) -> Tensor:
        """The loss of student logits against the teacher's, both (B, C), a scalar."""
        outputs = ({".": {"output": logits}}, {".": {"output": reference}})
        value: Tensor = self.module(*outputs, targets=labels)
        return value


def peers() -> dict[str, Callable[[], Any]]:
    """torchdistill's KD, DIST and standardized KD, where it is installed.

    Both of its KD losses mix in the labels themselves, with the same share as ours; DIST is mixed
    with them by the loop, as ours is.
    """
    try:
        from torchdistill.losses.mid_level import DISTLoss, KDLoss, LogitStdKDLoss
    except ImportError:
        return {}
    paths = {f"{side}_module_path": "." for side in ("student", "teacher")}
    paths |= {f"{side}_module_io": "output" for side in ("student", "teacher")}
    return {
        f"{PEER}, KD": lambda: Theirs(KDLoss(temperature=4, alpha=0.5, **paths), mixes=True),
        f"{PEER}, DIST": lambda: Theirs(DISTLoss(**paths)),
        f"{PEER}, standardized KD": lambda: Theirs(
            LogitStdKDLoss(temperature=2, alpha=0.5, beta=0.5 * STANDARDIZED, **paths),
            mixes=True,
        ),
    }


def loader(count: int, seed: int) -> DataLoader[Any]:
    """Augmented training batches whose every view can be repeated."""
    x, y = cifar.images("train", count)
    data = rf.soft_labels.Replay(TensorDataset(x, y), crop_and_flip, seed=0)
    order = torch.Generator().manual_seed(seed)
    return DataLoader(data, 128, shuffle=True, generator=order, drop_last=True)


def trained(
    teacher: nn.Module, store: str, student: nn.Module, loss: Any, chosen: Any, seed: int
) -> nn.Module:
    """The student after training; features need the live teacher, outputs the store alone."""
    data = loader(chosen.images, seed)
    given = {**OPTIONS, "epochs": chosen.epochs, "seed": seed}
    if loss is None:
        return rf.train(student, data, **given)
    features = getattr(loss, "terms", ()) and any(t.against == "features" for _, t in loss.terms)
    source = teacher if features else rf.SoftLabels(store)
    share = 0.0 if getattr(loss, "mixes", False) else 0.5
    return rf.distill(source, student, data, loss=loss, label_weight=share, **given)


def accuracy(teacher: nn.Module, store: str, chosen: Any) -> None:
    """Print one row per student and loss."""
    x, y = cifar.images("test", chosen.test)
    test = list(zip(x.split(250), y.split(250), strict=True))
    print(f"teacher {rf.evaluate(teacher, test):.2%}, {len(y)} test images\n")
    print("| student | parameters | loss | top-1 | each seed |\n" + "| --- " * 5 + "|", flush=True)
    losses = {**LOSSES, **peers()}
    for name in chosen.students:
        for kind in chosen.losses or losses:
            found = []
            for seed in range(chosen.seeds):
                student = STUDENTS[name](teacher, seed)
                learned = trained(teacher, store, student, losses[kind](), chosen, seed)
                found.append(rf.evaluate(learned, test))
            each = " ".join(f"{100 * value:.2f}" for value in found)
            size = sum(p.numel() for p in student.parameters())
            mean = statistics.mean(found)
            print(f"| {name} | {size:,} | {kind} | {mean:.2%} | {each} |", flush=True)


def inference(teacher: nn.Module, data: Iterable[Any]) -> None:
    """The teacher on all batches, nothing kept."""
    with torch.inference_mode():
        for x, _ in data:
            teacher(x)


def speed(teacher: nn.Module, store: str, chosen: Any) -> None:
    """Print what an epoch takes with the live teacher and with the store, and writing the store."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = cifar.CifarResNet(3)
    data, options = loader(chosen.images, 0), {**OPTIONS, "epochs": 1}
    labels = rf.SoftLabels(store)
    live, stored, joined, plain = in_turn(
        lambda: rf.distill(teacher, student, data, **options),
        lambda: rf.distill(labels, student, data, **options),
        lambda: deque(Joined(labels, data), maxlen=0),
        lambda: deque(data, maxlen=0),
        rounds=3,
    )
    print(f"an epoch of ResNet-20: {live:.1f} s live, {stored:.1f} s stored, {live / stored:.2f}x")
    print(f"reading the store: {max(joined - plain, 0) / stored:.2%} of an epoch")

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            rf.write_soft_labels(teacher, data, folder, views=1)

    alone, written = in_turn(lambda: inference(teacher, data), write, rounds=3)
    print(f"plain inference: {alone:.1f} s, with writing {written:.1f} s: {alone / written:.1%}")


def main() -> None:
    """Store the soft labels, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--test", type=int, help="test images; all if not given")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--losses", nargs="+", help="some of them; all if not given")
    parser.add_argument("--speed", action="store_true", help="time an epoch instead")
    chosen = parser.parse_args()

    teacher = cifar.network(56)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        views = 1 if chosen.speed else chosen.views
        store = rf.write_soft_labels(teacher, loader(chosen.images, 0), folder, views=views)
        print(f"stored {store.rows:,} answers in {time.perf_counter() - begin:.0f} s")
        (speed if chosen.speed else accuracy)(teacher, folder, chosen)


if __name__ == "__main__":
    main()
