"""The one training loop, on Hugging Face Accelerate."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rarefy.batches import batch_size, batches, check_rereadable, device_of, seeded
from rarefy.errors import DataError, InputError, OutputError, TrainingError, warn
from rarefy.metrics import lower_is_better, show, title
from rarefy.process import (
    deferred_interrupt,
    generators,
    of_the_first,
    on_all,
    own_accelerator,
    random_states,
    replayable,
    set_epoch,
    set_random_states,
    together,
)
from rarefy.progress import EpochDisplay
from rarefy.training import tracking
from rarefy.training.checkpoint import Checkpoints
from rarefy.training.evaluate import measured
from rarefy.training.identity import digest, identity_of
from rarefy.training.job import Job
from rarefy.training.networks import (
    fill,
    require_finite,
    require_trainable,
    tensors_of,
    warn_of_rounded,
)
from rarefy.training.objective import Objective
from rarefy.training.record import Epoch, Fit, Trained
from rarefy.training.shares import local_share
from rarefy.training.steps import DIVERGED, Example, Stepper, restore, state_of
from rarefy.training.stored import labels_of
from rarefy.types import Data, is_count

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLE = 2048
"""Training examples on which the generalization gap is computed, at least; whole batches."""


def fit(objective: Objective, data: Data, job: Job) -> nn.Module:
    """Train the network of an objective in place, and return it where it was, in eval mode."""
    network, device = objective.network, device_of(objective.network)
    require_trainable(network, job.where)
    warn_of_rounded(network, job.where)
    require_usable(data, job)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded(job.seed),
        replayable(data, job.val),
        own_accelerator(
            job.options.precision,
            log_with=tracking.listed(job.trackers) or None,
            project_dir=tracking.FOLDER,
        ) as accelerator,
        tracking.runs(job, accelerator),
    ):
        loop = _Loop(objective, data, job, accelerator)
        # Anew, for imports may have drawn numbers. Processes draw others than each other.
        with seeded(job.seed + 1_000_003 * accelerator.process_index), loop.display:
            loop.run()
            record = loop.finish()
    for parameter in network.parameters():
        parameter.grad = None
    if isinstance(getattr(network, "trained", None), Trained | None):
        network.trained = record  # type: ignore[assignment]
    return network.to(device).eval()


def require_usable(data: Data, job: Job) -> None:
    """Arguments fit together, before anything is trained."""
    options = job.options
    if options.patience is not None or options.keep == "best":
        name = "keep='best'" if options.keep == "best" else f"patience={options.patience}"
        if job.val is None:
            raise InputError(
                f"{job.where}({name})", "no val says which epoch is best", "Give val= as well"
            )
    often = {"data": options.epochs > 1 or job.checkpoint is not None, "val": True}
    for name, value in (("data", data), ("val", job.val)):
        if often[name]:
            check_rereadable(value, f"{job.where}({name})")
    if job.every is not None and not is_count(job.every):
        raise InputError(
            f"{job.where}(every={job.every!r})",
            "it counts optimizer steps, at least 1",
            "Write every=1000",
        )
    if job.checkpoint is None and (job.resume or job.every is not None):
        raise InputError(
            f"{job.where}({'resume' if job.resume else 'every'}=...)",
            "no folder for checkpoints is given",
            'Give checkpoint="folder" as well',
        )
    tracking.require_trackers(job.trackers, job.where)


@dataclass
class _Progress:
    """How far a training is: plain numbers that a checkpoint holds."""

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    best: int | None = None
    stopped: bool = False
    resumed: int | None = None
    before: dict[str, float] = field(default_factory=dict)
    history: list[Epoch] = field(default_factory=list)


class _Loop:
    """One training run."""

    def __init__(
        self, objective: Objective, data: Data, job: Job, accelerator: Accelerator
    ) -> None:
        self.job, self.options, self.accelerator = job, job.options, accelerator
        self.objective, self.source = objective, data
        self.data = local_share(data, job.seed, accelerator)
        length = operator.length_hint(self.data, 0)
        self._require_possible(length)
        self.checkpoints: Checkpoints | None = None
        if job.checkpoint is not None:
            self.checkpoints = Checkpoints(job.checkpoint, job.where)
            identity = identity_of(objective, length, job, accelerator.num_processes)
            self.identity = on_all(identity, accelerator)[0]  # its weights are those of all
        self.stepper = Stepper(objective, job, length, accelerator)
        self.at, self.best_weights = _Progress(), dict[str, Tensor]()
        self.begun, self.first, self.again = dict[str, Any](), "", False
        self.own_generators = generators(data)
        self.clock = self.epoch_clock = time.monotonic()
        shown = job.progress and accelerator.is_main_process
        self.display = EpochDisplay(
            job.where, self.options.epochs, math.ceil(length / self.options.accumulate), shown
        )

    def _require_possible(self, length: int) -> None:
        where, options = self.job.where, self.options
        whole, parts = operator.length_hint(self.source, 0), self.accelerator.num_processes
        lengths = on_all(length, self.accelerator)
        if len(set(lengths)) > 1:
            raise DataError(
                f"{where}(data)",
                f"the processes have {', '.join(map(str, lengths))} batches of their own, and a "
                "step takes one of each",
                "Give equally many to all of them",
            )
        if whole and not length and parts > 1:
            raise DataError(
                f"{where}(data)",
                f"{whole} {'batch' if whole == 1 else 'batches'} for {parts} processes",
                "Use smaller batches, or fewer processes",
            )
        if length and options.accumulate > length:
            raise InputError(
                f"{where}(accumulate={options.accumulate})",
                f"an epoch has {length} batches",
                "Accumulate fewer, or use larger batches",
            )
        if options.precision == "fp16" and self.accelerator.device.type == "cpu":
            raise InputError(
                f"{where}(precision='fp16')", "a CPU does not train in it", "Write 'bf16'"
            )

    def run(self) -> None:
        """All epochs; the network is trained in place."""
        for text in self.objective.notes:
            self.display.note(text)
        if not self.resumed():
            self.look()
        alone = self.checkpoints is not None and self.accelerator.num_processes == 1
        with deferred_interrupt(alone) as self.interrupt:
            while self.at.epoch < self.options.epochs and not self.at.stopped:
                self.epoch()
                self.pause()

    def measure(self, network: nn.Module, data: Data) -> float:
        """The metric on data, which are those of the first epoch: training may share parts."""
        where = f"{self.job.where}(val): evaluate"
        with replayable(data):
            set_epoch(data, 0)
            return measured(network, data, self.job.metric, where, self.accelerator)

    def look(self) -> None:
        """Evaluate all networks before the first step."""
        val = self.job.val
        if val is not None:
            networks = {**self.objective.teachers, "before": self.stepper.model}
            self.at.before = {name: self.measure(net, val) for name, net in networks.items()}
            found = [f"{k} {show(self.job.metric, v)}" for k, v in self.at.before.items()]
            self.display.note("  ".join(found) + f"  ({title(self.job.metric)} on val)")

    def epoch(self) -> None:
        """One pass over the data, or what is left of it."""
        at, stepper, meter = self.at, self.stepper, self.stepper.meter
        where = f"{self.job.where}(data), epoch {at.epoch + 1}"
        begin = at.batch // self.options.accumulate
        for index, group in enumerate(self.groups(where), begin):
            stepper.step(group, at.epoch, index)
            self.display.step(at.epoch, index, meter.last)
            if stepper.left_out:
                self.display.once("left out a batch of one example: BatchNorm needs two")
            if self.job.every is not None and stepper.steps % self.job.every == 0:
                self.save()
            self.pause()
        meter.drain()
        if not meter.count:
            raise DataError(
                where,
                "every batch holds a single example, and BatchNorm needs two to train",
                "Use larger batches, or a network without BatchNorm",
            )
        self.equalize()
        place = f"{self.job.where}, epoch {at.epoch + 1}"
        require_finite(stepper.model, place, TrainingError, DIVERGED)
        self.close(meter.total / meter.count)
        self.save()

    def groups(self, where: str) -> Iterator[list[Example]]:
        """The batches of every step; those of a resumed epoch's steps so far are only read."""
        set_epoch(self.data, self.at.epoch)
        if self.again:
            set_random_states(self.begun["states"], self.own_generators)
        elif self.checkpoints is not None:
            self.begun = self.beginning()
        source = batches(self.data, where)
        if self.again:
            self.again = False
            for _ in islice(source, self.at.batch):
                pass
            set_random_states(self.now, self.own_generators)
        while group := list(islice(source, self.options.accumulate)):
            if self.checkpoints is not None and not self.at.batch:
                self.first = digest(group[0])
            self.at.batch += len(group)
            yield group

    def beginning(self) -> dict[str, Any]:
        """Where an epoch begins."""
        return {"epoch": self.at.epoch, "states": random_states(self.own_generators)}

    def equalize(self) -> None:
        """Buffers are those of the first process on all of them, as in PyTorch's own wrapper."""
        self.stepper.held.gather()
        for network in (self.stepper.model, self.stepper.subject):
            of_the_first(network.buffers(), self.accelerator)

    def close(self, loss: float) -> None:
        """Evaluate, and note the end of an epoch."""
        at, meter, val = self.at, self.stepper.meter, self.job.val
        metric = self.job.metric
        score = None if val is None else self.measure(self.stepper.subject, val)
        seconds = at.epoch_seconds + time.monotonic() - self.epoch_clock
        at.history.append(Epoch(at.epoch + 1, loss, self.stepper.lr, score, seconds))
        at.epoch, at.batch, at.epoch_seconds = at.epoch + 1, 0, 0.0
        meter.total, meter.count, self.epoch_clock = 0.0, 0, time.monotonic()
        if score is not None and (at.best is None or self.better(score, at.best)):
            at.best = at.epoch
            if self.options.keep == "best":
                held = tensors_of(self.stepper.subject)
                self.best_weights = {n: t.detach().cpu().clone() for n, t in held}
        patience = self.options.patience
        if patience is not None and at.best is not None:
            at.stopped = at.epoch - at.best >= patience
        self.display.epoch(at.epoch - 1, loss, None if score is None else show(metric, score))
        values = {"loss": loss, "lr": self.stepper.lr}
        values |= {} if score is None else {f"val {title(metric)}": score}
        self.accelerator.log(values, step=self.stepper.steps)

    def better(self, score: float, epoch: int) -> bool:
        """Whether a metric is better than that of an earlier epoch, from 1."""
        other = self.at.history[epoch - 1].val
        assert other is not None
        return score < other if lower_is_better(self.job.metric) else score > other

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint; where that is not possible, training goes on with a warning."""
        if self.checkpoints is None:
            return
        self.stepper.meter.drain()
        self.stepper.held.gather()
        now = time.monotonic()
        at = asdict(self.at)
        at["seconds"] += now - self.clock
        at["epoch_seconds"] += now - self.epoch_clock
        state = {
            "identity": self.identity,
            "progress": at,
            "stepper": state_of(self.stepper),
            "best": self.best_weights,
            "first": self.first,
            "begun": on_all(self.begun, self.accelerator),
            "now": on_all(random_states(self.own_generators), self.accelerator),
        }
        with together(self.accelerator):
            require_finite(self.stepper.model, self.job.where, TrainingError, DIVERGED)
            if self.accelerator.is_main_process:
                try:
                    self.checkpoints.write(self.stepper.steps, state)
                except OutputError as error:
                    warn(str(error))

    def pause(self) -> None:
        """Stop where the user asked for it, with everything saved."""
        if self.interrupt.asked and self.checkpoints is not None:
            self.save()
            text = f"stopped after step {self.stepper.steps}; go on with resume=True and the same "
            text += f"checkpoint={str(self.checkpoints.path)!r}"
            self.display.note(text)
            raise KeyboardInterrupt(text)

    def resumed(self) -> bool:
        """Go on from the newest checkpoint; False where there is none."""
        if self.checkpoints is None:
            return False
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                self.checkpoints.claim(self.job.resume)
        with together(self.accelerator):
            state, damaged = self.checkpoints.newest()
            if state is not None:
                self.require_same(state["identity"])
        steps = None if state is None else state["stepper"]["steps"]
        if len(set(on_all(steps, self.accelerator))) > 1:
            raise InputError(
                f"{self.job.where}(checkpoint={str(self.checkpoints.path)!r})",
                "the processes find other checkpoints there than each other",
                "Choose a folder that all of them share",
            )
        for text in damaged:
            warn(f"{self.job.where}(resume=True) passed over a damaged checkpoint, {text}")
        if state is None:
            return False
        restore(self.stepper, state["stepper"])
        held = state["progress"]
        self.at = _Progress(**{**held, "history": [Epoch(**e) for e in held["history"]]})
        self.at.resumed = self.stepper.steps
        self.best_weights, self.first = state["best"], state["first"]
        mine = self.accelerator.process_index
        self.begun, self.now = state["begun"][mine], state["now"][mine]
        with together(self.accelerator):
            self.check_data()
        self.again = self.at.batch > 0
        set_random_states(self.now, self.own_generators)
        self.clock = self.epoch_clock = time.monotonic()
        self.display.go_on(self.at.epoch)
        self.display.note(f"goes on after step {self.stepper.steps}, epoch {self.at.epoch + 1}")
        return True

    def require_same(self, other: dict[str, str]) -> None:
        """The checkpoint is of the same training."""
        names = [k for k in self.identity | other if self.identity.get(k) != other.get(k)]
        if names:
            found = "; ".join(f"{n}: {other.get(n)}, now {self.identity.get(n)}" for n in names)
            raise InputError(
                f"{self.job.where}(checkpoint={str(self.job.checkpoint)!r})",
                f"it is of another training: {found}",
                "Give the same arguments to go on, or another folder to begin anew",
            )

    def check_data(self) -> None:
        """The data begin the epoch with the same batch as before."""
        set_random_states(self.begun["states"], self.own_generators)
        set_epoch(self.data, self.begun["epoch"])
        first = next(iter(batches(self.data, f"{self.job.where}(data)")))
        if self.accelerator.is_main_process and digest(first) != self.first:
            raise InputError(
                f"{self.job.where}(data)",
                "epoch {} does not begin with the batch of the checkpoint".format(
                    self.begun["epoch"] + 1
                ),
                "Give the same data in the same order; draw at random from the global generators "
                "or from that of the DataLoader",
            )

    # --- the end --------------------------------------------------------------------------------

    def finish(self) -> Trained:
        """Put the chosen weights into the network; what was done."""
        at, stepper = self.at, self.stepper
        kept = at.epoch
        if self.options.keep == "best" and at.best is not None:
            kept = at.best
            fill(stepper.model, self.best_weights)
        elif stepper.average is not None:
            fill(stepper.model, dict(tensors_of(stepper.average.model)))
        student, teachers, sampled = self.compare(kept)
        return Trained(
            metric=title(self.job.metric),
            epochs=tuple(at.history),
            steps=stepper.steps,
            seconds=at.seconds + time.monotonic() - self.clock,
            kept=kept,
            best=at.best,
            stopped=at.stopped,
            before=at.before.get("before"),
            student=student,
            teachers=teachers,
            sampled=sampled,
            resumed=at.resumed,
        )

    def compare(self, kept: int) -> tuple[Fit | None, dict[str, Fit], int]:
        """The generalization gap of the result and of its teachers, and on how many examples."""
        score = self.at.history[kept - 1].val
        if score is None:
            return None, {}, 0
        sample = [] if isinstance(self.source, Iterator) else self.sample()
        networks = {"": self.stepper.model, **self.objective.teachers}
        vals = {"": score, **self.at.before}
        if self.objective.tutor is not None and self.objective.tutor.changes:
            assert self.job.val is not None
            teachers = self.objective.teachers.items()
            vals |= {name: self.measure(net, self.job.val) for name, net in teachers}
        found = {
            name: Fit(self.on_sample(net, sample), vals[name]) for name, net in networks.items()
        }
        count = sum(batch_size(inputs) for inputs, _ in sample)
        return found.pop(""), found, count

    def on_sample(self, network: nn.Module, sample: list[Example]) -> float | None:
        """The metric on training examples; None where it does not apply to them."""
        try:
            return self.measure(network, sample) if sample else None
        except InputError as error:  # what was trained is not lost for that
            self.display.once(f"no metric on the training data: {error.what}")
            return None

    def sample(self) -> list[Example]:
        """The first training batches, where they are labelled."""
        found: list[Example] = []
        count = 0
        with seeded(self.job.seed), replayable(self.source):
            for batch in batches(self.source, f"{self.job.where}(data)"):
                inputs, labels = batch[0], labels_of(batch[1])
                if labels is None:
                    return []
                found.append((inputs, labels))
                count += batch_size(batch[0])
                if count >= SAMPLE:
                    break
        return found
