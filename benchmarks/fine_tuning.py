"""Accuracy after pruning and an equal budget of training, Torch-Pruning beside.

Run it: python benchmarks/fine_tuning.py --subject resnet20 --macs 0.5 0.33 --epochs 1 3 --seeds 3

Every method starts from the same trained network, keeps the same share of its multiply-accumulates,
and is then trained with the same optimizer, learning rate, batches and number of epochs: on the
labels alone, or, where rarefy pruned it, on soft labels, too, which are stored once for images: the
original's, or those of a larger ResNet (``--teacher 56``). With ``--tuned`` the teacher is trained
first, as long, on the labels and the same images, as the small network is (``alike``) or by SGD
whose rate ends at zero (``plain``): work beside that on the small network, once for all of them.
With ``--mirrored`` it is asked of an image and its mirror image, and images are mirrored at random.
With ``--shifted`` a network that learns sees them shifted at random; its teacher was asked of them
in their place, or, with ``--replayed``, of the very images that it sees, anew in every epoch. With
``--norms`` the statistics of BatchNorm are estimated anew after training, on images as they are
(Izmailov et al. 2018 do so for averaged weights).
``unpruned`` is the original itself, trained as long on the labels.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import cifar
import peers
import speech
import text
import torch
from distillation import crop_and_flip
from muon import Muon
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import rarefy as rf
from rarefy.graph.count import count

SAMPLES = 1024
"""Unlabelled training examples that pruning and repair see."""


@dataclass(frozen=True)
class Shuffled:
    """Labelled batches in a new order at every reading, each example changed anew."""

    x: Tensor
    y: Tensor
    batch: int = 128
    change: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x))[: len(self) * self.batch]
        for part in order.split(self.batch):
            x = self.x[part]
            yield (x if self.change is None else torch.stack([*map(self.change, x)])), self.y[part]


@dataclass(frozen=True)
class Subject:
    """A trained network, its data, and how to train it on.

    Attributes:
        model: the network.
        train: labelled batches.
        teacher: soft labels of these batches: stored, or the network itself.
        test: labelled batches.
        unlabelled: examples that pruning and repair see.
        options: of the optimizer.
        wrap: what is trained, of a network: itself, or one that changes the inputs before.
        norms: batches that statistics of BatchNorms are estimated on after training; none to
            leave them.
        whole: layers that Torch-Pruning leaves alone.
        whole_inner: those where only the inner channels of residual blocks are to go.
    """

    model: nn.Module
    train: Any
    teacher: Any
    test: list[tuple[Tensor, Tensor]]
    unlabelled: Tensor
    options: Mapping[str, Any]
    whole: Sequence[str]
    whole_inner: Sequence[str]
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net
    norms: Sequence[Tensor] = ()
    example: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", self.unlabelled[:2])


def _resnet(depth: int, chosen: argparse.Namespace, folder: str) -> Subject:
    model = cifar.network(depth)
    x, y = cifar.images("train")
    held_x, held_y = cifar.images("test", chosen.test)
    whole, whole_inner = (cifar.kept_whole(model, inner=inner) for inner in (False, True))
    test = list(zip(held_x.split(250), held_y.split(250), strict=True))
    plain = {"lr": 0.02, "weight_decay": 5e-4}
    options = {**plain, "ema": chosen.ema, "min_lr_rate": chosen.min_lr_rate}
    options["optimizer"] = Muon if chosen.muon else "sgd"
    change, views = same, 1
    if chosen.augmented:
        change, views = crop_and_flip, max(chosen.epochs)
    elif chosen.mirrored:
        change, views = flip, 2
    data = rf.soft_labels.Replay(TensorDataset(x, y), change, seed=0)
    batches = DataLoader(data, 128, shuffle=True, drop_last=True)
    wrap = partial(Shifted, most=chosen.shifted)
    norms = x[: chosen.norms].split(500) if chosen.norms else ()
    peer = (whole, whole_inner)
    subject = Subject(model, batches, model, test, x[:SAMPLES], options, *peer, wrap, norms)
    if "soft labels" in chosen.targets:
        tutor = cifar.network(chosen.teacher) if chosen.teacher else model
        if chosen.tuned:
            before, kept = rf.evaluate(tutor, test), {"checkpoint": f"{folder}/teacher"}
            first = subject if chosen.tuned == "alike" else replace(subject, options=plain)
            tutor = learned(first, tutor, max(chosen.epochs), 0, resume=True, **kept)
            print(f"teacher: {before:.2%}, trained {rf.evaluate(tutor, test):.2%}", flush=True)
        tutor = Mirrored(tutor) if chosen.mirrored else tutor
        if chosen.replayed:
            move, views = partial(moved, most=chosen.shifted), max(chosen.epochs)
            data = rf.soft_labels.Replay(TensorDataset(x, y), move, seed=0)
            batches = DataLoader(data, 128, shuffle=True, drop_last=True)
            subject = replace(subject, train=batches, wrap=partial(Shifted, most=0))
        rf.write_soft_labels(tutor, batches, f"{folder}/labels", views=views)
        subject = replace(subject, teacher=rf.SoftLabels(f"{folder}/labels"))
    return subject


def same(image: Tensor) -> Tensor:
    """The image as it is."""
    return image


def flip(image: Tensor) -> Tensor:
    """The image, mirrored at random."""
    return image.flip(-1) if torch.rand(()) < 0.5 else image


def moved(image: Tensor, most: int) -> Tensor:
    """The image (C, H, W), shifted by up to ``most`` pixels either way, and mirrored, at random."""
    height, width = image.shape[1:]
    down, right = torch.randint(2 * most + 1, (2,)).tolist()
    padded = nn.functional.pad(image[None], (most,) * 4, mode="reflect")[0]
    return flip(padded[:, down : down + height, right : right + width])


class Mirrored(nn.Module):
    """The mean of what a network says of an image and of its mirror image."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (B, 3, H, W)."""
        mean: Tensor = (self.net(x) + self.net(x.flip(-1))) / 2
        return mean


class Shifted(nn.Module):
    """A network that sees images shifted by up to ``most`` pixels either way while it learns."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (B, C, H, W), each shifted by itself, its border reflected."""
        if self.training and self.most:
            images, _, height, width = x.shape
            padded = nn.functional.pad(x, (self.most,) * 4, mode="reflect")
            down, right = torch.randint(2 * self.most + 1, (2, images, 1))
            rows = (down + torch.arange(height))[:, :, None]
            columns = (right + torch.arange(width))[:, None, :]
            each = torch.arange(images)[:, None, None]
            x = padded.permute(0, 2, 3, 1)[each, rows, columns].permute(0, 3, 1, 2).contiguous()
        logits: Tensor = self.net(x)
        return logits


def _trained(model: nn.Module, parts: Any, last: str, epochs: int) -> Subject:
    (x, y), (held_x, held_y) = parts
    options = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    data = Shuffled(x, y, 64)
    model = rf.train(model, data, epochs=epochs, progress=False, **options)
    test = list(zip(held_x.split(250), held_y.split(250), strict=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return Subject(model, data, model, test, x[order], {**options, "lr": 5e-4}, [last], [last])


SUBJECTS: Mapping[str, Callable[[argparse.Namespace, str], Subject]] = {
    "resnet20": partial(_resnet, 20),
    "resnet56": partial(_resnet, 56),
    "speech": lambda *_: _trained(speech.network(), speech.digits(), "17", 20),
    "text": lambda *_: _trained(text.Transformer(), text.sentences(), "head", 20),
}


def by_rarefy(criterion: str, subject: Subject, share: float, *, inner: bool = False) -> nn.Module:
    """rarefy, repaired."""
    data = [subject.unlabelled]
    given = {} if criterion == "magnitude" else {"data": data}
    small = rf.prune(
        subject.model,
        subject.example,
        rf.Budget(macs=share),
        criterion=criterion,
        heal=False,
        exclude=list(subject.whole_inner) if inner else [],
        **given,
    )
    return rf.repair(subject.model, small, data, samples=SAMPLES)


def by_torch_pruning(subject: Subject, share: float, *, inner: bool) -> nn.Module:
    """Torch-Pruning, iterated to the share of the MACs."""
    whole = subject.whole_inner if inner else subject.whole
    return peers.torch_pruning(subject.model, subject.example, share, whole)


Method = Callable[[Subject, float], nn.Module]

METHODS: Mapping[str, Method] = {
    "rarefy, fisher": partial(by_rarefy, "fisher"),
    "rarefy, compensated": partial(by_rarefy, "compensated"),
    "rarefy, compensated, inner channels": partial(by_rarefy, "compensated", inner=True),
    "rarefy, magnitude": partial(by_rarefy, "magnitude"),
    "Torch-Pruning": partial(by_torch_pruning, inner=False),
    "Torch-Pruning, inner channels": partial(by_torch_pruning, inner=True),
}


def learned(
    subject: Subject, net: nn.Module, epochs: int, seed: int, label_weight: float = 1, **kept: Any
) -> nn.Module:
    """The network after that many epochs; with all weight on the labels, no teacher is asked."""
    options = {**subject.options, **kept, "epochs": epochs, "seed": seed, "progress": False}
    if label_weight < 1:
        options["label_weight"] = label_weight
        net = rf.distill(subject.teacher, subject.wrap(net), subject.train, **options)
    else:
        net = rf.train(subject.wrap(net), subject.train, **options)
    if subject.norms:
        update_bn(subject.norms, net.net)
    return net


def row(name: str, targets: str, share: float, epochs: int, found: list[float]) -> str:
    """A row of the table: the mean, and every seed."""
    each = " ".join(f"{100 * value:.2f}" for value in found)
    mean = statistics.mean(found)
    return f"| {name} | {targets} | {share:.3f} | {epochs} | {mean:.2%} | {each} |"


def table(subject: Subject, chosen: argparse.Namespace) -> None:
    """Print a row for each."""
    whole, seeds = count(subject.model, subject.example).macs, range(chosen.seeds)
    base = rf.evaluate(subject.model, subject.test)
    print(f"{chosen.subject}: {sum(len(y) for _, y in subject.test)} test examples", end="")
    print(f", unpruned {base:.2%}\n\n| method | targets | MACs kept | epochs | top-1 | each seed |")
    print("| --- " * 6 + "|", flush=True)
    for epochs in chosen.epochs if "unpruned" in chosen.methods else ():
        nets = (learned(subject, subject.model, epochs, seed) for seed in seeds)
        kept = [rf.evaluate(net, subject.test) for net in nets]
        print(row("unpruned", "labels", 1.0, epochs, kept), flush=True)
    for share in chosen.macs:
        for name in (method for method in chosen.methods if method in METHODS):
            try:
                small = METHODS[name](subject, share)
                left = count(small, subject.example).macs / whole
                print(row(name, "none", left, 0, [rf.evaluate(small, subject.test)]), flush=True)
            except Exception as error:  # noqa: BLE001 - a peer may raise anything
                print(f"| {name} | none | {share:g} | fails: {str(error)[:80]} | | |", flush=True)
                continue
            for targets in chosen.targets if name.startswith("rarefy") else ["labels"]:
                for epochs in chosen.epochs:
                    weight = chosen.label_weight if targets == "soft labels" else 1
                    nets = (learned(subject, small, epochs, seed, weight) for seed in seeds)
                    found = [rf.evaluate(net, subject.test) for net in nets]
                    print(row(name, targets, left, epochs, found), flush=True)


def main() -> None:
    """Print one row per method, share and number of epochs, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", choices=list(SUBJECTS), default="resnet20")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--teacher", type=int, help="depth of a ResNet to learn from; own if none")
    parser.add_argument("--label-weight", type=float, default=0.1, help="beside soft labels")
    parser.add_argument("--augmented", action="store_true", help="shift and mirror the images")
    parser.add_argument(
        "--tuned", nargs="?", const="alike", choices=("alike", "plain"), help="train it first"
    )
    parser.add_argument(
        "--mirrored", action="store_true", help="images at random; the teacher sees both"
    )
    parser.add_argument("--shifted", type=int, default=0, help="images, by up to so many pixels")
    parser.add_argument(
        "--replayed", action="store_true", help="soft labels of the images that are seen"
    )
    parser.add_argument("--muon", action="store_true", help="instead of SGD, on images")
    parser.add_argument("--min-lr-rate", type=float, default=0.0, help="where it ends, on images")
    parser.add_argument("--norms", type=int, default=0, help="images for BatchNorms, at the end")
    parser.add_argument("--ema", type=float, help="decay of averaged weights, on images")
    parser.add_argument("--folder", help="where teacher and soft labels stay for other runs")
    parser.add_argument("--test", type=int, help="test images; all if not given")
    methods = ["unpruned", *METHODS]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--targets", nargs="+", default=["labels", "soft labels"])
    chosen = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        table(SUBJECTS[chosen.subject](chosen, chosen.folder or folder), chosen)


if __name__ == "__main__":
    main()
