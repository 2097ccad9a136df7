"""Frozen values that options and results are made of. No logic lives here beyond validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor, nn

from rarefy.errors import BudgetError, InputError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a network is called with: a tensor ``model(x)``, a tuple ``model(*x)``, a mapping
``model(**x)``."""

Batch: TypeAlias = Any
"""``(inputs, targets)``, or unlabelled ``inputs``; see :mod:`rarefy.batches`."""

Data: TypeAlias = Iterable[Batch]
"""Any iterable of batches that can be iterated more than once, such as a ``DataLoader``."""


def check_network(model: object, where: str) -> None:
    """Refuse what is no network."""
    if not isinstance(model, nn.Module):
        raise InputError(where, f"a {type(model).__name__} was given", "Give an nn.Module")


def python(value: Any) -> Any:
    """A number of NumPy's as Python's, which files and records hold; all else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_count(value: object) -> bool:
    """Whether it is a whole number, at least 1."""
    value = python(value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_counts(options: object, names: str, example: int) -> None:
    """Refuse values that are no whole numbers of at least 1; NumPy's become Python's.

    Args:
        options: a dataclass.
        names: of its fields, with spaces between.
        example: what the error suggests.
    """
    for name in names.split():
        value = python(getattr(options, name))
        object.__setattr__(options, name, value)
        if not is_count(value):
            raise InputError(
                f"{type(options).__name__}({name}={value!r})",
                "it is a whole number, at least 1",
                f"Write {name}={example}",
            )


def check_numbers(options: object, names: str, kind: type[int] | type[float]) -> None:
    """Refuse values that are no numbers: text, booleans, NaN, infinity."""
    for name in names.split():
        value = python(getattr(options, name))
        object.__setattr__(options, name, value)
        accepted = isinstance(value, int if kind is int else int | float)
        if value is None or (accepted and not isinstance(value, bool) and isfinite(value)):
            continue
        what = "it must be a whole number" if kind is int else "it must be a finite number"
        where = f"{type(options).__name__}({name}={value!r})"
        error = BudgetError if isinstance(options, Budget | Limit) else InputError
        raise error(where, what, f"Write {name}={'8' if kind is int else '0.5'} or the like")


def check_choice(options: object, name: str, choices: tuple[object, ...]) -> None:
    value = getattr(options, name)
    if not any(
        value is choice or (isinstance(value, str) and value == choice) for choice in choices
    ):
        raise InputError(
            f"{type(options).__name__}({name}={value!r})",
            f"unknown {name}",
            f"Use {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}",
        )


def _check_share(owner: str, name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise BudgetError(
            f"{owner}({name}={value!r})",
            "a budget is the share of the original that may remain, above 0 and at most 1",
            f"Write {name}=0.5 to keep half",
        )


def _check_sparsity(owner: str, value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise BudgetError(
            f"{owner}(sparsity={value!r})",
            "sparsity is the share that goes, at least 0 and below 1",
            "Write sparsity=0.5 to remove half",
        )


def _check_at_least_one(options: object, names: str) -> None:
    for name in names.split():
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BudgetError(
                f"{type(options).__name__}({name}={value!r})",
                f"{name} must be at least 1",
                f"Write {name}=1",
            )


@dataclass(frozen=True)
class Limit:
    """What may go of one layer; what is not given is as in the budget.

    Args:
        min_keep: the smallest number of units that it keeps.
        max_drop: the largest share of its units that may go, in [0, 1].
        sparsity: the share of its units that goes, in [0, 1), whatever the budget; given alone.

    Raises:
        BudgetError: nothing is given, or a value is out of range.

    Example:
        >>> Limit(max_drop=0.25).max_drop
        0.25
    """

    min_keep: int | None = None
    max_drop: float | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "max_drop sparsity", float)
        check_numbers(self, "min_keep", int)
        _check_at_least_one(self, "min_keep")
        _check_sparsity("Limit", self.sparsity)
        bounded = self.min_keep is not None or self.max_drop is not None
        if (self.sparsity is not None) == bounded:
            raise BudgetError(
                "Limit(...)",
                "it takes a sparsity, or else bounds (min_keep, max_drop)",
                "Write for example Limit(max_drop=0.25)",
            )
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise BudgetError(
                f"Limit(max_drop={self.max_drop!r})",
                "it is the largest share of units that may go, from 0 to 1",
                "Write max_drop=0.25 to keep three quarters",
            )


COUNTED = ("macs", "params", "sparsity")
"""Budgets that are counted on the network itself."""

MEASURED = ("bytes", "latency")
"""Budgets that are measured on the files made of it."""

NUMBERED = ("blocks",)
"""Budgets that are the number of what goes, and no share."""

KINDS = (*COUNTED, *MEASURED, *NUMBERED)
"""The fields of a budget of which one is given."""


@dataclass(frozen=True)
class Budget:
    """How much of a network may remain. Exactly one of the shares is given.

    Args:
        macs: share of the multiply-accumulate operations to keep, in (0, 1].
        params: share of the parameters to keep, in (0, 1].
        bytes: share of the saved file (:func:`rarefy.save`) to keep, in (0, 1].
        latency: share of the latency to keep, in (0, 1], measured in the runtime.
        sparsity: share of units (or weights, or blocks) to *remove*, in [0, 1).
        scope: ``"global"`` ranks all units of the network together; ``"local"`` takes the same
            share from every group.
        min_keep: the smallest number of units that any group keeps.
        max_drop: the largest share of a group's units that may go, in (0, 1].
        round_to: widths are rounded up to a multiple of this number where that is possible;
            ``"auto"`` takes the one that the runtime computes fast, as does a budget of latency
            where this is 1. Groups of no more units than that may keep any number.
        layers: limits of single layers by module or parameter path, which concern the width of
            their own outputs: a :class:`Limit`, or a number, the share of units that goes. Paths
            may hold the wildcards ``*``, ``?`` and ``[...]``, where ``*`` also matches dots. Of
            several that match, the last counts.
        blocks: instead of a share, the number of residual blocks to *remove*.

    Raises:
        BudgetError: no share or several are given, or one is out of range.

    Example:
        >>> Budget(macs=0.5, layers={"layer1.*": Limit(min_keep=16), "stem": 0.25}).layers
        (('layer1.*', Limit(min_keep=16, max_drop=None, sparsity=None)), \
('stem', Limit(min_keep=None, max_drop=None, sparsity=0.25)))
    """

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    sparsity: float | None = None
    scope: str = "global"
    min_keep: int = 1
    max_drop: float = 0.95
    round_to: int | Literal["auto"] = 1
    layers: Mapping[str, float | Limit] | tuple[tuple[str, Limit], ...] = ()
    blocks: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "macs params bytes latency sparsity max_drop", float)
        check_numbers(self, "min_keep blocks", int)
        for name in ("min_keep", "max_drop", "round_to"):
            if getattr(self, name) is None:
                raise BudgetError(
                    f"Budget({name}=None)", "it must be a number", "Leave it out for its default"
                )
        given = [n for n in KINDS if getattr(self, n) is not None]
        if len(given) != 1:
            raise BudgetError(
                "Budget(...)",
                f"exactly one of {', '.join(KINDS)} must be given, not {given or 'none'}",
                "Write for example Budget(macs=0.5)",
            )
        for name in ("macs", "params", "bytes", "latency"):
            _check_share("Budget", name, getattr(self, name))
        if not 0 < self.max_drop <= 1:
            raise BudgetError(
                f"Budget(max_drop={self.max_drop!r})",
                "it is the largest share of a group's units that may go, above 0 and at most 1",
                "Write max_drop=0.5 to keep half of each; exclude and layers hold single layers",
            )
        _check_sparsity("Budget", self.sparsity)
        if self.blocks is not None and self.blocks < 0:
            raise BudgetError(
                f"Budget(blocks={self.blocks!r})",
                "it is the number of blocks to remove, at least 0",
                "Write blocks=2 to remove two",
            )
        if self.scope not in ("global", "local"):
            raise BudgetError(
                f"Budget(scope={self.scope!r})", "unknown scope", "Use 'global' or 'local'"
            )
        _check_at_least_one(self, "min_keep")
        if self.round_to != "auto":
            check_numbers(self, "round_to", int)
            _check_at_least_one(self, "round_to")
        object.__setattr__(self, "layers", _limits(self.layers))  # frozen, and hashable

    @property
    def kind(self) -> str:
        """The name of the share that is given."""
        return next(n for n in KINDS if getattr(self, n) is not None)

    @property
    def share(self) -> float:
        """The share that is given, or the number of blocks."""
        return float(getattr(self, self.kind))

    @property
    def of_units(self) -> Mapping[str, object]:
        """What is given that concerns units alone, by its name."""
        defaults = {f.name: f.default for f in fields(self)}
        names = ("min_keep", "max_drop", "round_to", "layers")
        held = {name: getattr(self, name) for name in names}
        return {name: value for name, value in held.items() if value != defaults[name]}

    @property
    def limits(self) -> tuple[tuple[str, Limit], ...]:
        """The limits of single layers, in their order."""
        assert isinstance(self.layers, tuple)
        return self.layers


def _limits(layers: object) -> tuple[tuple[str, Limit], ...]:
    """Limits by path in one form: a number stands for a share that goes.

    Raises:
        BudgetError: it is no mapping from paths to limits or numbers.
    """
    pairs = tuple(layers.items()) if isinstance(layers, Mapping) else layers
    found = []
    for pair in pairs if isinstance(pairs, tuple | list) else (pairs,):
        path, limit = pair if isinstance(pair, tuple) and len(pair) == 2 else (pair, None)
        limit = python(limit)
        if isinstance(limit, int | float) and not isinstance(limit, bool):
            limit = Limit(sparsity=limit)
        if not isinstance(path, str) or not isinstance(limit, Limit):
            raise BudgetError(
                f"Budget(layers={layers!r})",
                f"{path!r} has no limit" if limit is None else f"{path!r}: {limit!r} is no limit",
                'Write for example layers={"layer1.0.conv1": 0.3, "layer2.*": Limit(min_keep=16)}',
            )
        found.append((path, limit))
    return tuple(found)


@dataclass(frozen=True)
class Target:
    """What a compression must reach to be called a success; every figure is measured.

    Args:
        speedup: latency of the original over latency of the result, in the same runtime.
        size: bytes of the original's file over bytes of the result's file.
        max_drop: the largest loss of the metric, e.g. 0.01 for one point of accuracy.
    """

    speedup: float | None = None
    size: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "speedup size max_drop", float)
        for name in ("speedup", "size"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise InputError(
                    f"Target({name}={value!r})", "a target factor is at least 1", f"Write {name}=2"
                )
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise InputError(
                f"Target(max_drop={self.max_drop!r})",
                "a drop is a share between 0 and 1",
                "Write 0.01 for one point",
            )


@dataclass(frozen=True)
class Latency:
    """Latency of one call in milliseconds: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Ratio:
    """A measured latency as a share of another, with the interval that holds it with 95 %.

    Example:
        >>> str(Ratio(0.5, 0.48, 0.51))
        '0.500 (0.480 to 0.510)'
    """

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Ratio:
        """A share without noise."""
        return cls(value, value, value)

    @property
    def noise(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        interval = f" ({self.low:.3f} to {self.high:.3f})" if self.low < self.high else ""
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class Cost:
    """MACs of one example, and parameters.

    Attributes:
        macs: of one example.
        params: number of parameter values, shared ones once.
        by_layer: MACs by module path; calls outside of any submodule under ``""``.
        uncounted: operators whose cost is not known, with how often they occur.
        params_by_layer: parameter values by the path of the module that holds them.
    """

    macs: int
    params: int
    by_layer: Mapping[str, int]
    uncounted: Mapping[str, int]
    params_by_layer: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What was measured on one file or network in one runtime.

    Attributes:
        path: the file that was measured, or the class of the network.
        runtime: e.g. ``"onnxruntime"``, with its version.
        threads: intra-op threads.
        bytes: size of the file on disk: the ONNX file, or for a network that PyTorch runs, the
            file that :func:`rarefy.save` makes of it.
        latency_ms: per call, on the inputs given.
        calls: how many calls were timed.
        batch: examples of one call.
        busy_ms: the processor's time that the process spent on a call; it is above the latency
            where several threads work, and below it where other programs take the processor.
        share: latency as a share of the first's, where several were measured side by side; with one
            thread, of the processor's time, which other programs do not lengthen.
        accuracy: top-1 of what the runtime computes, 0 to 1, where labelled data were given.
        peak_mb: megabytes (10^6 bytes) that loading and calling it takes at most, where asked for.
        cost: MACs and parameters by layer, of networks.
        notes: what could not be measured, and why.
    """

    path: str
    runtime: str
    threads: int
    bytes: int
    latency_ms: Latency
    calls: int
    batch: int
    busy_ms: Latency | None = None
    share: Ratio | None = None
    accuracy: float | None = None
    peak_mb: float | None = None
    cost: Cost | None = None
    notes: tuple[str, ...] = ()

    @property
    def throughput(self) -> float:
        """Examples per second, by the median latency."""
        return 1000 * self.batch / max(self.latency_ms.median, 1e-9)

    @property
    def spread(self) -> float:
        """90th over 10th percentile of the latency: 1 on a machine that nothing disturbs."""
        return self.latency_ms.p90 / max(self.latency_ms.p10, 1e-9)


@dataclass(frozen=True)
class Stage:
    """One stage of a compression with what was measured on its artifact.

    Attributes:
        name: ``"teacher"``, ``"pruned"``, ``"repaired"`` where nothing is done after repair but
            quantization, ``"sparse"``, ``"distilled"``, ``"quantized"``.
        accuracy: top-1 of the reloaded artifact, 0 to 1.
        params: number of parameters.
        macs: multiply-accumulate operations of one example.
        bytes: size of the safetensors file on disk.
        onnx_bytes: size of the exported ONNX file on disk.
        latency_ms: of the ONNX file in onnxruntime.
        calls: how many calls the latency was timed over.
        seconds: wall time that the stage took to make.
        notes: what the reader must know: what was left alone, which target was missed.
    """

    name: str
    accuracy: float
    params: int
    macs: int
    bytes: int
    onnx_bytes: int
    latency_ms: Latency
    calls: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Width:
    """The width of one layer before and after (output channels or features)."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class Check:
    """One claim held against its limit: ``met`` is computed from measured figures."""

    claim: str
    value: float
    limit: float
    met: bool


@dataclass(frozen=True)
class Report:
    """Everything a page shows. Written by :mod:`rarefy.reporting`."""

    title: str
    stages: tuple[Stage, ...]
    widths: tuple[Width, ...]
    checks: tuple[Check, ...]
    frozen: tuple[str, ...]
    seed: int
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
