"""What a recipe may hold. The rules of Budget, Target and the schemes stay where those are."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from rarefy.errors import InputError
from rarefy.pruning.request import check_fit, removes
from rarefy.pruning.scoring.judging import named, on_data
from rarefy.pruning.sparsity import elements, patterns
from rarefy.schemes import Half, Int8, WeightOnly
from rarefy.types import KINDS, Budget, Limit, Target

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
"""In Python any list, as elsewhere."""

Structure = Literal["channel", "depth"]

IN_A_FILE = "file"
"""Context of a validation: the options are written in a file, not in Python."""


OPTIONAL = ("train", "sparsify")
"""Stages that are left out where nothing is said of them."""


def _allowed(make: Callable[..., object], **fields: Any) -> None:
    """Let an option's own rules speak: its error becomes one that pydantic collects."""
    try:
        make(**fields)
    except InputError as error:
        remedy = error.remedy[:1].lower() + error.remedy[1:]
        raise ValueError(f"{error.what}; {remedy}") from error


def _plain_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


def is_file(source: str) -> bool:
    """Whether a source is written as a file, not as the dotted name of a module."""
    return source.endswith(".py")


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TrainStage(_Options):
    """Training of the network itself, before anything is removed."""

    epochs: Count = 15
    lr: Positive = 0.1


class LimitOptions(_Options):
    """The fields of :class:`~rarefy.types.Limit`."""

    min_keep: int | None = None
    max_drop: float | None = None
    sparsity: float | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        _allowed(self.limit)
        return self

    def limit(self) -> Limit:
        """The limit that these options describe."""
        return Limit(**self.model_dump())


class PruneStage(_Options):
    """What may remain (the fields of :class:`~rarefy.types.Budget`), of what, and how it is scored.

    ``structure`` is ``"channel"``, ``"depth"`` or both; without ``criterion`` units are scored by
    the Fisher information on training examples.
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
    layers: dict[str, float | LimitOptions] = {}
    blocks: int | None = None
    structure: Structure | tuple[Structure, ...] = "channel"
    criterion: Text | None = None
    exclude: Names = ()

    @field_validator(*KINDS, "scope", "min_keep", "max_drop", "round_to")
    @classmethod
    def _each(cls, value: Any, info: ValidationInfo) -> Any:
        share = {} if info.field_name in KINDS else {"macs": 1.0}
        if value is not None:
            _allowed(Budget, **share, **{str(info.field_name): value})
        return value

    @field_validator("criterion")
    @classmethod
    def _criterion(cls, value: str | None) -> str | None:
        if value is not None:
            _allowed(named, criterion=value)
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        _allowed(self.budget)
        _allowed(lambda: check_fit(self.structure, self.budget()))
        return self

    @property
    def informed(self) -> bool:
        """Whether examples help to choose what goes."""
        by_units = self.criterion is None or on_data(self.criterion)
        return by_units or "depth" in removes(self.structure)

    def budget(self) -> Budget:
        """The budget that these options describe."""
        held = {
            path: limit if isinstance(limit, float) else limit.limit()
            for path, limit in self.layers.items()
        }
        own = self.model_dump(exclude={"criterion", "exclude", "layers", "structure"})
        return Budget(**own, layers=held)


class RepairStage(_Options):
    """Closed-form repair on unlabelled training images."""

    samples: Count = 512


class SparsifyStage(_Options):
    """Single weights set to zero after units went and were made up for; training keeps the zeros.

    The fields are those of :func:`rarefy.prune` with such a ``structure``: single weights
    (``"weight"``), N of M (``"2:4"``) or blocks; ``sparsity`` may be left out for N of M, which
    fixes it. Without ``criterion``, weights go by SparseGPT on ``samples`` training examples.
    """

    sparsity: float | None = None
    structure: Text = "weight"
    scope: str = "global"
    criterion: Text | None = None
    samples: Count = 512
    exclude: Names = ()

    @model_validator(mode="after")
    def _together(self) -> Self:
        def check() -> None:
            where = "stages.sparsify"
            patterns.resolved_share(patterns.named(self.structure), self.sparsity, where)
            self.rule()
            self.budget()

        _allowed(check)
        return self

    @property
    def informed(self) -> bool:
        """Whether examples help to choose what goes."""
        return bool(getattr(self.rule(), "needs", True))

    def rule(self) -> elements.ElementCriterion:
        """The criterion that these options name."""
        return elements.named(self.criterion or "sparsegpt")

    def budget(self) -> Budget | None:
        """The share of the weights that goes; None where the structure says it."""
        return None if self.sparsity is None else Budget(sparsity=self.sparsity, scope=self.scope)


class DistillStage(_Options):
    """Training of the pruned or sparse network on the teacher's soft labels."""

    epochs: Count = 15
    lr: Positive = 0.02
    temperature: Positive = 4.0
    label_weight: Share = 0.1


class SchemeOptions(_Options):
    """The fields of a way to quantize, or one of its values."""

    SCHEME: ClassVar[type[Int8 | WeightOnly | Half]]

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        return dict(vars(value)) if isinstance(value, cls.SCHEME) else value

    @field_validator("*")
    @classmethod
    def _each(cls, value: Any, info: ValidationInfo) -> Any:
        _allowed(cls.SCHEME, **info.data, **{str(info.field_name): value})
        return value

    def scheme(self) -> Int8 | WeightOnly | Half:
        """The quantization that these options describe."""
        return self.SCHEME(**self.model_dump())


def _options_of(scheme: type[Int8 | WeightOnly | Half]) -> type[SchemeOptions]:
    """A model with the fields of a scheme, whose own rules hold for each field.

    Names come first: which numbers are allowed depends on them.
    """
    hints = get_type_hints(scheme)
    ordered = sorted(fields(scheme), key=lambda field: hints[field.name] is not str)
    held: dict[str, Any] = {field.name: (hints[field.name], field.default) for field in ordered}
    model = create_model(f"{scheme.__name__}Options", __base__=SchemeOptions, **held)
    model.SCHEME = scheme
    return model


if TYPE_CHECKING:
    Int8Options = SchemeOptions
    WeightOnlyOptions = SchemeOptions
    HalfOptions = SchemeOptions
else:
    Int8Options, WeightOnlyOptions, HalfOptions = map(_options_of, (Int8, WeightOnly, Half))


class QuantizeStage(_Options):
    """How to quantize: at most one of ``int8``, ``weights`` and ``half``, int8 if none is given.

    Each holds the fields of its scheme (:class:`~rarefy.schemes.Int8`,
    :class:`~rarefy.schemes.WeightOnly`, :class:`~rarefy.schemes.Half`). With int8, ``max_drop`` is
    how much validation accuracy may be lost before layers stay in float; with ``epochs``, the
    quantized network is trained on the teacher's soft labels.
    """

    int8: Int8Options | None = None
    weights: WeightOnlyOptions | None = None
    half: HalfOptions | None = None
    max_drop: Share | None = None
    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Positive = 0.001
    temperature: Positive = 4.0
    label_weight: Share = 0.1

    @model_validator(mode="after")
    def _together(self) -> Self:
        given = [name for name in ("int8", "weights", "half") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of int8, weights and half; given are {given}")
        if given not in ([], ["int8"]) and (self.max_drop is not None or self.epochs):
            raise ValueError("max_drop and epochs are for int8; leave them out, or write int8")
        return self

    def scheme(self) -> Int8 | WeightOnly | Half:
        """The quantization that these options describe."""
        options = self.int8 or self.weights or self.half
        return Int8() if options is None else options.scheme()


class TargetOptions(_Options):
    """The fields of :class:`~rarefy.types.Target`."""

    speedup: float | None = None
    size: float | None = None
    max_drop: float | None = None

    @field_validator("speedup", "size", "max_drop")
    @classmethod
    def _each(cls, value: Any, info: ValidationInfo) -> Any:
        _allowed(Target, **{str(info.field_name): value})
        return value

    def target(self) -> Target:
        """The target that these options describe."""
        return Target(**self.model_dump())


class Stages(_Options):
    """The stages with their options; None stands for a stage that is left out.

    Pruning is never left out: None leaves its budget to the target, or to half the MACs where the
    target asks for no speed and no size, and ``PruneStage(macs=1.0)`` keeps all units.
    """

    train: TrainStage | None = None
    prune: PruneStage | None = None
    repair: RepairStage | None = RepairStage()
    sparsify: SparsifyStage | None = None
    distill: DistillStage | None = DistillStage()
    quantize: QuantizeStage | None = QuantizeStage()

    @field_validator("train", "repair", "sparsify", "distill", "quantize", mode="before")
    @classmethod
    def _switch(cls, value: Any, info: ValidationInfo) -> Any:
        """False leaves a stage out, true takes its defaults; in a file, nothing is ambiguous."""
        if value is None and info.context == IN_A_FILE and info.field_name not in OPTIONAL:
            raise ValueError("is empty; write false to leave the stage out, {} for its defaults")
        return {} if value is True else None if value is False else value


class Recipe(_Options):
    """A recipe, valid as a whole. Made by :func:`load_recipe`.

    Attributes:
        source: a Python file, relative to the recipe, or the dotted name of a module.
        model: the function in it that returns the network.
        data: the function in it that returns train, val and test.
        example_inputs: the function in it that returns inputs, or None: the first training batch.
        seed: of everything random.
        out: the output folder, relative to the recipe; :attr:`output` is its full path.
        target: what the compression must reach, or None.
        stages: the stages with their options.
    """

    source: str
    model: str
    data: str
    example_inputs: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    out: Text = "compressed"
    target: TargetOptions | None = None
    stages: Stages = Stages()
    _path: Path = PrivateAttr(default=Path("recipe.yaml"))

    @field_validator("model", "data", "example_inputs")
    @classmethod
    def _function(cls, value: str | None) -> str | None:
        if value is not None and not _plain_name(value):
            raise ValueError("must be the plain name of a function, such as make_model")
        return value

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        if not is_file(value) and not all(map(_plain_name, value.split("."))):
            raise ValueError("must be a file such as my_network.py, or a module such as pkg.nets")
        return value

    @field_validator("source", "out")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("must not hold control characters")
        return value

    @property
    def path(self) -> Path:
        """The recipe file itself."""
        return self._path

    @property
    def output(self) -> Path:
        """The output folder; ``out`` is taken relative to the recipe's own folder."""
        return self._path.parent / self.out
