"""``compress``: the stages in order, each saved, reloaded and measured. It holds no algorithm."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import Tensor, nn

from rarefy.batches import Lengthened, length_of, lengthened, lengths, seeded, take
from rarefy.copies import fingerprint
from rarefy.deployment.export import export
from rarefy.deployment.measure import settled, speedup
from rarefy.deployment.runtimes import OnnxSession, load_onnx, load_onnxruntime
from rarefy.environment import environment
from rarefy.errors import ExportError, InputError
from rarefy.graph.count import count
from rarefy.metrics import top1
from rarefy.preflight import (
    check_data,
    check_inputs,
    check_model,
    check_options,
    check_precision,
    first_inputs,
)
from rarefy.process import replayable
from rarefy.pruning.checks import check_finite
from rarefy.pruning.narrow import Pruned
from rarefy.recipe.options import Stages
from rarefy.reporting.files import write
from rarefy.run_folder import PruningFacts, RunFolder, StageFacts
from rarefy.stages import Job, Maker, makers
from rarefy.storage.format import load, save
from rarefy.training.evaluate import evaluate
from rarefy.types import Check, Data, Inputs, Measurement, Report, Stage, Target, Width

EXAMPLES = 8
"""Examples of the first training batch that a network is captured with."""


@dataclass(frozen=True)
class Compressed:
    """Result of :func:`compress`.

    Attributes:
        model: the last network, reloaded from its file.
        report: every figure, as in ``report.json``.
        folder: where the artifacts and the page are.
    """

    model: nn.Module
    report: Report
    folder: Path


def compress(
    model: nn.Module,
    *,
    train: Data,
    val: Data,
    test: Data | None = None,
    example_inputs: Inputs | None = None,
    target: Target | None = None,
    stages: Stages | None = None,
    out: str | Path = "compressed",
    title: str | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Compressed:
    """Make a trained network smaller and faster, and measure every stage on what would be shipped.

    The stages: prune, repair, set single weights to zero where that is asked for, distil from the
    original, quantize. After each, the network is saved to ``<stage>.safetensors`` and
    ``<stage>.onnx``; accuracy is that of the reloaded file (of the ONNX file in onnxruntime for the
    last stage), latency that of the ONNX files side by side.

    Args:
        model: the trained network; left as it is.
        train: labelled or unlabelled batches, to repair, distil and calibrate on.
        val: labelled batches that the progress of training is shown on.
        test: labelled batches that accuracy is measured on; ``val`` if None.
        example_inputs: what the network is called with; the first batch of ``train`` if None.
        target: what must be reached. Where it names a speed-up or a size and ``stages`` leaves
            pruning open, the budget is found by measuring.
        stages: options of each stage; defaults where None.
        out: folder of the artifacts and of ``report.html`` and ``report.json``.
        title: of the report.
        seed: of everything random: two runs on one machine are equal but for timings, and for a
            budget that a speed-up asked for was found by timing.
        resume: continue the run in ``out`` after its last complete stage.
        overwrite: replace the run in ``out``.
        progress: show progress.

    Raises:
        InputError, DataError: the network or the data cannot be used; nothing was written.
        OutputError: ``out`` cannot be written, or holds an earlier run.
        BudgetError, CaptureError, ProofError, TrainingError, ExportError: a stage failed; the
            stages before it are on disk.
        MissingExtraError: the ``onnx`` extra is not installed.

    Example:
        >>> compress(net, train=loader, val=held_out, target=Target(size=8))  # doctest: +SKIP
    """
    load_onnx()
    load_onnxruntime()
    started = time.perf_counter()
    stages = Stages() if stages is None else stages
    check_options(stages, target, seed)
    test = val if test is None else test
    with _repeatable(seed, train, val, test):
        example_inputs = _checked(model, train, val, test, example_inputs, stages)
        given = {"train": train, "val": val, "test": test}
        (train, val, test), example_inputs = _of_one_length(given, example_inputs)
    console = Console(stderr=True, quiet=not progress, markup=False, highlight=False)
    job = Job(model, train, val, test, example_inputs, target, stages, seed, console)
    identity = _identity(model, stages, target, seed)
    folder = RunFolder.claim(out, identity, resume=resume, overwrite=overwrite)
    run = _Run(job, folder)
    for name, make in makers(stages):
        run.stage(name, make)
    with seeded(seed):
        timed = run.latencies()
    measured = run.stages(timed)
    pruning = run.facts["pruned"].pruning
    assert pruning is not None
    report = Report(
        title or f"{type(model).__name__}, compressed",
        measured,
        tuple(Width(*width) for width in pruning.widths),
        _checks(measured, target),
        pruning.frozen,
        seed,
        run.earlier_seconds + time.perf_counter() - started,
        environment(timed),
    )
    write(report, folder.path)
    return Compressed(run.networks[measured[-1].name], report, folder.path)


@contextmanager
def _repeatable(seed: int, *data: Data) -> Iterator[None]:
    """What is random inside depends on the seed alone, and leaves no trace outside."""
    with seeded(seed), replayable(*data):
        yield


def _checked(
    model: nn.Module,
    train: Data,
    val: Data,
    test: Data,
    example_inputs: Inputs | None,
    stages: Stages,
) -> Inputs:
    """The example inputs, once everything that was given is found usable."""
    check_model(model)
    check_finite(model)
    check_precision(model, stages)
    check_data(model, train, "compress(train)", labelled=stages.train is not None, soft=True)
    for name, data in (("val", val), ("test", test)):
        check_data(model, data, f"compress({name})")
    if example_inputs is None:
        return first_inputs(train, "compress(train)", EXAMPLES)
    check_inputs(model, example_inputs, "compress(example_inputs)")
    return example_inputs


def _of_one_length(given: Mapping[str, Data], example_inputs: Inputs) -> tuple[list[Data], Inputs]:
    """Data and example with sequences padded to the longest, as int8 networks and files need."""
    found = {name: lengths(data, f"compress({name})") for name, data in given.items()}
    longest = max(length_of(example_inputs), *map(max, found.values()))
    padded = [
        data if found[name] == {longest} else Lengthened(data, longest, f"compress({name})")
        for name, data in given.items()
    ]
    return padded if longest else list(given.values()), lengthened(example_inputs, longest)


class _Run:
    """One run: makes or reloads each stage, then measures all of them.

    Every stage works on the *reloaded* networks of the stages before, so that a run that was
    interrupted and continued computes the same as one that was not.
    """

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job, self.folder = job, folder
        self.networks: dict[str, nn.Module] = {}
        self.facts: dict[str, StageFacts] = {}
        self.earlier_seconds = 0.0

    def stage(self, name: str, make: Maker) -> None:
        """Make a stage and put it on disk, or take it from there."""
        done = self.folder.complete(name)
        if done is not None:
            self.earlier_seconds += done.seconds
            self._take(name, done)
            self._say(f"{name}: complete in {self.folder.path}, taken from there")
            return
        with _repeatable(self.job.seed, self.job.train, self.job.val, self.job.test):
            facts = self._make(name, make)
        self.folder.note(name, facts)
        self._take(name, facts)
        self._say(
            f"{name}: accuracy {facts.accuracy:.2%}, {facts.params:,} parameters, "
            f"{facts.macs:,} MACs, {facts.seconds:.1f} s"
        )

    def _make(self, name: str, make: Maker) -> StageFacts:
        """Make a stage, write its artifacts and measure them."""
        started = time.perf_counter()
        network, notes = make(self.job, self.networks)
        save(network, self._file(name, "safetensors"))
        reloaded = load(self._file(name, "safetensors"), self.job.model)
        export(reloaded, self._file(name, "onnx"), self.job.example_inputs)
        self._check_batches(name)
        cost = count(reloaded, self.job.example_inputs)
        uncounted = (f"MACs of {op} ({n}x) are not counted" for op, n in cost.uncounted.items())
        return StageFacts(
            accuracy=self._accuracy(name, reloaded),
            params=cost.params,
            macs=cost.macs,
            notes=(*notes, *uncounted),
            seconds=time.perf_counter() - started,
            pruning=_plain(network.pruned) if name == "pruned" else None,  # type: ignore[arg-type]
        )

    def _say(self, text: str) -> None:
        self.job.console.print(text, soft_wrap=True)

    def _file(self, stage: str, suffix: str) -> Path:
        return self.folder.file(f"{stage}.{suffix}")

    def _check_batches(self, name: str) -> None:
        """Refuse an export that is bound to one number of examples: latency is that of one."""
        session = OnnxSession(self._file(name, "onnx"))
        try:
            session(take(self.job.example_inputs, 1))
        except InputError as error:
            raise ExportError(
                f"{name}.onnx",
                f"the exported network does not take one example alone: {error.what}",
                "Write its forward for any number of examples, without fixed batch sizes in view() "
                "and the like",
            ) from error

    def _accuracy(self, name: str, network: nn.Module) -> float:
        """That of the reloaded file; of the ONNX file where the network is quantized."""
        if name != "quantized":
            return evaluate(network, self.job.test)
        session = OnnxSession(self._file(name, "onnx"))
        position = session.outputs.index("logits") if "logits" in session.outputs else 0

        def predict(inputs: Inputs) -> Tensor:
            return session(inputs)[position]

        return top1(predict, self.job.test)

    def _take(self, name: str, facts: StageFacts) -> None:
        """Reload a complete stage."""
        network = load(self._file(name, "safetensors"), self.job.model)
        if facts.pruning is not None:
            network.pruned = _record(facts.pruning)  # type: ignore[assignment]
        self.networks[name], self.facts[name] = network, facts

    def latencies(self) -> list[Measurement]:
        """Latencies of all stages, measured side by side at batch 1."""
        files = [self._file(name, "onnx") for name in self.facts]
        self._say("measuring latency side by side ...")
        return settled(files, take(self.job.example_inputs, 1), threads=1)

    def stages(self, measured: Sequence[Measurement]) -> tuple[Stage, ...]:
        """All stages with what was measured on each, in their order."""
        return tuple(
            Stage(
                name,
                facts.accuracy,
                facts.params,
                facts.macs,
                self._file(name, "safetensors").stat().st_size,
                measurement.bytes,
                measurement.latency_ms,
                measurement.calls,
                facts.seconds,
                facts.notes,
            )
            for (name, facts), measurement in zip(self.facts.items(), measured, strict=True)
        )


def _plain(record: Pruned) -> PruningFacts:
    """A record of pruning with plain entries."""
    return PruningFacts(
        kind=record.kind,  # type: ignore[arg-type]
        reason=record.reason,
        error=record.error,
        widths=tuple((w.layer, w.before, w.after) for w in record.widths),
        frozen=tuple(map(str, record.frozen)),
        kept=tuple((path, dim, tuple(k.tolist())) for (path, dim), k in record.kept.items()),
    )


def _record(plain: PruningFacts) -> Pruned:
    """A record of pruning from plain entries; what was frozen stays text, in the report."""
    kept = {(path, dim): np.array(entries, np.int64) for path, dim, entries in plain.kept}
    widths = tuple(Width(*width) for width in plain.widths)
    return Pruned(plain.kind, plain.reason, widths, kept, (), plain.error)


def _checks(stages: tuple[Stage, ...], target: Target | None) -> tuple[Check, ...]:
    """The target's claims held against what was measured on the first and last stage."""
    if target is None:
        return ()
    first, last = stages[0], stages[-1]
    found = []
    if target.max_drop is not None:
        drop = first.accuracy - last.accuracy
        claim = "accuracy lost, as a share of all test examples"
        found.append(Check(claim, drop, target.max_drop, drop <= target.max_drop + 1e-12))
    for claim, value, limit in (
        ("times smaller file", first.bytes / last.bytes, target.size),
        (
            "times lower latency in onnxruntime",
            speedup(first.latency_ms, last.latency_ms),
            target.speedup,
        ),
    ):
        if limit is not None:
            found.append(Check(claim, value, limit, value >= limit))
    return tuple(found)


def _identity(model: nn.Module, stages: Stages, target: Target | None, seed: int) -> str:
    text = f"{type(model).__name__} {fingerprint(model)} {stages!r} {target!r} {seed}"
    return hashlib.sha256(text.encode()).hexdigest()
