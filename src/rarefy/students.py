"""``student``: a small network made of a trained one, to be trained on what that one knows.

Layers are taken out of the stacks that repeat them, evenly, and units out of every layer, the
least important ones; what stays is copied. A start from the teacher's own weights is what
DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108) and, for widths, Sheared LLaMA (Xia
et al. 2023, https://arxiv.org/abs/2310.06694) give their students.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rarefy.copies import ordinary
from rarefy.errors import BudgetError, InputError
from rarefy.graph.blocks import Block
from rarefy.graph.capture import check_runs
from rarefy.graph.count import count
from rarefy.graph.stacks import Stack, find_stacks, spread
from rarefy.graph.trace import trace
from rarefy.paths import excluded, matches, paths, within
from rarefy.pruning.checks import check_copies, check_finite
from rarefy.pruning.narrow import noted
from rarefy.pruning.prune import request
from rarefy.pruning.request import recorded
from rarefy.pruning.scoring.compensated import Compensated
from rarefy.pruning.scoring.criteria import Criterion
from rarefy.pruning.scoring.passes import LossFunction
from rarefy.pruning.shorten import Shortened
from rarefy.pruning.structure.depth import bypass
from rarefy.types import Budget, Data, Inputs, check_network

LEAST = 0.5
"""Of the width that all groups would have if they were cut alike, each keeps this much at least.
Without it, students of a network for spoken digits had 4 channels between 15 and 8, and learned
less than a network from scratch."""


@dataclass(frozen=True)
class Copied:
    """One tensor of a student and where its values come from.

    Attributes:
        path: of the parameter, in the student and in the teacher.
        before: its shape in the teacher.
        after: its shape in the student.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Layers:
    """What stays of one stack of layers.

    Attributes:
        path: of the ``nn.ModuleList`` or ``nn.Sequential`` that holds it.
        kept: indices there of the layers that stay.
        gone: indices of those that went.
    """

    path: str
    kept: tuple[int, ...]
    gone: tuple[int, ...]


@dataclass(frozen=True)
class Derived:
    """What a student was made of; its attribute ``derived``. ``print`` shows it as a table.

    Attributes:
        kind: ``"module"`` where the teacher's class was kept, else ``"graph"``.
        reason: why the class was not kept, or empty.
        layers: what stays of each stack.
        copied: every parameter of the student, in order.
        gone: parameters of the teacher of which nothing is left.
        params: parameter values of the teacher and of the student.
        macs: multiply-accumulate operations of one example, of the teacher and of the student.
        error: largest difference from the teacher with the layers and units masked, relative to
            the outputs' sensitivity.
        thawed: whether all parameters of the teacher were frozen, so that those of the student
            were made trainable.
    """

    kind: str
    reason: str
    layers: tuple[Layers, ...]
    copied: tuple[Copied, ...]
    gone: tuple[str, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    error: float
    thawed: bool

    def __str__(self) -> str:
        lines = [
            f"{name} {after:,} of {before:,} ({after / max(before, 1):.1%})"
            for name, (before, after) in (("parameters", self.params), ("MACs", self.macs))
        ]
        if self.kind == "graph":
            lines.append(f"not the teacher's class: {self.reason}")
        for stack in self.layers:
            kept, gone = (", ".join(map(str, n)) for n in (stack.kept, stack.gone))
            lines.append(
                f"{stack.path or 'network'}: layers {kept} stay" + (f", {gone} go" if gone else "")
            )
        wide = max([9, *(len(c.path) for c in self.copied)])
        lines += ["", f"{'parameter':<{wide}}  teacher -> student"]
        for c in self.copied:
            whole = "whole" if c.before == c.after else f"{_shape(c.before)} -> {_shape(c.after)}"
            lines.append(f"{c.path:<{wide}}  {whole}")
        if self.gone:
            lines += ["", f"left out: {len(self.gone)} parameters", *(f"  {p}" for p in self.gone)]
        return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


@torch.inference_mode(False)
def student(
    teacher: nn.Module,
    example_inputs: Inputs,
    *,
    width: float | None = None,
    depth: float | None = None,
    layers: Mapping[str, Sequence[int]] | None = None,
    params: float | None = None,
    macs: float | None = None,
    criterion: str | Criterion | Compensated | None = None,
    data: Data | None = None,
    loss: LossFunction | None = None,
    round_to: int = 1,
    exclude: Sequence[str] = (),
    keep_class: bool = False,
) -> nn.Module:
    """A smaller network that starts from the weights of a trained one.

    Shallower first: of every stack of layers (consecutive children of one ``nn.ModuleList`` or
    ``nn.Sequential`` with residual blocks in them) a share stays, picked evenly with the first and
    the last among them, as in DistilBERT: 6 of 12 are 0, 2, 4, 7, 9 and 11. A layer that changes
    the shape, or that others read more of than its output, always stays and counts as one that
    does. Then narrower: the least important units go (:func:`rarefy.prune`). All that stays keeps
    the teacher's weights, and the result is proven to compute what the teacher does with these
    layers and units masked. The teacher is untouched.

    The weights are not adapted to what is missing: that is what training is for
    (:func:`rarefy.distill`), or before it, without labels, ``rarefy.repair(teacher, student,
    data)``. Nothing is drawn at random, but for the criterion ``"random"``, which has its own seed.

    Args:
        teacher: a trained network.
        example_inputs: what it is called with: a tensor, a tuple or a mapping.
        width: share of the units of every group that stays, in (0, 1].
        depth: share of the layers of every stack that stays, in (0, 1]; rounded, at least one.
        layers: path of a container -> indices of its children that stay; for other containers,
            ``depth`` counts.
        params: share of the teacher's parameters that stays, in (0, 1], after layers and units
            went; instead of ``width``, the units chosen over the whole network. No group keeps
            less than :data:`LEAST` of the width that all would have if they were cut alike, where
            the share can be reached so: the layers of most parameters would become bottlenecks.
        macs: the same of its MACs.
        criterion: how important a unit is; see :func:`rarefy.prune`.
        data: batches to score units with.
        loss: (logits, targets) -> mean loss of a batch, for criteria that need gradients.
        round_to: widths are multiples of this number where that is possible.
        exclude: paths or patterns of modules and parameters: their own outputs keep their width,
            and layers that hold any of them stay.
        keep_class: never return a rewritten graph.

    Returns:
        A new network in eval mode, an instance of the teacher's class where its forward allows
        that: what stays keeps its path, and a layer that went is a
        :class:`~rarefy.graph.stubs.Stub` that hands on its input, so that the numbers of layers
        that a ``config`` states stay true of the containers. Its attribute ``derived`` is a
        :class:`Derived` record, ``pruned`` the :class:`~rarefy.pruning.narrow.Pruned` one.
        Parameters are trainable as the teacher's are;
        all of them where the teacher is frozen as a whole.

    Raises:
        InputError: weights are not finite, nothing can go, a name or index matches nothing.
        BudgetError: a share is out of range or cannot be reached.
        CaptureError: the network cannot be captured.
        ProofError: the student differs from masking.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = student(net, torch.randn(2, 4), width=0.5)
        >>> print(small.derived)
        parameters 26 of 58 (44.8%)
        MACs 24 of 48 (50.0%)
        <BLANKLINE>
        parameter  teacher -> student
        0.weight   8x4 -> 4x4
        0.bias     8 -> 4
        2.weight   2x8 -> 2x4
        2.bias     whole
    """
    shares = {"width": width, "depth": depth, "params": params, "macs": macs}
    _check(teacher, shares, layers)
    teacher = ordinary(teacher)
    check_finite(teacher)
    check_copies(teacher)
    short = Shortened(teacher)
    stacks: tuple[Layers, ...] = ()
    excluded(exclude, paths(teacher))
    network = trace(teacher, example_inputs)
    check_runs(teacher, example_inputs)
    if depth is not None or layers is not None:
        found = find_stacks(teacher, network)
        stacks, blocks = _picked(teacher, found, depth, layers or {}, exclude)
        if blocks:
            cut = bypass(teacher, example_inputs, network, blocks, keep_class=keep_class)
            short = Shortened(cut[0], blocks, *cut[1:])
    budget = _budget(width, params, macs, round_to)
    given: dict[str, Any] = {"criterion": criterion, "data": data, "loss": loss}
    given |= {"exclude": exclude, "keep_class": keep_class}
    small = _narrowed(teacher, short.model, example_inputs, budget, given)
    small = recorded(teacher, network, short, small)
    thawed = _thaw(teacher, small)
    small.derived = _derived(teacher, small, example_inputs, stacks, thawed)  # type: ignore[assignment]
    return small


# --- what is asked for -------------------------------------------------------------------------


def _check(teacher: object, shares: Mapping[str, float | None], layers: object) -> None:
    """Refuse arguments of another kind or out of range, and calls that ask for nothing."""
    check_network(teacher, "student(teacher)")
    if not isinstance(layers, Mapping | None):
        what = f"a {type(layers).__name__} was given"
        raise InputError("student(layers=...)", what, 'Write layers={"encoder.layer": (0, 2, 5)}')
    given = {name: value for name, value in shares.items() if value is not None}
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:
            raise BudgetError(
                f"student({name}={value!r})",
                "it is the share of the teacher that stays, above 0 and at most 1",
                f"Write {name}=0.5 to keep half",
            )
    if not given and not layers:
        raise InputError(
            "student(...)",
            "it is not told what to make smaller",
            "Give width=0.5, depth=0.5 or both",
        )
    narrower = [name for name in ("width", "params", "macs") if name in given]
    if len(narrower) > 1:
        raise InputError(
            f"student({', '.join(f'{name}=...' for name in narrower)})",
            "each of them says how narrow the student is",
            f"Give one of them, such as {narrower[0]}={given[narrower[0]]:g}",
        )


def _budget(
    width: float | None, params: float | None, macs: float | None, round_to: int
) -> Budget | None:
    """What may remain of the units; None where all of them."""
    if width is not None and width < 1:
        return Budget(sparsity=1 - width, scope="local", max_drop=1.0, round_to=round_to)
    shares = {"params": params, "macs": macs}
    for name, share in shares.items():
        if share is not None:
            return Budget(max_drop=1.0, round_to=round_to, **{name: share})  # type: ignore[arg-type]
    Budget(sparsity=0.0, round_to=round_to)  # refuses what is no multiple
    return None


def _narrowed(
    teacher: nn.Module,
    short: nn.Module,
    example_inputs: Inputs,
    budget: Budget | None,
    options: Mapping[str, Any],
) -> nn.Module:
    """The network without some layers, narrower by what is left of the budget.

    Raises:
        BudgetError: units do not reach it; the message says what is reachable.
    """
    left = 1.0
    if budget is not None and budget.sparsity is None:
        costs = (count(teacher, example_inputs), count(short, example_inputs))
        whole, rest = (getattr(cost, budget.kind) for cost in costs)
        left = rest / max(whole, 1)
    if budget is None or budget.share >= left:
        return short
    asked: dict[str, Any] = {budget.kind: budget.share / left}
    known = paths(short)
    kept = [name for name in options["exclude"] if matches(name, known)]
    given_on = {**options, "exclude": kept}
    asked_of = replace(budget, **asked)
    job = request(short, example_inputs, asked_of, **given_on)
    try:
        if budget.sparsity is None:  # costs go with the square of the width
            floor = 1 - LEAST * math.sqrt(asked_of.share)
            with suppress(BudgetError):
                return noted(job.to(replace(asked_of, max_drop=floor)), asked_of)
        return noted(job.to(asked_of), asked_of)
    except BudgetError as error:
        given = {"sparsity": "width"}.get(budget.kind, budget.kind)
        share = 1 - budget.share if given == "width" else budget.share
        after = f"without the layers that go {left:.3f} remain, and of these " if left < 1 else ""
        raise BudgetError(
            f"student({given}={share:g})",
            f"{after}{error.what}",
            f"Ask for more {given}, or exclude less",
        ) from error


# --- layers ------------------------------------------------------------------------------------


def _picked(
    teacher: nn.Module,
    stacks: Sequence[Stack],
    depth: float | None,
    layers: Mapping[str, Sequence[int]],
    exclude: Sequence[str],
) -> tuple[tuple[Layers, ...], tuple[Block, ...]]:
    """What stays of each stack, and the blocks that go.

    Raises:
        InputError: there is no stack, or none of this name; an index is out of range, or of a
            layer that has to stay.
    """
    for path, wanted in layers.items():
        _check_chosen(teacher, stacks, path, wanted)
    if depth is not None and not stacks:
        raise InputError(
            f"student(depth={depth:g})",
            "it has no stack of layers with residual blocks that can be bypassed",
            "Give width=0.5; rarefy.trace(teacher, example_inputs).joints says why paths that meet "
            "cannot be bypassed",
        )
    known = paths(teacher)
    held = {path for name in exclude for path in matches(name, known)}
    found: list[Layers] = []
    blocks: list[Block] = []
    for stack in stacks:
        numbers = _indices(teacher, stack)
        fixed = [i for i, n in enumerate(stack.names) if not _may_go(stack, n, held)]
        if stack.path in layers:
            chosen = {*layers[stack.path], *(numbers[i] for i in fixed)}
            kept = [i for i, n in enumerate(numbers) if n in chosen]
        elif depth is not None:
            share = max(1, math.floor(depth * len(numbers) + 0.5))
            kept = list(spread(len(numbers), share, fixed))
        else:
            continue
        gone = [i for i in range(len(numbers)) if i not in kept]
        blocks += [block for i in gone for block in stack.layers[stack.names[i]]]
        found.append(
            Layers(stack.path, tuple(numbers[i] for i in kept), tuple(numbers[i] for i in gone))
        )
    return tuple(found), tuple(blocks)


def _indices(teacher: nn.Module, stack: Stack) -> list[int]:
    """The place of each layer of a stack among the children of its container."""
    names = list(teacher.get_submodule(stack.path)._modules)
    return [names.index(name) for name in stack.names]


def _may_go(stack: Stack, name: str, held: set[str]) -> bool:
    """Whether a layer can go and neither it, nor what is around it or in it, is excluded."""
    path = stack.of(name)
    return name in stack.layers and not (
        within(path, held) or any(within(one, [path]) for one in held)
    )


def _check_chosen(
    teacher: nn.Module, stacks: Sequence[Stack], path: object, wanted: object
) -> None:
    """Refuse layers that are no stack's, and those left out that have to stay.

    Raises:
        InputError: see :func:`_picked`.
    """
    where = f"student(layers={{{path!r}: {wanted!r}}})"
    own = [stack for stack in stacks if stack.path == path]
    if not own:
        names = sorted({stack.path for stack in stacks})
        near = difflib.get_close_matches(str(path), names, 3, 0.3) or names[:3]
        raise InputError(
            where,
            "no stack of layers that can go has this path",
            f"Did you mean {' or '.join(map(repr, near))}" if near else "Give width=0.5 instead",
        )
    total = len(teacher.get_submodule(own[0].path)._modules)
    valid = isinstance(wanted, Sequence | set | frozenset) and not isinstance(wanted, str)
    chosen: list[Any] = list(wanted) if valid else [None]  # type: ignore[call-overload]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in chosen):
        raise InputError(where, "indices are whole numbers", "Write for example (0, 2, 5)")
    outside = sorted(n for n in chosen if not 0 <= n < total)
    if outside or len(set(chosen)) < len(chosen) or not chosen:
        what = f"index {outside[0]} is out of range" if outside else "indices repeat, or are none"
        raise InputError(where, what, f"Name each layer that stays once, by a number below {total}")
    stuck = {
        stack.names[i]: stack.stuck[stack.names[i]]
        for stack in own
        for i, n in enumerate(_indices(teacher, stack))
        if n not in chosen and stack.names[i] in stack.stuck
    }
    if stuck:
        name, reason = next(iter(stuck.items()))
        raise InputError(where, f"layer {name} cannot go: {reason}", f"Name {name} among them")


# --- what came out -----------------------------------------------------------------------------


def _thaw(teacher: nn.Module, small: nn.Module) -> bool:
    """Make a student trainable whose teacher was frozen as a whole; whether it was."""
    if any(parameter.requires_grad for parameter in teacher.parameters()):
        return False
    for parameter in small.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return True


def _derived(
    teacher: nn.Module,
    small: nn.Module,
    example_inputs: Inputs,
    stacks: tuple[Layers, ...],
    thawed: bool,
) -> Derived:
    """The record of a student."""
    record: Any = small.pruned
    whole = dict(teacher.named_parameters(remove_duplicate=False))
    left = {path for path, _ in small.named_parameters(remove_duplicate=False)}
    still = {id(tensor) for path, tensor in whole.items() if path in left}
    costs = count(teacher, example_inputs), count(small, example_inputs)
    return Derived(
        kind=record.kind,
        reason=record.reason,
        layers=stacks,
        copied=tuple(
            Copied(path, tuple(whole[path].shape), tuple(tensor.shape))
            for path, tensor in small.named_parameters()
        ),
        gone=tuple(p for p, tensor in teacher.named_parameters() if id(tensor) not in still),
        params=(costs[0].params, costs[1].params),
        macs=(costs[0].macs, costs[1].macs),
        error=record.error,
        thawed=thawed,
    )
