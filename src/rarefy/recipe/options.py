"""What a recipe may hold. The rules of Budget, Int8 and Target stay where those are defined."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rarefy.errors import InputError
from rarefy.pruning.prune import check_fit, removes
from rarefy.pruning.scoring.judging import named, on_data
from rarefy.schemes import Int8
from rarefy.types import KINDS, Budget, Limit, Target

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]

Structure = Literal["channel", "depth"]

IN_A_FILE = "file"
"""Context of a validation: the options are written in a file, not in Python."""


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
    exclude: tuple[str, ...] = ()

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


class DistillStage(_Options):
    """Training of the pruned network on the teacher's soft labels."""

    epochs: Count = 15
    lr: Positive = 0.02
    temperature: Positive = 4.0
    label_weight: Share = 0.1


class QuantizeStage(_Options):
    """The fields of :class:`~rarefy.schemes.Int8`, and what follows calibration.

    ``max_drop`` is how much validation accuracy may be lost before layers stay in float; with
    ``epochs``, the quantized network is trained on the teacher's soft labels.
    """

    observer: str = "mse"
    percentile: float = 0.9999
    symmetric: bool = False
    activations: str = "static"
    smooth: float | None = 0.5
    equalize: bool = False
    correct_bias: bool = False
    skip: tuple[str, ...] = ()
    max_drop: Share | None = None
    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Positive = 0.001
    temperature: Positive = 4.0
    label_weight: Share = 0.1

    @field_validator("observer", "percentile", "activations", "smooth")
    @classmethod
    def _each(cls, value: Any, info: ValidationInfo) -> Any:
        _allowed(Int8, **{str(info.field_name): value})
        return value

    def int8(self) -> Int8:
        """The quantization that these options describe."""
        own = {field.name for field in fields(Int8)}
        return Int8(**self.model_dump(include=own))


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
    target asks for no speed and no size.
    """

    train: TrainStage | None = None
    prune: PruneStage | None = None
    repair: RepairStage | None = RepairStage()
    distill: DistillStage | None = DistillStage()
    quantize: QuantizeStage | None = QuantizeStage()

    @field_validator("train", "repair", "distill", "quantize", mode="before")
    @classmethod
    def _switch(cls, value: Any, info: ValidationInfo) -> Any:
        """False leaves a stage out, true takes its defaults; in a file, nothing is ambiguous."""
        if value is None and info.context == IN_A_FILE and info.field_name != "train":
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
