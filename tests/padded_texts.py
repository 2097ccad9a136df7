"""Texts of several lengths, and networks on them whose tokens know nothing of padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LENGTH, WORDS = 9, 40


class Reader(nn.Module):
    """A small transformer on (B, L): class scores of every token, or of the text.

    Args:
        first: how it goes through: "examples" (B, L, C), "sequences" (L, B, C) or "merged"
            (B * L, C), or "merged, sequences first" (L * B, C).
        pooled: whether it answers for the text, the mean over its tokens.
    """

    def __init__(self, first: str = "examples", *, pooled: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(WORDS, 12)
            self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
            self.out, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
            self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
            self.head = nn.Linear(12, 4)
        self.first, self.pooled = first, pooled

    def forward(self, input_ids, attention_mask):
        h = self._to(self.embed(input_ids))
        q, k, v = (
            self._back(layer(h), input_ids).unflatten(-1, (3, 4)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = attention_mask.bool()[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        h = h + self.out(self._to(mixed.transpose(1, 2).flatten(2)))
        h = self._back(h + self.down(F.relu(self.up(self.norm(h)))), input_ids)
        if self.pooled:
            kept = attention_mask[:, :, None].to(h.dtype)
            h = (h * kept).sum(1) / kept.sum(1)
        return self.head(h)

    def _to(self, h):
        if self.first == "sequences":
            return h.transpose(0, 1)
        if self.first == "merged, sequences first":
            return h.transpose(0, 1).flatten(0, 1)
        return h.flatten(0, 1) if self.first == "merged" else h

    def _back(self, h, ids):
        if self.first == "sequences":
            return h.transpose(0, 1)
        if self.first == "merged, sequences first":
            return h.unflatten(0, ids.T.shape).transpose(0, 1)
        return h.unflatten(0, ids.shape) if self.first == "merged" else h


def texts(padding: int | None, *, seed: int = 0, size: int = 16) -> dict[str, torch.Tensor]:
    """A batch of texts, with the same word, or random ones, at their padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (size, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (size, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    filled = ids if padding is None else torch.full_like(ids, padding)
    return {"input_ids": torch.where(mask.bool(), ids, filled), "attention_mask": mask}


def both_paddings(**options: Any) -> tuple[list[dict], list[dict]]:
    """The same texts twice, with other padding."""
    zeros, words = ([texts(p, seed=n, **options) for n in range(3)] for p in (0, None))
    return zeros, words
