"""One record: what is kept of a teacher's answer to one example, and how it is told from damage.

A form maps outputs ``(N, P, C)`` (examples, positions, classes) to fixed-size fields and back. A
record is the fields of all positions of one example between a hash of the input and a checksum.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarefy.distillation.soft_labels.seeds import uniforms
from rarefy.errors import DataError, InputError
from rarefy.types import check_counts

Array: TypeAlias = npt.NDArray[Any]
Fields: TypeAlias = list[tuple[str, str, int]]
"""Name, NumPy type, and elements of each position."""

LOWEST = -65504.0
"""The lowest finite number of half precision."""


class Form(ABC):
    """What is kept of the answer at one position. Subclasses are frozen dataclasses.

    Attributes:
        kind: the name in the manifest.
    """

    kind: ClassVar[str]

    @abstractmethod
    def fields(self, classes: int) -> Fields:
        """The fields of one position."""

    @abstractmethod
    def encode(self, outputs: Tensor, coins: Array) -> Mapping[str, Tensor]:
        """Outputs ``(N, P, C)``, and a number in [0, 1) for each ``(N, P)``, to fields."""

    @abstractmethod
    def decode(self, fields: Mapping[str, Array], classes: int) -> Tensor:
        """Fields to float32 ``(N, P, C)``."""

    def usable(self, outputs: Tensor) -> Tensor:
        """Which of the outputs ``(N, P, C)`` can be kept, ``(N, P)``: -inf excludes a class."""
        return outputs.amax(dim=-1).isfinite()  # NaN is the largest of all

    @property
    def options(self) -> dict[str, int | float | str]:
        """The arguments that make this form."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Dense(Form):
    """Log-probabilities of all classes in half precision: 2 bytes a class.

    The relative error of a log-probability is at most 2^-11. Any temperature may follow, since
    ``softmax(log p / T) = softmax(logits / T)``.

    Example:
        >>> Dense().fields(classes=10)
        [('values', '<f2', 10)]
    """

    kind: ClassVar[str] = "dense"

    def fields(self, classes: int) -> Fields:
        """The fields of one position."""
        return [("values", "<f2", classes)]

    def encode(self, outputs: Tensor, coins: Array) -> Mapping[str, Tensor]:
        """Outputs to fields."""
        return {"values": _half(torch.log_softmax(outputs, dim=-1))}

    def decode(self, fields: Mapping[str, Array], classes: int) -> Tensor:
        """Fields to log-probabilities."""
        return _float(fields["values"])


@dataclass(frozen=True)
class TopK(Form):
    """The k most probable classes, and the mass of all others: 3 to 6 bytes a class kept.

    What is read has the mass of the tail spread evenly over the classes left out, so that every
    temperature has a full distribution to soften. At temperature 1 the sum of the errors of all
    probabilities is at most twice that mass.

    Args:
        k: classes kept at every position, at least 1.

    Raises:
        InputError: k is no whole number of at least 1.

    Example:
        >>> TopK(k=50).fields(classes=1000)
        [('classes', '<u2', 50), ('values', '<f2', 50), ('tail', '<f2', 1)]
    """

    k: int
    kind: ClassVar[str] = "top-k"

    def __post_init__(self) -> None:
        check_counts(self, "k", 50)

    def fields(self, classes: int) -> Fields:
        """The fields of one position."""
        if self.k > classes:
            raise InputError(
                f"TopK(k={self.k})", f"there are {classes} classes", f"Give at most {classes}"
            )
        return [("classes", _index(classes), self.k), ("values", "<f2", self.k), ("tail", "<f2", 1)]

    def encode(self, outputs: Tensor, coins: Array) -> Mapping[str, Tensor]:
        """Outputs to fields."""
        log = torch.log_softmax(outputs, dim=-1)
        values, classes = log.topk(self.k, dim=-1)
        rest = log.scatter(-1, classes, -math.inf).logsumexp(dim=-1, keepdim=True)
        return {"classes": classes, "values": _half(values), "tail": _half(rest)}

    def decode(self, fields: Mapping[str, Array], classes: int) -> Tensor:
        """Fields to log-probabilities."""
        each = _float(fields["tail"]) - math.log(max(classes - self.k, 1))
        full = each.expand(*each.shape[:-1], classes).clone()
        return full.scatter_(-1, _long(fields["classes"], classes), _float(fields["values"]))


@dataclass(frozen=True)
class Sampled(Form):
    """Classes drawn from the teacher's softened prediction: 1 to 4 bytes a draw.

    With counts c of n draws from ``p = softmax(logits / T)``, ``E[c / n] = p``: the gradient of
    :class:`~rarefy.losses.KD` at this temperature is right on average, whatever was not drawn.
    (Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs".)
    The draws of one position are evenly spaced (systematic sampling), which is unbiased too and
    gives every class the whole number above or below ``n * p``.

    What is read is ``T * log(c / n)``, ``-inf`` for classes that were not drawn, so that
    ``softmax(read / T) = c / n``. At another temperature it is biased.

    Args:
        draws: n, at least 1.
        temperature: T, above 0: that of the loss that will read.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> Sampled(draws=64).fields(classes=50_000)
        [('classes', '<u2', 64)]
    """

    draws: int
    temperature: float = 1.0
    kind: ClassVar[str] = "sampled"

    def __post_init__(self) -> None:
        check_counts(self, "draws", 50)
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"Sampled(temperature={self.temperature!r})",
                "a temperature is a number above 0",
                "Write temperature=1.0",
            )

    def fields(self, classes: int) -> Fields:
        """The fields of one position."""
        return [("classes", _index(classes), self.draws)]

    def encode(self, outputs: Tensor, coins: Array) -> Mapping[str, Tensor]:
        """Outputs to fields."""
        p = torch.softmax(outputs.cpu().double() / self.temperature, dim=-1)
        sums = p.cumsum(dim=-1)
        at = (torch.from_numpy(coins)[..., None] + torch.arange(self.draws)) / self.draws
        drawn = torch.searchsorted(sums / sums[..., -1:], at.double(), right=True)
        return {"classes": drawn.clamp_max(outputs.shape[-1] - 1)}

    def decode(self, fields: Mapping[str, Array], classes: int) -> Tensor:
        """Fields to logits whose softmax at this temperature are the shares of the draws."""
        drawn = _long(fields["classes"], classes)
        shares = torch.full(drawn.shape, 1 / self.draws)
        counted = torch.zeros(*drawn.shape[:-1], classes).scatter_add_(-1, drawn, shares)
        return counted.log_().mul_(self.temperature)


@dataclass(frozen=True)
class Outputs(Form):
    """The outputs as they are, for networks whose answers are no distribution over classes.

    For regression, image-to-image, several labels at once, and losses on the logits themselves.

    Args:
        dtype: ``"float16"`` or ``"float32"``.

    Raises:
        InputError: another type.

    Example:
        >>> Outputs("float32").fields(classes=4)
        [('values', '<f4', 4)]
    """

    dtype: str = "float16"
    kind: ClassVar[str] = "outputs"

    def __post_init__(self) -> None:
        if self.dtype not in _STORED:
            raise InputError(
                f"Outputs(dtype={self.dtype!r})", "unknown type", f"Use {' or '.join(_STORED)}"
            )

    def fields(self, classes: int) -> Fields:
        """The fields of one position."""
        return [("values", _STORED[self.dtype], classes)]

    def usable(self, outputs: Tensor) -> Tensor:
        """Which of the outputs are all finite."""
        return outputs.isfinite().all(dim=-1)

    def encode(self, outputs: Tensor, coins: Array) -> Mapping[str, Tensor]:
        """Outputs to fields."""
        if self.dtype == "float16" and bool((outputs.abs() > -LOWEST).any()):
            raise DataError(
                "write_soft_labels(form=Outputs())",
                f"outputs reach {outputs.abs().max():.3g}, and half precision ends at {-LOWEST:g}",
                'Use Outputs("float32")',
            )
        return {"values": outputs}

    def decode(self, fields: Mapping[str, Array], classes: int) -> Tensor:
        """Fields to outputs."""
        return _float(fields["values"])


_STORED = {"float16": "<f2", "float32": "<f4"}

FORMS: Mapping[str, type[Form]] = {form.kind: form for form in (Dense, TopK, Sampled, Outputs)}
"""Name in the manifest to form."""


def smallest_k(outputs: Tensor, mass: float, temperature: float) -> tuple[int, float]:
    """The fewest classes that keep this mass of the softened probabilities, on average over
    ``(N, P)``, and what they keep."""
    ranked = torch.softmax(outputs / temperature, dim=-1).sort(dim=-1, descending=True).values
    kept = ranked.double().cumsum(dim=-1).flatten(0, -2).mean(dim=0)
    k = min(int((kept < mass).sum()) + 1, len(kept))
    return k, float(kept[k - 1])


def form_for(outputs: Tensor, mass: float, temperature: float) -> tuple[Form, float]:
    """The smaller of :class:`Dense` and :class:`TopK`, and the mass that it keeps."""
    k, kept = smallest_k(outputs, mass, temperature)
    candidates: list[Form] = [Dense(), TopK(k)]
    chosen = min(candidates, key=lambda form: record_size(form, outputs.shape[-1]))
    return chosen, 1.0 if isinstance(chosen, Dense) else kept


def record_size(form: Form, classes: int) -> int:
    """Bytes of one position."""
    return sum(np.dtype(kind).itemsize * n for _, kind, n in form.fields(classes))


@dataclass(frozen=True)
class Layout:
    """Where the numbers of one example stand in its record.

    Args:
        form: what is kept.
        shape: of the outputs of one example.
        dim: dimension of the classes among those of a batch of outputs; negative ones count from
            the end.
    """

    form: Form
    shape: tuple[int, ...]
    dim: int = -1

    @property
    def classes(self) -> int:
        """Length of the dimension of the classes; 1 for a single number."""
        return self.shape[self.dim - 1 if self.dim > 0 else self.dim] if self.shape else 1

    @property
    def positions(self) -> int:
        """Distributions of one example."""
        return math.prod(self.shape) // max(self.classes, 1)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The record: hash of the input, the fields, checksum; little-endian, without gaps."""
        fields = [
            (name, kind, (self.positions, n)) for name, kind, n in self.form.fields(self.classes)
        ]
        return np.dtype([("input", "<u4"), *fields, ("checksum", "<u4")])

    def flat(self, outputs: Tensor) -> Tensor:
        """Outputs of a batch as float32 ``(N, P, C)``."""
        moved = outputs.movedim(self.dim, -1) if self.shape else outputs
        return moved.reshape(len(outputs), self.positions, self.classes).float()

    def pack(self, outputs: Tensor, rows: Array, hashes: Array, seed: int, salt: int) -> Array:
        """Records of a batch, sealed.

        Args:
            outputs: ``(N, *shape)``.
            rows: the place of each example in the store.
            hashes: of the inputs.
            seed: of the draws of :class:`Sampled`.
            salt: of the store.
        """
        coins = uniforms(seed, rows[:, None], np.arange(self.positions))
        records = np.zeros(len(rows), self.dtype)
        records["input"] = hashes
        for name, values in self.form.encode(self.flat(outputs), coins).items():
            records[name] = values.cpu().numpy()
        records["checksum"] = checksums(records, rows, salt)
        return records

    def unpack(self, records: Array) -> Tensor:
        """Float32 ``(N, *shape)`` of records that were found whole."""
        names = [name for name, _, _ in self.form.fields(self.classes)]
        values = self.form.decode({name: records[name] for name in names}, self.classes)
        if not self.shape:
            return values.reshape(len(records))
        moved = list(self.shape)
        moved.append(moved.pop(self.dim - 1 if self.dim > 0 else self.dim))
        return values.reshape(len(records), *moved).movedim(-1, self.dim)


def checksums(records: Array, rows: Array, salt: int) -> Array:
    """CRC-32 of each record up to its checksum, begun with its row and the store's salt.

    A record of another place, or of another store, fails like a damaged one.
    """
    size = records.dtype.itemsize
    content = np.ascontiguousarray(records).view(np.uint8).data
    begins = seeds_of_rows(rows, salt).tolist()
    found = [
        zlib.crc32(content[size * i : size * (i + 1) - 4], begin) for i, begin in enumerate(begins)
    ]
    return np.array(found, np.uint32)


def seeds_of_rows(rows: Array, salt: int) -> Array:
    """What the checksum of each row begins with: ``(row * 2654435761 + salt) mod 2^32``."""
    return (rows.astype(np.uint64) * np.uint64(2654435761) + np.uint64(salt)) & np.uint64(2**32 - 1)


def _half(values: Tensor) -> Tensor:
    """Half precision, where what is finite stays finite."""
    return torch.where(values == -math.inf, values, values.clamp_min(LOWEST)).half()


def _float(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _long(classes: Array, limit: int) -> Tensor:
    return torch.from_numpy(classes.astype(np.int64)).clamp_max_(limit - 1)


def _index(classes: int) -> str:
    return next(kind for kind, most in _INDICES if classes <= most)


_INDICES = (("<u1", 2**8), ("<u2", 2**16), ("<u4", 2**32))
