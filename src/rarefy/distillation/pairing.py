"""Which features of a student go with which of its teacher, where nobody names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from rarefy.batches import call, evaluating, seeded
from rarefy.distillation.losses import layer_map
from rarefy.errors import InputError
from rarefy.graph.model import GraphModel
from rarefy.paths import unwrapped
from rarefy.types import Inputs


@dataclass(frozen=True)
class Pair:
    """A module of the student and the one of the teacher whose output it is to match.

    Attributes:
        student, teacher: paths of the modules.
        student_shape, teacher_shape: of their outputs on the batch that was looked at.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.student} {self.student_shape} <- {self.teacher} {self.teacher_shape}"


@dataclass(frozen=True)
class Output:
    """What a module returned: one tensor.

    Attributes:
        path: of the module.
        shape: of the tensor.
        kind: what consecutive layers of a stack have in common besides the shape: their class.
        whole: whether the module is made of others.
    """

    path: str
    shape: tuple[int, ...]
    kind: object
    whole: bool


def pairs(student: nn.Module, teacher: nn.Module, inputs: Inputs) -> tuple[Pair, ...]:
    """Pair the features of two networks by where they are.

    In transformers, and other stacks of equal layers that give sequences (B, L, C), the layers are
    paired evenly, see :func:`~rarefy.losses.layer_map`; the last go together. In convolutional
    networks the stages are: the last output (B, C, H, W) before the height or width changes. Stages
    of equal size are paired; where none are equal, they go together evenly as layers do.

    Args:
        student: the network that learns; it is run once in eval mode and not changed.
        teacher: the network that it learns from, likewise.
        inputs: of one batch.

    Raises:
        InputError: a network has neither layers nor stages that can be told, or the two are of
            different kinds.

    Example:
        >>> import torch
        >>> def net(c):
        ...     return nn.Sequential(nn.Conv2d(3, c, 3), nn.MaxPool2d(2), nn.Conv2d(c, 8, 3))
        >>> for pair in pairs(net(4), net(16), torch.zeros(1, 3, 16, 16)):
        ...     print(pair)
        0 (1, 4, 14, 14) <- 0 (1, 16, 14, 14)
        1 (1, 4, 7, 7) <- 1 (1, 16, 7, 7)
        2 (1, 8, 5, 5) <- 2 (1, 8, 5, 5)
    """
    ours, theirs = outputs(student, inputs), outputs(teacher, inputs)
    layers = stack(ours), stack(theirs)
    if all(layers):
        return tuple(_evenly(*layers))
    found = stages(ours), stages(theirs)
    if all(found):
        return tuple(_by_size(*found))
    raise InputError(
        "pairs(student, teacher)",
        "no layers of a transformer and no stages of maps were found in both networks",
        "Name the features to compare, for example loss=KD() + FitNet().at('layer2', 'layer4')",
    )


def outputs(model: nn.Module, inputs: Inputs) -> list[Output]:
    """The outputs of all modules that run once, as they are done: those inside of one before it.

    Left out are modules that return no single tensor first, and outputs that are overwritten.
    """
    network = unwrapped(model)
    if isinstance(network, GraphModel):
        return _of_graph(network)
    calls: list[tuple[str, nn.Module, Tensor, int]] = []
    count: dict[str, int] = {}

    def hook(path: str) -> Any:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            count[path] = count.get(path, 0) + 1
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor):
                calls.append((path, module, first, first._version))

        return note

    handles = [m.register_forward_hook(hook(p)) for p, m in network.named_modules() if p]
    try:
        with evaluating(model), seeded(0):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [
        Output(path, tuple(tensor.shape), type(module), bool(module._modules))
        for path, module, tensor, version in calls
        if count[path] == 1 and tensor._version == version
    ]


def _of_graph(network: GraphModel) -> list[Output]:
    leaving = network.graph.exits
    rank = {node.name: rank for rank, node in enumerate(network.graph.nodes)}
    inner_first = sorted(leaving, key=lambda path: (rank[leaving[path].name], -path.count(".")))
    whole = {path.rpartition(".")[0] for path in leaving}
    return [Output(path, leaving[path].shape, None, path in whole) for path in inner_first]


# --- layers and stages -------------------------------------------------------------------------


def stack(found: Sequence[Output]) -> list[Output]:
    """The layers of the longest stack: modules in one container, of one class and one output.

    Of stacks of equal length the outermost counts; empty where there is none.
    """
    stacks: dict[object, list[Output]] = {}
    for output in found:
        container, _, name = output.path.rpartition(".")
        if output.whole and len(output.shape) == 3 and name.isdigit():
            stacks.setdefault((container, output.kind, output.shape[1:]), []).append(output)
    return max(stacks.values(), key=lambda s: (len(s), -s[0].path.count(".")), default=[])


def stages(found: Sequence[Output]) -> list[Output]:
    """The last maps of every size, in order; those of one pixel, such as pooled ones, are none."""
    maps = [o for o in found if len(o.shape) == 4 and o.shape[2:] != (1, 1)]
    return [list(run)[-1] for _, run in groupby(maps, key=lambda output: output.shape[2:])]


def _evenly(ours: Sequence[Output], theirs: Sequence[Output]) -> Iterator[Pair]:
    count = min(len(ours), len(theirs))
    places = layer_map(count, len(ours)), layer_map(count, len(theirs))
    for own, its in zip(*places, strict=True):
        yield _pair(ours[own], theirs[its])


def _by_size(ours: Sequence[Output], theirs: Sequence[Output]) -> Iterator[Pair]:
    own, its = ([output.shape[2:] for output in side] for side in (ours, theirs))
    blocks = SequenceMatcher(None, own, its, autojunk=False).get_matching_blocks()
    equal = [(ours[b.a + i], theirs[b.b + i]) for b in blocks for i in range(b.size)]
    if not equal:
        yield from _evenly(ours, theirs)
    for student, teacher in equal:
        yield _pair(student, teacher)


def _pair(student: Output, teacher: Output) -> Pair:
    return Pair(student.path, teacher.path, student.shape, teacher.shape)
