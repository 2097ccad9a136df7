"""Evidence for criteria, gathered on data.

Each kind of evidence is gathered in one pass over the data, batch by batch: memory does not grow
with the number of samples. The network computes in eval mode and is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.batches import (
    arguments,
    batch_size,
    batches,
    between,
    call,
    logits,
    map_tensors,
    seeded,
    tensors,
)
from rarefy.distillation.losses import CrossEntropy
from rarefy.errors import DataError, InputError, RarefyError, first_line
from rarefy.graph.program import Ref
from rarefy.graph.trace import Network
from rarefy.pruning.running.inputs import Product, matrix, products, rows, squares
from rarefy.pruning.running.taps import End, Runner, Watched, tapped
from rarefy.pruning.scoring.evidence import LABELS, Evidence, Gates, Gram
from rarefy.types import Data, Inputs

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> scalar, the mean over the examples of a batch."""

LARGEST = 8192
"""Unknowns of the largest Gram matrix; larger ones are kept as blocks along their diagonal."""

SHARE = 1 / 16
"""Of the rows of inputs that are held at once, what a Gram matrix is estimated from."""

LEAST = 2048
"""Rows that it is estimated from, where there are as many, at least; and four per unknown."""

OWN = 1 << 27
"""Bytes of single samples' gradients that are held at once."""


@dataclass(frozen=True)
class _Job:
    """One pass over the data."""

    model: nn.Module
    network: Network
    data: Data
    loss: LossFunction | None
    labelled: bool
    generator: torch.Generator

    def passes(self, runner: Runner) -> Iterator[tuple[Watched, Inputs, Any, int]]:
        """For each batch, the network that runs on it, inputs, labels and number of examples."""
        for inputs, targets in batches(self.data, WHERE):
            copies = map_tensors(torch.clone, (inputs, targets))  # networks and losses overwrite
            yield runner.of(inputs), *copies, batch_size(inputs)

    def outputs(self, running: Watched, inputs: Inputs) -> Any:
        """What the network returns."""
        try:
            return call(running, inputs)
        except RarefyError:
            raise
        except Exception as error:
            raise DataError(
                WHERE,
                f"the network does not run on a batch: {first_line(error)}",
                "Yield inputs like those that the network was traced with",
            ) from error

    def losses(self, running: Watched, inputs: Inputs, targets: Tensor | None) -> Tensor:
        """The mean loss of a batch."""
        return self.judged(self.outputs(running, inputs), targets)

    def judged(self, answers: Any, targets: Tensor | None) -> Tensor:
        """The mean loss of what the network returned for a batch."""
        if targets is None:
            found = self._surprise(answers)
        else:
            found = self._loss(logits(answers), targets)
        if not isinstance(found, Tensor) or found.ndim:
            raise InputError(
                "prune(loss=...)", "it did not return a scalar tensor", "Return the mean loss"
            )
        if not bool(torch.isfinite(found)):
            raise DataError(WHERE, "the loss of a batch is NaN or infinite", "Check the data")
        return found

    def _loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        if self.loss is None:
            return CrossEntropy()(answers, targets)
        try:
            return self.loss(answers, targets)
        except Exception as error:
            raise InputError(
                "prune(loss=...)",
                f"it raised {first_line(error)}",
                "Give a function (logits, targets) -> mean loss of a batch",
            ) from error

    def _surprise(self, answers: Any) -> Tensor:
        """The loss against targets drawn from what the network predicts.

        Its squared gradients are the Fisher information, on average: of the labels where the
        network gives logits, else of a normal distribution around every output.
        """
        if self.labelled or self.loss is not None:
            raise DataError(
                WHERE,
                "a batch is unlabelled, and this criterion asks for the gradient of the loss",
                "Yield (inputs, targets); criterion='fisher' takes unlabelled data, without loss=",
            )
        scores = _class_scores(answers)
        if scores is None:
            return self._noise(answers)
        last = scores.detach().float().softmax(-1)
        if bool(last.isnan().any()):
            raise DataError(WHERE, "the network's outputs are NaN or infinite", "Check the data")
        drawn = torch.multinomial(last.flatten(0, -2).cpu(), 1, generator=self.generator)
        return CrossEntropy()(scores, drawn.view(last.shape[:-1]).to(scores.device))

    def _noise(self, answers: Any) -> Tensor:
        """For ``t = y + e * rms(y)`` with normal ``e`` the squared error's gradient is that of
        ``e * y / rms(y)``; all outputs of a network count alike, whatever their size."""
        found = [t for t in tensors(answers) if t.is_floating_point() and t.numel()]
        if not found:
            raise InputError(
                "prune(data)", "the network returns no numbers", "Use criterion='magnitude'"
            )
        total = torch.zeros((), dtype=torch.float64)
        for tensor in found:
            noise = torch.randn(tensor.shape, generator=self.generator).to(tensor)
            scale = tensor.detach().square().sum().sqrt().clamp_min(_SMALLEST)
            examples = len(tensor) if tensor.ndim else 1
            total = total + ((noise * tensor).sum() / (scale * examples**0.5)).double().cpu()
        return total


def _class_scores(answers: Any) -> Tensor | None:
    """The logits ``(B, C)`` or ``(B, L, C)`` among a network's outputs, None where it has none."""
    try:
        found = logits(answers)
    except InputError:
        return None
    classes = found.ndim in (2, 3) and found.shape[-1] > 1 and found.is_floating_point()
    return found if classes else None


WHERE = "prune(data)"

_SMALLEST = 1e-12
"""Norm below which outputs are not divided by it."""


def gather(
    model: nn.Module,
    network: Network,
    needs: frozenset[str] = frozenset(),
    data: Data | None = None,
    loss: LossFunction | None = None,
    *,
    seed: int = 0,
) -> Evidence:
    """Find out on data what a criterion needs to know.

    Where labels need not and are not given, they are drawn from the probabilities that the network
    itself gives them; where its outputs are no logits, noise takes their place.

    Args:
        model: the network.
        network: its trace.
        needs: kinds of evidence, attributes of :class:`Evidence`; ``"labels"`` where labels must
            be given.
        data: batches; all of them are used.
        loss: (logits, targets) -> mean loss of a batch; cross entropy if not given.
        seed: of labels that are drawn.

    Raises:
        InputError: a need is none that is known, or data are needed and not given.
        DataError: the data are empty, unlabelled where labels are needed, or give a loss or
            gradients that are not finite.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    evidence = Evidence(tensors, frozenset(_scales(network)))
    unknown = needs - GATHERERS.keys() - {LABELS}
    if unknown:
        raise InputError(
            f"criterion with needs {sorted(unknown)}",
            "no evidence of that kind is known",
            f"Use some of {', '.join([*GATHERERS, LABELS])}",
        )
    if not needs - {LABELS}:
        return evidence
    if data is None:
        more = " labelled, and loss= where it is not cross entropy" if LABELS in needs else ""
        raise InputError(
            "prune(criterion=...)",
            f"it needs data ({', '.join(sorted(needs))})",
            f"Give data=, batches of examples{',' if more else ''}{more}",
        )
    for need in sorted(needs - {LABELS}):
        generator = torch.Generator().manual_seed(seed)
        job = _Job(model, network, data, loss, LABELS in needs, generator)
        with seeded(seed):
            evidence = replace(evidence, **GATHERERS[need](job))
    return evidence


def _scales(network: Network) -> Iterator[str]:
    """Paths of parameters that scale the result of a normalization."""
    graph = network.captured.graph
    for node in graph.calls:
        if node.kind.endswith("_norm"):
            weight = node.argument("weight")
            source = graph.by_name[weight.name] if isinstance(weight, Ref) else None
            if source is not None and source.op == "tensor":
                yield source.path


# --- gradients ---------------------------------------------------------------------------------


def _gradients(job: _Job) -> dict[str, Any]:
    """The mean gradient, as training would have it."""
    total = _Sums(job.model)
    runner = Runner(job.model, job.network, trainable=True, where=WHERE)
    for running, inputs, targets, size in job.passes(runner):
        total.add(_gradient(job, running, inputs, targets), size, size)
    return {"gradients": total.means(), "samples": total.samples}


def _squares(job: _Job) -> dict[str, Any]:
    """The mean of the squares of each sample's own gradient."""
    total = _Sums(job.model)
    runner = Runner(job.model, job.network, trainable=True, where=WHERE)
    alone: set[Watched] = set()
    most = max(1, OWN // max(total.bytes, 1))
    for running, inputs, targets, size in job.passes(runner):
        for start in range(0, size, most):
            some = range(start, min(start + most, size))
            for found, count in _own(job, running, inputs, targets, some, alone):
                total.add(found, 1, count)
    return {"squares": total.means(), "samples": total.samples}


def _own(
    job: _Job,
    running: Watched,
    inputs: Inputs,
    targets: Tensor | None,
    some: range,
    alone: set[Watched],
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Squares of the gradients of some samples of a batch, summed, and of how many.

    All at once, as far as the network's operators can; else one by one.

    Args:
        alone: networks that were found to take samples one by one only, to which this one is added.
    """
    if len(some) > 1 and running not in alone:
        drawn = job.generator.get_state()
        try:
            found = _together(job, running, map_tensors(torch.clone, inputs), targets, some)
        except Exception:  # noqa: BLE001 - operators raise anything; one by one, errors are clear
            alone.add(running)
            job.generator.set_state(drawn)
        else:
            yield found, len(some)
            return
    size = batch_size(inputs)
    for n in some:
        single, target = (between(v, n, n + 1, size) for v in (inputs, targets))
        found = _gradient(job, running, map_tensors(torch.clone, single), target)
        yield {path: _wide(g).square_() for path, g in found.items()}, 1


def _together(
    job: _Job, running: Watched, inputs: Inputs, targets: Tensor | None, some: range
) -> dict[str, Tensor]:
    """The sum of the squares of the gradients of samples' losses, by path in the graph.

    Each sample meets weights of its own, which are the network's without a copy.
    """
    size = batch_size(inputs)
    leaves = {p: t for p, t in running.named_parameters() if t.requires_grad}
    own = {p: t.detach().expand(len(some), *t.shape).requires_grad_() for p, t in leaves.items()}

    def is_batch(tensor: Tensor) -> bool:
        return bool(tensor.ndim) and len(tensor) == size

    def answer(weights: dict[str, Tensor], given: list[Tensor]) -> Any:
        left = iter(given)
        single = map_tensors(lambda t: next(left)[None] if is_batch(t) else t, inputs)
        return functional_call(running, weights, *arguments(single))

    given = [t[some.start : some.stop] for t in tensors(inputs) if is_batch(t)]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _at_once():
        answers = vmap(answer)(own, given)
        losses = [
            job.judged(map_tensors(itemgetter(k), answers), between(targets, n, n + 1, size))
            for k, n in enumerate(some)
        ]
        for loss in losses:
            _check_differentiable(loss)
    total = torch.stack(losses).sum()
    found = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    return _finite(own, (None if g is None else _wide(g).square_().sum(0) for g in found))


@contextmanager
def _at_once() -> Iterator[None]:
    """``vmap`` refuses operators that it would call sample by sample, and complain of."""
    switch: Any = torch._C._functorch
    held = switch._is_vmap_fallback_enabled()
    switch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        switch._set_vmap_fallback_enabled(held)


def _wide(gradient: Tensor) -> Tensor:
    """In float32 at least: squares of half precision are zero below 2e-4."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _gradient(
    job: _Job, running: Watched, inputs: Inputs, targets: Tensor | None
) -> dict[str, Tensor]:
    """The gradient of the mean loss of a batch, by path in the graph."""
    with torch.enable_grad():
        loss = job.losses(running, inputs, targets)
    leaves = {p: t for p, t in running.named_parameters() if t.requires_grad}
    _check_differentiable(loss)
    return _finite(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))


def _finite(paths: Iterable[str], found: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """Gradients by path, those that there are."""
    gradients = {p: g for p, g in zip(paths, found, strict=True) if g is not None}
    for path, gradient in gradients.items():
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                WHERE,
                f"the gradient of the loss by {path} is NaN or infinite",
                "Check the data, the loss and that weight",
            )
    return gradients


def _check_differentiable(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise InputError(
            "prune(criterion=...)",
            "the loss does not depend on the network's weights by a gradient",
            "Return a loss computed from the logits, and leave detach() and no_grad() out of both",
        )


class _Sums:
    """Sums by parameter path, each under all paths of a shared parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[str, int] = {}
        self.totals: dict[int, Tensor] = {}
        self.samples = 0
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                self.paths[path] = id(parameter)
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                zeros = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
                self.totals.setdefault(id(parameter), zeros)

    @property
    def bytes(self) -> int:
        """Of all sums."""
        return sum(t.numel() * t.element_size() for t in self.totals.values())

    def add(self, values: Mapping[str, Tensor], factor: float, size: int) -> None:
        """Add values of a batch, times a factor."""
        for path, value in values.items():
            self.totals[self.paths[path]].add_(value, alpha=factor)
        self.samples += size

    def means(self) -> dict[str, Tensor]:
        """Total over number of samples, by path."""
        count = max(self.samples, 1)
        means = {key: total.div_(count) for key, total in self.totals.items()}
        return {path: means[key] for path, key in self.paths.items()}


# --- units -------------------------------------------------------------------------------------


def _gates(job: _Job) -> dict[str, Any]:
    units = job.network.coupling.units
    mean, absolute, square = (torch.zeros(units, dtype=torch.float64) for _ in range(3))
    seen = torch.zeros(units, dtype=torch.bool)
    batch: dict[str, Any] = {}

    def attach(running: Watched, found: Sequence[End]) -> None:
        for operand, here in _by_operand(found):
            seen[torch.cat([end.units for end in here])] = True
            running.watch(here[0].node, partial(_tap, operand, here, batch))

    runner = Runner(job.model, job.network, attach, where=WHERE)
    samples = 0
    for running, inputs, targets, size in job.passes(runner):
        batch["sums"] = sums = torch.zeros(size, units, dtype=torch.float64)
        with torch.enable_grad():
            loss = job.losses(running, inputs, targets)
            _check_differentiable(loss)
            loss.backward()  # type: ignore[no-untyped-call]
        sums *= size  # the loss is the mean of the examples' losses
        mean += sums.sum(0)
        absolute += sums.abs().sum(0)
        square += sums.square().sum(0)
        samples += size
    gates = Gates(mean / samples, absolute / samples, square / samples, seen)
    return {"gates": gates, "samples": samples}


def _tap(
    operand: str, here: Sequence[End], batch: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Tensor]:
    def report(x: Tensor, gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise DataError(
                WHERE,
                f"the gradient of the loss by what {here[0].node} reads is NaN or infinite",
                "Check the data, the loss and the weights of that layer",
            )
        sums: Tensor = batch["sums"]
        product = x.to(torch.promote_types(x.dtype, torch.float32)) * gradient
        for end in here:
            sums.index_add_(1, end.units, end.summed(product, len(sums)).cpu())

    return {operand: tapped(values[operand], report)}


def _by_operand(found: Sequence[End]) -> Iterator[tuple[str, list[End]]]:
    """Ends at one operand of one call, together."""
    held: dict[tuple[str, str], list[End]] = {}
    for end in found:
        held.setdefault((end.node, end.operand), []).append(end)
    for (_, operand), here in held.items():
        yield operand, here


def _activations(job: _Job) -> dict[str, Any]:
    units = job.network.coupling.units
    total, count = (torch.zeros(units, dtype=torch.float64) for _ in range(2))

    def read(end: End, values: Mapping[str, Any]) -> dict[str, Tensor]:
        x = values[end.operand].detach().abs()
        entries = end.summed(x, 1)[0].cpu()
        total.index_add_(0, end.units, entries)
        each = x.numel() / x.shape[end.dim]
        count.index_add_(0, end.units, torch.full_like(entries, each))
        return {}

    def attach(running: Watched, found: Sequence[End]) -> None:
        for end in found:
            running.watch(end.node, partial(read, end))

    samples = _inputs_seen(job, attach)
    if not bool(torch.isfinite(total).all()):
        raise DataError(WHERE, "activations are NaN or infinite", "Check the data")
    return {"activations": total / count.clamp_min(1), "samples": samples}


# --- inputs of layers --------------------------------------------------------------------------


def _norms(job: _Job) -> dict[str, Any]:
    sums = _Sums(job.model)
    covered: set[str] = set()

    def read(product: Product, values: Mapping[str, Any]) -> dict[str, Tensor]:
        found = squares(product, values)
        flat = sums.totals[sums.paths[product.path]].view(-1)
        flat.index_add_(0, product.index.reshape(-1).to(flat.device), found.reshape(-1).to(flat))
        return {}

    def attach(running: Watched, _: Sequence[End]) -> None:
        for product in products(running.graph, _weights(running)):
            covered.update(_aliases(sums, product.path))
            running.watch(product.node.name, partial(read, product))

    sums.samples = _inputs_seen(job, attach)
    means = sums.means()
    _check_finite(means)
    found = {path: means[path] for path in means if path in covered}
    return {"norms": found, "samples": sums.samples}


def _grams(job: _Job) -> dict[str, Any]:
    sums = _Sums(job.model)
    held: dict[str, list[Gram]] = {}

    def read(product: Product, gram: Gram, values: Mapping[str, Any]) -> dict[str, Tensor]:
        groups, _, unknowns = gram.index.shape
        given = (values[product.x], values[product.weight])
        for part, every in rows(product, *given, partial(_enough, unknowns), job.generator):
            wide = part.reshape(part.shape[0], part.shape[1], -1, unknowns).movedim(2, 1)
            wide = wide.reshape(groups, -1, unknowns)
            gram.matrix.add_((wide.transpose(1, 2) @ wide).cpu(), alpha=every / part.shape[1])
        return {}

    def attach(running: Watched, _: Sequence[End]) -> None:
        for product in products(running.graph, _weights(running)):
            if not product.has_rows:
                continue
            index = _blocks(matrix(product, product.index))
            grams = held.setdefault(product.path, [])
            gram = next((g for g in grams if torch.equal(g.index, index)), None)
            if gram is None:
                size = (index.shape[0], index.shape[2], index.shape[2])
                gram = Gram(torch.zeros(size, dtype=torch.float64), index)
                grams.append(gram)
            running.watch(product.node.name, partial(read, product, gram))

    samples = _inputs_seen(job, attach)
    for path, grams in held.items():
        for gram in grams:
            gram.matrix.div_(samples)
        _check_finite({path: torch.stack([g.matrix.sum() for g in grams])})
    found = {alias: tuple(grams) for path, grams in held.items() for alias in _aliases(sums, path)}
    return {"grams": found, "samples": samples}


def _enough(unknowns: int, every: int) -> int:
    """Rows that a Gram matrix is estimated from.

    Neighbouring positions are much alike: all of them would cost several times what the network
    itself does, and tell little more.
    """
    return max(round(SHARE * every), 4 * unknowns, LEAST)


def _blocks(index: Tensor) -> Tensor:
    """Positions with their unknowns in as many equal blocks as make none too large."""
    groups, outputs, unknowns = index.shape
    count = next(
        n for n in range(1, unknowns + 1) if unknowns % n == 0 and unknowns // n <= LARGEST
    )
    return index.reshape(groups, outputs, count, -1).movedim(2, 1).flatten(0, 1)


def _weights(running: Watched) -> dict[str, Tensor]:
    """Parameters that are matrices or kernels."""
    named = running.named_parameters(remove_duplicate=False)
    return {path: p for path, p in named if p.ndim > 1 and p.is_floating_point()}


def _aliases(sums: _Sums, path: str) -> list[str]:
    """All paths of a parameter."""
    return [other for other, key in sums.paths.items() if key == sums.paths[path]]


def _inputs_seen(job: _Job, attach: Callable[[Watched, Sequence[End]], None]) -> int:
    runner = Runner(job.model, job.network, attach, where=WHERE)
    samples = 0
    for running, inputs, _, size in job.passes(runner):
        with torch.no_grad():
            job.outputs(running, inputs)
        samples += size
    return samples


def _check_finite(found: Mapping[str, Tensor]) -> None:
    for path, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                WHERE, f"inputs of the layer of {path} are NaN or infinite", "Check the data"
            )


Gatherer: TypeAlias = Callable[[_Job], dict[str, Any]]

GATHERERS: Mapping[str, Gatherer] = {
    "gradients": _gradients,
    "squares": _squares,
    "gates": _gates,
    "activations": _activations,
    "norms": _norms,
    "grams": _grams,
}
"""Kind of evidence -> its pass over the data."""
