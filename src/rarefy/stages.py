"""What each stage of a compression makes of the networks before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

from rarefy.batches import Leading
from rarefy.distillation.losses import KD
from rarefy.errors import shortened
from rarefy.gains import quantize
from rarefy.measured import prune
from rarefy.pruning.narrow import Pruned
from rarefy.pruning.repair import Repaired, repair
from rarefy.pruning.sparsity.masks import hold
from rarefy.pruning.sparsity.sparsify import Sparsified
from rarefy.recipe.options import DistillStage, PruneStage, QuantizeStage, Stages
from rarefy.search import reachable_budget
from rarefy.training.distill import distill
from rarefy.training.evaluate import evaluate
from rarefy.training.train import train
from rarefy.types import Batch, Data, Inputs, Target

CALIBRATION = 512
"""Training examples that quantization is calibrated on."""

SCORING = 1024
"""Training examples that units are scored on, where the criterion asks for data."""


@dataclass(frozen=True)
class Job:
    """What :func:`rarefy.compress` was asked for, once it is found usable."""

    model: nn.Module
    train: Data
    val: Data
    test: Data
    example_inputs: Inputs
    target: Target | None
    stages: Stages
    seed: int
    console: Console

    @property
    def progress(self) -> bool:
        """Whether training shows how far it is."""
        return not self.console.quiet


Made = tuple[nn.Module, tuple[str, ...]]
"""A stage's network, and what the reader must know about it."""
Maker = Callable[[Job, Mapping[str, nn.Module]], Made]
"""(job, networks of the stages before) -> network."""


def _teacher(job: Job, before: Mapping[str, nn.Module]) -> Made:
    options = job.stages.train
    if options is None:
        return job.model, ()
    trained = train(
        job.model,
        job.train,
        val=job.val,
        seed=job.seed,
        progress=job.progress,
        epochs=options.epochs,
        lr=options.lr,
    )
    return trained, ()


def _pruned(job: Job, before: Mapping[str, nn.Module]) -> Made:
    options, notes = _prune_options(job, before["teacher"])
    small = prune(
        before["teacher"],
        job.example_inputs,
        options.budget(),
        structure=options.structure,
        criterion=options.criterion,
        data=_limited(job.train, SCORING, labelled=True) if options.informed else None,
        heal=False,
        exclude=options.exclude,
    )
    record = small.pruned
    assert isinstance(record, Pruned)
    notes += (f"proven against masking, largest difference {record.error:.0e}",)
    if record.kind == "graph":
        notes += (f"returned as a rewritten graph, not as your class: {record.reason}",)
    if record.missed:
        notes += (record.missed,)
    return small, notes


def _prune_options(job: Job, teacher: nn.Module) -> tuple[PruneStage, tuple[str, ...]]:
    """The options given, or a budget that reaches the target."""
    if job.stages.prune is not None:
        return job.stages.prune, ()
    if job.target is None or (job.target.speedup is None and job.target.size is None):
        return PruneStage(macs=0.5), ()
    job.console.print("searching for the largest network that reaches the target ...")
    scheme = None if job.stages.quantize is None else job.stages.quantize.scheme()
    examples = _limited(job.train, SCORING)
    share, note = reachable_budget(teacher, job.example_inputs, job.target, examples, scheme)
    return PruneStage(macs=share), (note,)


def _repaired(job: Job, before: Mapping[str, nn.Module]) -> Made:
    """The pruned network, healed where that is asked for."""
    student, options = before["pruned"], job.stages.repair
    if options is None:
        return student, ()
    healed = repair(before["teacher"], student, job.train, samples=options.samples, seed=job.seed)
    record = healed.repaired
    assert isinstance(record, Repaired)
    accuracy = evaluate(healed, job.test)
    note = f"accuracy after repair, before any training: {accuracy:.2%}"
    return healed, (note, *_unrepaired(record.skipped))


def _unrepaired(skipped: Mapping[str, str]) -> Iterator[str]:
    """What repair left as it was, a note for each reason."""
    layers: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        layers.setdefault(reason, []).append(layer or "every layer")
    for reason, names in layers.items():
        yield f"not repaired: {shortened(names, 4)}: {reason}"


def _sparse(job: Job, before: Mapping[str, nn.Module]) -> Made:
    options = job.stages.sparsify
    assert options is not None
    student, notes = _repaired(job, before)
    found = prune(
        student,
        job.example_inputs,
        options.budget(),
        structure=options.structure,
        criterion=options.criterion,
        data=_limited(job.train, options.samples, labelled=True) if options.informed else None,
        exclude=options.exclude,
    )
    record = found.sparsified
    assert isinstance(record, Sparsified)
    gone, size = map(sum, zip(*record.zeros.values(), strict=True))
    notes += (f"{gone:,} of {size:,} weights are zero: a smaller file, and no less work",)
    notes += tuple(f"{path} has no weight left: scope: local spares it" for path in record.emptied)
    return found, (*notes, *(f"{path} stays dense: {why}" for path, why in record.dense.items()))


def _distilled(job: Job, before: Mapping[str, nn.Module]) -> Made:
    assert job.stages.distill is not None
    student, notes = (before["sparse"], ()) if "sparse" in before else _repaired(job, before)
    return _taught(job, job.stages.distill, before["teacher"], student), notes


def _taught(
    job: Job, options: DistillStage | QuantizeStage, teacher: nn.Module, student: nn.Module
) -> nn.Module:
    """A student trained on the teacher's soft labels; zeros stay zero."""
    return distill(
        teacher,
        student,
        job.train,
        loss=KD(temperature=options.temperature),
        label_weight=options.label_weight,
        val=job.val,
        seed=job.seed,
        progress=job.progress,
        epochs=options.epochs,
        lr=options.lr,
        after_step=None if job.stages.sparsify is None else hold(student),
    )


def _quantized(job: Job, before: Mapping[str, nn.Module]) -> Made:
    options = job.stages.quantize
    assert options is not None
    source = list(before.values())[-1]
    limit = {} if options.max_drop is None else _limit(job, options.max_drop)
    result = quantize(source, _limited(job.train, CALIBRATION), options.scheme(), **limit)
    left: Mapping[str, str] = result.quantization.left  # type: ignore[union-attr,assignment]
    notes = tuple(f"{layer} left in float: {reason}" for layer, reason in left.items())
    if options.epochs:
        return _taught(job, options, before["teacher"], result), notes
    return result, notes


def _limit(job: Job, max_drop: float) -> dict[str, Any]:
    """Options of a quantization that keeps its validation accuracy."""
    return {"evaluate": lambda network: evaluate(network, job.val), "max_drop": max_drop}


def makers(stages: Stages) -> list[tuple[str, Maker]]:
    """The name of every stage that is asked for, in their order, and what makes it."""
    found: list[tuple[str, Maker]] = [("teacher", _teacher), ("pruned", _pruned)]
    if stages.sparsify is not None:
        found.append(("sparse", _sparse))
    if stages.distill is not None:
        found.append(("distilled", _distilled))
    if stages.repair is not None and len(found) == 2:
        found.append(("repaired", _repaired))
    if stages.quantize is not None:
        found.append(("quantized", _quantized))
    return found


def _limited(data: Data, examples: int, *, labelled: bool = False) -> list[Batch]:
    """Batches of at most so many examples, unlabelled unless labels are asked for."""
    return list(Leading(data, examples, "compress(train)", labelled))
