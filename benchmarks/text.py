"""Questions of six kinds (TREC) and a small transformer for the benchmarks."""

import re
from collections import Counter

import torch
from folder import loaders
from torch import Tensor, nn

LENGTH, WORDS = 24, 4096
PADDING, UNKNOWN = 0, 1


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+|[^\sa-z0-9']", text.lower())


def questions() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Word numbers (N, LENGTH), 0 for padding, and kinds (N,), for training and for the test."""
    found = loaders().text("trec6")
    counts = Counter(word for text, _ in found["train"] for word in _words(text))
    known = {word: 2 + rank for rank, (word, _) in enumerate(counts.most_common(WORDS - 2))}

    def encoded(rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        x = torch.full((len(rows), LENGTH), PADDING)
        for row, (text, _) in zip(x, rows, strict=True):
            ids = [known.get(word, UNKNOWN) for word in _words(text)][:LENGTH]
            row[: len(ids)] = torch.tensor(ids)
        return x, torch.tensor([label for _, label in rows])

    return encoded(found["train"]), encoded(found["test"])


class Transformer(nn.Module):
    """Words and positions -> encoder layers -> mean over the words -> kinds."""

    def __init__(self, width: int = 128, layers: int = 3, classes: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.2, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Word numbers (B, LENGTH) -> logits (B, classes)."""
        padding = ids == PADDING
        x = self.encoder(self.words(ids) + self.positions, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)
        logits: Tensor = self.head((x * kept).sum(1) / kept.sum(1).clamp_min(1))
        return logits
