"""Answers to sequences: what is read is what the teacher says, however batches are padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rarefy.distillation.losses import KD
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.records import Outputs, Sampled, TopK
from rarefy.distillation.soft_labels.sequences import packed, spread
from rarefy.distillation.soft_labels.write import write_soft_labels
from rarefy.errors import DataError
from rarefy.training.distill import distill

torch.set_num_threads(1)

LENGTHS = [3, 9, 4, 1, 6, 7, 2, 5, 9, 3, 8, 4]
ITEMS = [
    torch.randint(1, 20, (n,), generator=torch.Generator().manual_seed(i)).tolist()
    for i, n in enumerate(LENGTHS)
]
ONE = {"epochs": 1, "lr": 0.05, "warmup": 0.0, "progress": False}


def collated(items: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    size = max(map(len, items))
    rows = [([0] * (size - len(ids)), ids)[:: 1 if left else -1] for ids in items]
    ids = torch.tensor([before + after for before, after in rows])
    mask = (ids > 0).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": (ids % 5).masked_fill(ids == 0, -100),
    }


def loader(size: int = 4, left: bool = False, data: Any = ITEMS) -> DataLoader[Any]:
    def collate(items: list[list[int]]) -> dict[str, Tensor]:
        return collated(items, left)

    return DataLoader(data, size, shuffle=True, collate_fn=collate)


class Tagger(nn.Module):
    """Logits of every token, which tokens around it do not change; NaN at padding."""

    def __init__(self, seed: int, classes: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.head(self.embed(input_ids)) * 3
        return found if self.training else found.masked_fill(attention_mask[..., None] == 0, 0.5)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5))
def test_what_counts_comes_back_where_it_was(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    inputs = {"attention_mask": mask.long()}
    outputs = torch.randn(len(rows), 6, 3)
    length = max(1, int(mask.sum(1).max()))
    record = packed(outputs, inputs, length, "test")
    assert torch.equal(spread(record, inputs, "test")[mask], outputs[mask])
    for row, own, kept in zip(record, outputs, mask, strict=True):
        assert torch.equal(row[: int(kept.sum())], own[kept])
        assert not row[int(kept.sum()) :].any()
    longer = packed(outputs, inputs, 9, "test")
    assert torch.equal(longer, F.pad(record, (0, 0, 0, 9 - length)))


@pytest.mark.parametrize("form", [None, Outputs("float32")])
@pytest.mark.parametrize(("size", "left"), [(4, False), (5, True), (1, False)])
def test_a_store_serves_any_padding(tmp_path: Path, form: Any, size: int, left: bool) -> None:
    teacher = Tagger(0)
    written = write_soft_labels(teacher, loader(4, left), tmp_path, form=form, progress=False)
    assert (written.shape, written.sequences) == ((9, 5), True)
    labels, data = SoftLabels(tmp_path), loader(size, left)
    for inputs, _, answers in labels.join(data):
        mask = inputs["attention_mask"].bool()
        wanted = teacher(**inputs)
        if form is None:
            wanted = wanted.log_softmax(-1)
        assert answers.shape == wanted.shape
        assert torch.allclose(answers[mask], wanted[mask], atol=5e-3)
    assert labels.verify(teacher, loader(3, left), samples=12) < 1e-3
    student = distill(labels, Tagger(1), data, **ONE)
    live = distill(teacher, Tagger(1), data, **ONE)
    assert torch.allclose(student.head.weight, live.head.weight, atol=2e-3)


def test_padding_that_is_nan_harms_nobody(tmp_path: Path) -> None:
    class Broken(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            found = super().forward(input_ids, attention_mask)
            return found.masked_fill(attention_mask[..., None] == 0, torch.nan)

    write_soft_labels(Broken(0), loader(), tmp_path, progress=False)
    labels = SoftLabels(tmp_path)
    assert all(answers.isfinite().all() for _, _, answers in labels.join(loader(5)))
    assert labels.verify(Broken(0), loader()) < 1e-3


def test_padding_does_not_choose_k(tmp_path: Path) -> None:
    sharp = Tagger(0, classes=2000)
    sharp.head.weight.data *= 20
    found = write_soft_labels(sharp, loader(), tmp_path, temperature=1.0, progress=False)
    probed = collated([ITEMS[i] for i in range(12)])
    logits = sharp.eval()(probed["input_ids"], probed["attention_mask"])
    ranked = logits[probed["attention_mask"].bool()].softmax(-1).sort(descending=True).values
    wanted = int((ranked.double().cumsum(-1).mean(0) < 0.99).sum()) + 1
    assert wanted < 500
    assert found.layout.form == TopK(wanted)


def test_draws_of_sequences(tmp_path: Path) -> None:
    write_soft_labels(Tagger(0), loader(), tmp_path, form=Sampled(400), progress=False)
    for inputs, _, answers in SoftLabels(tmp_path).join(loader(3)):
        mask = inputs["attention_mask"].bool()
        wanted = F.softmax(Tagger(0).eval()(**inputs), -1)
        assert (answers.softmax(-1) - wanted)[mask].abs().max() <= 1 / 400 + 1e-6
    distill(SoftLabels(tmp_path), Tagger(1), loader(), loss=KD(1.0), **ONE)


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_soft_labels(Tagger(0), loader(), tmp_path, progress=False)
    labels, ids = SoftLabels(tmp_path), torch.tensor([0, 1])
    with pytest.raises(DataError, match="attention_mask counts, and these inputs have none"):
        labels.answers_to(torch.zeros(2, 9), ids)
    with pytest.raises(DataError, match=r"has 10 positions, and the longest .* had 9"):
        labels.answers_to({"attention_mask": torch.ones(2, 10)}, ids)
