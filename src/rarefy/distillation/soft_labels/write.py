"""Writing: the teacher's answers to all examples, once, by any number of processes."""

from __future__ import annotations

import math
import secrets
import shutil
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.batches import seeded
from rarefy.copies import fingerprint
from rarefy.distillation.soft_labels import manifest as manifests
from rarefy.distillation.soft_labels.answers import answer, answering, require_usable
from rarefy.distillation.soft_labels.manifest import DataFacts, Manifest, Teacher
from rarefy.distillation.soft_labels.records import Array, Dense, Form, Layout, Outputs, form_for
from rarefy.distillation.soft_labels.sequences import are_sequences, counted, longest, packed
from rarefy.distillation.soft_labels.shards import (
    Appending,
    Shard,
    appending,
    begun,
    held_bytes,
    shards_of,
)
from rarefy.distillation.soft_labels.source import PROBED, Source, probed_hashes, source
from rarefy.errors import InputError, OutputError, TrainingError
from rarefy.process import own_accelerator, replayable, together
from rarefy.progress import Bar
from rarefy.types import Data, is_count, python

SHARD_BYTES = 64 << 20
MOST_SHARDS = 1024
AHEAD = 4
"""Batches that the teacher may be ahead of the disk."""

WHERE = "write_soft_labels"


def write_soft_labels(
    teacher: nn.Module,
    data: Data,
    path: str | Path,
    *,
    views: int = 1,
    form: Form | None = None,
    mass: float = 0.99,
    temperature: float = 4.0,
    dim: int | None = None,
    seed: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    ranks: tuple[int, int] | None = None,
    progress: bool = True,
) -> Manifest:
    """Store a teacher's answers to all examples, to be read by :class:`SoftLabels`.

    Every example has an id: its index in the data set where ``data`` is a ``DataLoader`` over a
    map-style data set (all of the data set is written, in its order, whatever the loader's
    sampler), and else its running position in the batches. Targets are not read.

    Of outputs (N, L, C) for inputs with an ``attention_mask`` (N, L) only the positions that it
    counts are kept, so that batches may be padded to any length, on either side. The longest is
    found by reading the data once before.

    Killed at any moment, the same call continues where it was. Under ``accelerate launch`` every
    process writes its own shards; so do independent processes that are told their ``ranks``.

    Args:
        teacher: the network, or an ``Ensemble`` of several; it is not changed, and answers in eval
            mode without gradients.
        data: batches, see :mod:`rarefy.batches`, that can be read more than once.
        path: a folder, made if there is none.
        views: answers to each example, at least 1: for more than one, ``data`` must be a
            ``DataLoader`` over a :class:`Replay`.
        form: :class:`Dense`, :class:`TopK`, :class:`Sampled` or :class:`Outputs`, of
            ``rf.soft_labels``; None for the smaller of Dense and TopK. These keep probabilities of
            classes that exclude each other: for multi-label outputs, regression and images, and for
            losses that compare the logits themselves, name ``Outputs()``.
        mass: share of the probability that the k of TopK keeps, on average over one batch of
            examples: spread evenly over a data set, or the first of other batches. In (0, 1];
            counts where ``form`` is None.
        temperature: the highest at which the labels will be used, above 0: the higher, the more
            classes it takes to keep that mass. Counts where ``form`` is None.
        dim: dimension of the classes in a batch of outputs; None for the last one of ``(N, C)``
            and ``(N, L, C)``. Others, such as ``(N, C, H, W)``, are named: ``dim=1``.
        seed: of the draws of Sampled, at least 0 and below 2^32.
        resume: whether to continue a store that was begun.
        overwrite: whether to replace one; not with ``ranks``, which cannot wait for each other.
        ranks: ``(rank, number of ranks)`` of this process; None for those of Accelerate.
        progress: show a bar on a terminal.

    Returns:
        The manifest of the store.

    Raises:
        InputError: an option is out of range, or the outputs have no fixed shape.
        DataError: the data are empty, can be read only once, differ from one reading to the next,
            or the teacher's answers hold NaN.
        OutputError: the folder holds another store, the disk is too small or becomes full, or
            another process writes the same shard. What was stored stays good.
        TrainingError: the teacher's weights changed while it answered.

    Example:
        >>> import tempfile
        >>> batches = [torch.zeros(8, 4), torch.ones(8, 4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = write_soft_labels(nn.Linear(4, 3), batches, folder, progress=False)
        >>> store.data.samples, store.shape, store.kind
        (16, (3,), 'dense')
    """
    views = python(views)
    _check(views, form, mass, temperature, seed, ranks)
    if not isinstance(teacher, nn.Module):
        raise InputError(
            f"{WHERE}(teacher)",
            f"a {type(teacher).__name__} is no network",
            "Give an nn.Module; Ensemble([...]) of rf.teachers for the mean of several",
        )
    folder = Path(path)
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(replayable(data))
        accelerator = stack.enter_context(own_accelerator())
        found = source(data, views, f"{WHERE}(data)")
        model = stack.enter_context(answering(teacher, accelerator.device))
        rank, count = ranks or (accelerator.process_index, accelerator.num_processes)
        if overwrite:
            if ranks is not None:
                raise InputError(
                    f"{WHERE}(overwrite=True, ranks={ranks})",
                    "processes that do not know each other would remove what others wrote",
                    "Remove the folder first",
                )
            with together(accelerator):
                if rank == 0:
                    _remove(folder)
        request = _Request(views, form, mass, temperature, dim, seed, count)
        with together(accelerator if ranks is None else None):
            store = _begun(folder, _draft(model, found, accelerator.device, request), resume)
            mine = [s for s in _shards(folder, store) if s.index % count == rank and not s.complete]
            _fill(model, found, accelerator.device, store, mine, progress and rank == 0)
    return store


@dataclass(frozen=True)
class _Request:
    """What was asked for."""

    views: int
    form: Form | None
    mass: float
    temperature: float
    dim: int | None
    seed: int
    ranks: int

    @property
    def words(self) -> str:
        """The form, or by what it is to be chosen."""
        chosen_by = f"mass={self.mass}, temperature={self.temperature}"
        return repr(self.form) if self.form else chosen_by


def _check(
    views: int,
    form: Form | None,
    mass: float,
    temperature: float,
    seed: int,
    ranks: tuple[int, int] | None,
) -> None:
    for option, number in (("mass", mass), ("temperature", temperature)):
        if not isinstance(number, int | float):
            where = f"{WHERE}({option}={number!r})"
            raise InputError(where, "it is no number", f"Write {option}=0.9")
    rules: tuple[tuple[str, object, bool, str], ...] = (
        ("views", views, is_count(views), "a whole number, at least 1"),
        ("form", form, form is None or isinstance(form, Form), "Dense(), TopK(k) or the like"),
        ("mass", mass, 0 < mass <= 1, "a share, above 0 and at most 1"),
        ("temperature", temperature, 0 < temperature < math.inf, "a number above 0"),
        ("seed", seed, 0 <= seed < 2**32, "a whole number, at least 0 and below 2^32"),
        ("ranks", ranks, ranks is None or 0 <= ranks[0] < ranks[1], "(rank, number of ranks)"),
    )
    for name, value, valid, rule in rules:
        if not valid:
            raise InputError(f"{WHERE}({name}={value!r})", f"{name} is {rule}", f"Give {rule}")


# --- what is stored ------------------------------------------------------------------------------


def _draft(model: nn.Module, data: Source, device: torch.device, request: _Request) -> Manifest:
    """The manifest of a new store, from the teacher's answers to a batch."""
    rows, inputs = data.probe(max(data.chunk, PROBED))
    outputs = answer(model, inputs, device, f"{WHERE}(teacher)")
    dim = _class_dim(tuple(outputs.shape[1:]), request)
    sequences = are_sequences(outputs, inputs, dim)
    mask = counted(inputs) if sequences else None
    if sequences:
        outputs = packed(outputs, inputs, longest(data), f"{WHERE}(data)")
    shape = tuple(outputs.shape[1:])
    every = Layout(request.form or Dense(), shape, dim)
    if every.classes == 1 and not isinstance(request.form, Outputs):
        raise InputError(
            f"{WHERE}(form={request.form!r})",
            f"outputs of shape (N{''.join(f', {n}' for n in shape)}) have one class, whose "
            "probability is 1 whatever the teacher says",
            "Write form=rf.soft_labels.Outputs(), which keeps the outputs as they are",
        )
    require_usable(outputs, every, rows, f"{WHERE}(teacher)")
    chosen, kept = request.form, None
    if chosen is None:
        seen = every.flat(outputs)
        if mask is not None:
            real = torch.arange(seen.shape[1]) < mask.cpu().sum(1, keepdim=True)
            seen = seen[real.to(seen.device)][:, None]
        chosen, kept = form_for(seen, request.mass, request.temperature)
    layout = Layout(chosen, shape, dim)
    return Manifest(
        teacher=Teacher(class_name=type(model).__name__, fingerprint=fingerprint(model)),
        data=DataFacts(
            ids=data.ids,  # type: ignore[arg-type]
            samples=data.samples,
            inputs=probed_hashes(data),
            transform=data.transform,
        ),
        views=request.views,
        kind=chosen.kind,
        options=chosen.options,
        request=request.words,
        kept_mass=kept,
        shape=shape,
        sequences=sequences,
        dim=dim,
        dtype=str(outputs.dtype).removeprefix("torch."),
        seed=request.seed,
        salt=secrets.randbits(32),
        shard_rows=_shard_rows(
            request.views * data.samples, layout.dtype.itemsize, request.ranks, data.chunk
        ),
        versions=manifests.versions(),
    )


def _class_dim(shape: tuple[int, ...], request: _Request) -> int:
    """The dimension of the classes among those of a batch."""
    if request.dim is None and (len(shape) <= 2 or isinstance(request.form, Outputs)):
        return -1
    if request.dim is None or request.dim == 0 or not -len(shape) <= request.dim <= len(shape):
        raise InputError(
            f"{WHERE}(dim={request.dim!r})",
            f"which dimension of outputs (N, {', '.join(map(str, shape))}) are the classes?",
            "Write dim=1 for (N, C, H, W), or form=Outputs() where there are no classes",
        )
    return request.dim


def _shard_rows(rows: int, size: int, ranks: int, chunk: int) -> int:
    """Records of a shard: about 64 MiB, as many shards for each rank, of whole batches."""
    count = min(math.ceil(rows * size / SHARD_BYTES), MOST_SHARDS)
    each = math.ceil(rows / (math.ceil(count / ranks) * ranks))
    return math.ceil(each / chunk) * chunk if each >= 16 * chunk else each


def _begun(folder: Path, draft: Manifest, resume: bool) -> Manifest:
    """The manifest of the store in a folder, which is the draft's where there is none."""
    shards = any(folder.glob("shard-*.*"))  # first: others may begin this store meanwhile
    if not (folder / manifests.NAME).is_file():
        if shards:
            raise OutputError(
                str(folder),
                "it holds shards without a manifest",
                "Put the manifest back, replace them with overwrite=True, or choose another folder",
            )
        _require_space(folder, draft)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            store = manifests.save(draft, folder)
        except OSError as error:
            raise OutputError(
                str(folder), f"it cannot be written ({error})", "Choose another folder"
            ) from error
    elif not resume:
        raise OutputError(
            str(folder),
            "it holds soft labels",
            "Continue them with resume=True, replace them with overwrite=True, or choose another "
            "folder",
        )
    else:
        store = manifests.load(folder)
    found = manifests.differences(store, draft)
    if found:
        what, remedies = zip(*found, strict=True)
        raise OutputError(
            str(folder),
            "it holds other soft labels: " + "; ".join(what),
            "To continue them, " + "; ".join(dict.fromkeys(remedies)) + ". To replace them, "
            "overwrite=True",
        )
    _require_space(folder, store)
    return store


def _require_space(folder: Path, store: Manifest) -> None:
    """Refuse to begin what the disk has no room for."""
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    needed, free = store.bytes - held_bytes(folder), shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(
            str(folder),
            f"{store.rows:,} records of {store.layout.dtype.itemsize:,} bytes need {needed:,} "
            f"bytes more, and {free:,} are free",
            "Free space, choose another disk, or keep less: a smaller mass, fewer views",
        )


def _remove(folder: Path) -> None:
    """Remove a store, its manifest first: what remains, if this is killed, is served to nobody."""
    try:
        for file in (folder / manifests.NAME, *folder.glob("shard-*.*")):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            str(folder), f"the store cannot be removed ({error})", "Choose another folder"
        ) from error


def _shards(folder: Path, store: Manifest) -> list[Shard]:
    return list(shards_of(folder, store.rows, store.shard_rows))


# --- filling it ----------------------------------------------------------------------------------


def _fill(
    model: nn.Module,
    data: Source,
    device: torch.device,
    store: Manifest,
    shards: Sequence[Shard],
    shown: bool,
) -> None:
    """Answer what is missing from some shards."""
    layout = store.layout
    begins = [(begun(shard, layout, store.salt), shard.stop) for shard in shards]
    spans = [(start, stop) for start, stop in begins if start < stop]
    title = f"soft labels, {store.bytes / 1e6:,.1f} MB"
    with (
        Bar(title, sum(stop - start for start, stop in spans), shown) as bar,
        _Store(store, shards) as written,
        _Behind(written.add) as behind,
    ):
        for rows, inputs, hashes in data.rows(spans):
            outputs = answer(model, inputs, device, f"{WHERE}(teacher)")
            if store.sequences:
                outputs = packed(outputs, inputs, store.shape[0], f"{WHERE}(data)")
            behind.put((rows, hashes, outputs))
            bar.step(len(rows))
    if shards and fingerprint(model) != store.teacher.fingerprint:
        for shard in shards:
            shard.path.unlink(missing_ok=True)
        raise TrainingError(
            f"{WHERE}(teacher)",
            "the teacher's weights or buffers changed while it only answered; its labels of this "
            "call were removed",
            "Take out of its forward what writes to them, such as statistics kept in eval mode",
        )


class _Store:
    """Shards that are filled in ascending order of rows, one open at a time."""

    def __init__(self, store: Manifest, shards: Sequence[Shard]) -> None:
        self.store, self.layout, self.waiting = store, store.layout, deque(shards)
        self.stack = ExitStack()
        self.current: Appending | None = None
        self._finish()

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def add(self, item: tuple[Array, Array, Tensor]) -> None:
        """Keep the answers to a batch, as far as they are waited for."""
        rows, hashes, outputs = item
        ids = rows % self.store.data.samples
        require_usable(outputs, self.layout, ids, f"{WHERE}(teacher)")
        records = self.layout.pack(outputs, rows, hashes, self.store.seed, self.store.salt)
        first, stop = int(rows[0]), int(rows[-1]) + 1
        while self.waiting and self.waiting[0].start < stop:
            writer = self.current or self._open(self.waiting[0])
            if writer.row < first:
                raise OutputError(
                    str(writer.shard.part),
                    "another process changed it while this one wrote",
                    "Call write_soft_labels again, one process for each rank",
                )
            wanted = records[writer.row - first : min(stop, writer.shard.stop) - first]
            writer.append(wanted)
            if writer.row < writer.shard.stop:
                return
            self._close()

    def _open(self, shard: Shard) -> Appending:
        context = appending(shard, self.layout, self.store.salt)
        self.current = self.stack.enter_context(context)
        return self.current

    def _close(self) -> None:
        self.stack.close()
        self.current = None
        self.waiting.popleft()
        self._finish()

    def _finish(self) -> None:
        """Shards that lack nothing but their name get it."""
        while self.waiting and begun(self.waiting[0], self.layout, self.store.salt) == (
            self.waiting[0].stop
        ):
            with appending(self.waiting.popleft(), self.layout, self.store.salt):
                pass


class _Behind:
    """Work on items in their order in a thread of its own; its error is raised here.

    Args:
        work: what to do with each.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        self.work = work
        self.items: Queue[Any] = Queue(AHEAD)
        self.error: BaseException | None = None
        self.given_up = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Behind:
        self.thread.start()
        return self

    def put(self, item: Any) -> None:
        """Hand an item over; waits while the thread is too far behind."""
        if self.error is not None:
            raise self.error
        self.items.put(item)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.given_up = kind is not None
        self.items.put(None)
        self.thread.join()
        if kind is None and self.error is not None:
            raise self.error

    def _run(self) -> None:
        while (item := self.items.get()) is not None:
            if self.error is None and not self.given_up:
                try:
                    with torch.no_grad():
                        self.work(item)
                except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
                    self.error = error
