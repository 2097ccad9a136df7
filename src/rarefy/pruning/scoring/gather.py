"""Evidence for criteria, gathered on data.

Each kind of evidence is gathered in one pass over the data, batch by batch: memory does not grow
with the number of samples. The network computes in eval mode and is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rarefy.batches import seeded
from rarefy.errors import DataError, InputError
from rarefy.graph.program import Ref
from rarefy.graph.trace import Network
from rarefy.pruning.running.inputs import rows, squares
from rarefy.pruning.running.origins import Along
from rarefy.pruning.running.products import Product, matrix, products
from rarefy.pruning.running.taps import End, Runner, Watched, tapped
from rarefy.pruning.scoring import gradients
from rarefy.pruning.scoring.evidence import LABELS, Evidence, Gates, Gram
from rarefy.pruning.scoring.passes import WHERE, Job, LossFunction, Sums, check_differentiable
from rarefy.types import Data

LARGEST = 8192
"""Unknowns of the largest Gram matrix; larger ones are kept as blocks along their diagonal."""

SHARE = 1 / 32
"""Of the rows of inputs that are held at once, what a Gram matrix is estimated from."""

LEAST = 1024
"""Rows that it is estimated from, where there are as many, at least; and four per unknown."""


def gather(
    model: nn.Module,
    network: Network,
    needs: frozenset[str] = frozenset(),
    data: Data | None = None,
    loss: LossFunction | None = None,
    *,
    drawn: bool = False,
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
        drawn: whether labels are drawn though some are given; see
            :class:`~rarefy.pruning.scoring.passes.Job`.
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
        job = Job(model, network, data, loss, LABELS in needs, drawn, generator)
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


# --- units -------------------------------------------------------------------------------------


def _gates(job: Job) -> dict[str, Any]:
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
            check_differentiable(loss)
            loss.backward()  # type: ignore[no-untyped-call]
        sums *= size  # the loss is the mean of the examples' losses
        mean += sums.sum(0)
        absolute += sums.abs().sum(0)
        square += sums.square().sum(0)
        samples += size
    if bool(seen.any()) and not bool(absolute.any()):
        raise DataError(
            WHERE,
            "the gradient of the loss by every unit is zero, so that none is told from another",
            "Check labels (those that the loss ignores have none), loss and weights, or use "
            "criterion='magnitude'",
        )
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


def _activations(job: Job) -> dict[str, Any]:
    units = job.network.coupling.units
    total, count = (torch.zeros(units, dtype=torch.float64) for _ in range(2))

    def read(running: Watched, end: End, values: Mapping[str, Any]) -> dict[str, Tensor]:
        x = values[end.operand].detach().abs()
        tokens = running.origins.tokens_beside(end.operand, x.shape, end.dim)
        each = x.numel() / x.shape[end.dim]
        if tokens is not None:
            x = x.movedim(end.dim, -1).flatten(0, -2)[tokens.to(x.device)]
            end, each = replace(end, dim=1, batch=Along(0)), len(x)
        entries = end.summed(x, 1)[0].cpu()
        total.index_add_(0, end.units, entries)
        count.index_add_(0, end.units, torch.full_like(entries, each))
        return {}

    def attach(running: Watched, found: Sequence[End]) -> None:
        for end in found:
            running.watch(end.node, partial(read, running, end))

    samples = _inputs_seen(job, attach)
    if not bool(torch.isfinite(total).all()):
        raise DataError(WHERE, "activations are NaN or infinite", "Check the data")
    return {"activations": total / count.clamp_min(1), "samples": samples}


# --- inputs of layers --------------------------------------------------------------------------


def _norms(job: Job) -> dict[str, Any]:
    sums = Sums(job.model)
    covered: set[str] = set()

    def read(
        running: Watched, product: Product, index: Tensor, values: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        found = squares(product, values, running.origins)
        flat = sums.totals[sums.paths[product.path]].view(-1)
        flat.index_add_(0, index.to(flat.device), found.reshape(-1).to(flat))
        return {}

    def attach(running: Watched, _: Sequence[End]) -> None:
        for product in products(running.graph, _weights(running)):
            covered.update(_aliases(sums, product.path))
            own = partial(read, running, product, product.index.flatten())
            running.watch(product.node.name, own)

    sums.samples = _inputs_seen(job, attach)
    means = sums.means()
    _check_finite(means)
    found = {path: means[path] for path in means if path in covered}
    return {"norms": found, "samples": sums.samples}


def _grams(job: Job) -> dict[str, Any]:
    sums = Sums(job.model)
    held: dict[str, list[Gram]] = {}

    def read(
        running: Watched, product: Product, gram: Gram, values: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        groups, _, unknowns = gram.index.shape
        given = (values[product.x], values[product.weight])
        enough = partial(_enough, unknowns)
        for part in rows(product, *given, enough, job.generator, running.origins):
            own, count = part.inputs.shape[:2]
            wide = part.inputs.reshape(own, count, -1, unknowns).movedim(2, 1)
            wide = wide.reshape(groups, -1, unknowns)
            scale = part.every / count
            gram.matrix.add_((wide.transpose(1, 2) @ wide).cpu(), alpha=scale)
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
            running.watch(product.node.name, partial(read, running, product, gram))

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


def _aliases(sums: Sums, path: str) -> list[str]:
    """All paths of a parameter."""
    return [other for other, key in sums.paths.items() if key == sums.paths[path]]


def _inputs_seen(job: Job, attach: Callable[[Watched, Sequence[End]], None]) -> int:
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


Gatherer: TypeAlias = Callable[[Job], dict[str, Any]]

GATHERERS: Mapping[str, Gatherer] = {
    "gradients": gradients.means,
    "squares": gradients.squares,
    "gates": _gates,
    "activations": _activations,
    "norms": _norms,
    "grams": _grams,
}
"""Kind of evidence -> its pass over the data."""
