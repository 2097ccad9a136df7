"""Losses of transformers: attention maps, relations of queries, keys and values, layer maps.

Hidden states ``(B, L, C)`` need nothing of their own: :class:`FitNet` and :class:`Cosine` take them
with a mask ``(B, L)``, and learn the linear map between two widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.distillation.losses.arithmetic import divergence, exact
from rarefy.distillation.losses.base import FeatureLoss
from rarefy.distillation.losses.projectors import (
    counted,
    feature_rows,
    projector,
    require_same_batch,
    require_same_shape,
)
from rarefy.errors import InputError


@dataclass(frozen=True)
class AttentionMaps(FeatureLoss):
    """The squared difference of attention matrices.

    Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", equation 7::

        mean over heads, queries and keys of (student - teacher)^2

    Features are the attention of one layer, ``(B, H, L, L)``: scores, as in the paper, or
    probabilities. With a mask ``(B, L)`` of the tokens that are no padding, only pairs of a query
    and a key that are none count, so that scores of padding may be ``-inf``. Where student and
    teacher have other numbers of heads, the head learns a linear map from the one to the other,
    which is not in the paper; it needs finite scores everywhere, or probabilities.

    Raises:
        InputError: when called, the shapes differ or are no attention; of the head, the lengths
            differ.

    Example:
        >>> AttentionMaps()(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)).item()
        1.0
    """

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        _require_attention(student, teacher)
        require_same_shape("AttentionMaps", student, teacher)
        pairs = None if mask is None else _token_pairs("AttentionMaps", mask, student)
        found, wanted = feature_rows("AttentionMaps", student, teacher, 1, pairs)
        return (found - wanted).square().sum() / max(found.numel(), 1)

    def head(self, student: Tensor, teacher: Tensor) -> nn.Module | None:
        _require_attention(student, teacher)
        return projector("AttentionMaps", student, teacher, 1)


def _require_attention(student: Tensor, teacher: Tensor) -> None:
    require_same_batch("AttentionMaps", student, teacher)
    for feature in (student, teacher):
        square = feature.ndim == 4 and feature.shape[2] == feature.shape[3]
        if not square or feature.shape[2:] != student.shape[2:]:
            raise InputError(
                "AttentionMaps",
                f"shapes {tuple(student.shape)} and {tuple(teacher.shape)} are no attention of the "
                "same tokens",
                "Give (B, H, L, L) of both, on the same inputs",
            )


def _token_pairs(where: str, mask: Tensor, attention: Tensor) -> Tensor:
    wanted = (attention.shape[0], attention.shape[2])
    if tuple(mask.shape) != wanted:
        raise InputError(
            where,
            f"a mask of shape {tuple(mask.shape)} does not fit {wanted[1]} tokens",
            f"Give a mask of shape {wanted}",
        )
    real = mask.bool()
    return real[:, :, None] & real[:, None, :]


@dataclass(frozen=True)
class MiniLM(FeatureLoss):
    """Relations within one layer's self-attention, between its queries, keys and values.

    Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation"::

        sum over relations ab of mean over heads and tokens of KL(R_teacher || R_student)
        R = softmax(A B^T / sqrt(d)) over the tokens of B

    with ``A``, ``B`` among the queries, keys and values, split into ``heads`` relation heads of
    ``d`` channels each, whatever the heads of the networks. ``relations=("qk", "vv")`` with the
    heads of both networks is Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation": the
    attention and the value relation. Widths of student and teacher need not agree.

    Features are sequences of three tensors ``(B, L, C)``, the outputs of the modules that make
    queries, keys and values, in that order. With a mask ``(B, L)``, padding neither relates nor is
    related to. Causal masks are not applied.

    Args:
        heads: relation heads; the widths of student and teacher are multiples of it.
        relations: pairs of ``q``, ``k`` and ``v``, at least one.

    Raises:
        InputError: an argument is out of range; when called, the shapes do not fit.

    Example:
        >>> query = "encoder.layers.2.attention.query"
        >>> term = MiniLM(heads=4).at((query, query.replace("query", "key"), "...value"))
        >>> qkv = [torch.randn(2, 5, 8) for _ in range(3)]
        >>> MiniLM(heads=4)(qkv, qkv).item()
        0.0
    """

    heads: int = 12
    relations: tuple[str, ...] = ("qq", "kk", "vv")
    several: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.heads, int) or self.heads < 1:
            raise InputError(f"MiniLM(heads={self.heads!r})", "it counts heads", "Write heads=12")
        known = {a + b for a in "qkv" for b in "qkv"}
        if isinstance(self.relations, str) or not self.relations or set(self.relations) - known:
            raise InputError(
                f"MiniLM(relations={self.relations!r})",
                "a relation is a pair of q, k and v",
                "Write relations=('qq', 'kk', 'vv')",
            )

    def __call__(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        found = self._split(student, mask)
        wanted = self._split([t.detach() for t in teacher], mask)
        shapes = [x["q"].shape[:3] for x in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(
                "MiniLM",
                f"batch and length differ: {(shapes[0][0], shapes[0][2])} and "
                f"{(shapes[1][0], shapes[1][2])}",
                "Give student and teacher the same inputs",
            )
        both = [[_relation(parts, r, mask) for r in self.relations] for parts in (wanted, found)]
        terms = [divergence(p, q).sum() / max(len(p), 1) for p, q in zip(*both, strict=True)]
        return sum(terms[1:], terms[0])

    def _split(self, features: Sequence[Tensor], mask: Tensor | None) -> dict[str, Tensor]:
        """``q``, ``k``, ``v`` to ``(B, heads, L, d)``."""
        right = not isinstance(features, Tensor) and len(features) == 3
        right = right and all(
            x.ndim == 3 and x.is_floating_point() and x.shape == features[0].shape for x in features
        )
        if not right:
            shapes = [tuple(x.shape) for x in features]
            raise InputError(
                "MiniLM",
                f"shapes {shapes} are not those of queries, keys and values",
                "Give three tensors (B, L, C)",
            )
        width = features[0].shape[-1]
        if width % self.heads:
            raise InputError(
                f"MiniLM(heads={self.heads})",
                f"{width} channels cannot be split into {self.heads} relation heads",
                "Give a number of heads that divides the widths of student and teacher",
            )
        heads = (self.heads, width // self.heads)
        return {
            name: counted("MiniLM", x, mask).reshape(*x.shape[:2], *heads).transpose(1, 2)
            for name, x in zip("qkv", features, strict=True)
        }


def _relation(parts: dict[str, Tensor], pair: str, mask: Tensor | None) -> Tensor:
    """Log-probabilities of the tokens of the second for those of the first, ``(N, L)``."""
    a, b = parts[pair[0]], parts[pair[1]]
    with exact(a):
        scores = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
    if mask is None:
        return F.log_softmax(scores.flatten(0, 2), dim=-1)
    real = mask.bool()
    related = scores.masked_fill(~real[:, None, None, :], -math.inf)
    return F.log_softmax(related.transpose(1, 2)[real].flatten(0, 1), dim=-1)


def layer_map(students: int, teachers: int) -> tuple[int, ...]:
    """For every layer of the student the layer of the teacher that it learns from, counted from 0.

    The student's layers stand for equal shares of the teacher's, each for the last of its share, so
    that the last learns from the last (Jiao et al. 2020, "TinyBERT", the uniform strategy).

    Args:
        students: number of layers of the student, at least 1.
        teachers: number of layers of the teacher, at least as many.

    Raises:
        InputError: a number is out of range.

    Example:
        >>> layer_map(students=4, teachers=12)
        (2, 5, 8, 11)
        >>> pairs = enumerate(layer_map(students=2, teachers=6))
        >>> loss = KD() + sum(FitNet().at(f"layers.{s}", f"layers.{t}") for s, t in pairs)
        >>> [term.teacher for _, term in loss.terms[1:]]
        ['layers.2', 'layers.5']
    """
    if not 1 <= students <= teachers:
        raise InputError(
            f"layer_map({students!r}, {teachers!r})",
            "the student has from one layer to as many as the teacher",
            "Write layer_map(students=6, teachers=12)",
        )
    return tuple((i + 1) * teachers // students - 1 for i in range(students))
