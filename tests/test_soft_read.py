"""Reading: by view and id, beside the data of the user's loader, and never a damaged record."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from rarefy.distillation.losses import KD
from rarefy.distillation.soft_labels import write as writing
from rarefy.distillation.soft_labels.hashes import item_hash
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.records import Dense, Outputs, Sampled, TopK
from rarefy.distillation.soft_labels.views import Mixup, Replay
from rarefy.errors import DataError, FormatError, InputError, RarefyError
from soft_label_store import SAMPLES, dataset, expected, images, loader, teacher, write


@pytest.fixture(params=[500, 1 << 20], ids=["several shards", "one shard"])
def labels(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftLabels:
    monkeypatch.setattr(writing, "SHARD_BYTES", request.param)
    write(tmp_path)
    return SoftLabels(tmp_path)


def test_ids_may_come_in_any_order_and_more_than_once(labels: SoftLabels) -> None:
    ids = torch.tensor([99, 0, 50, 50, 3])
    assert (labels.answers(ids) == labels.answers()[ids]).all()
    assert labels.answers(torch.tensor([], dtype=torch.long)).shape == (0, 11)
    assert len(labels) == SAMPLES


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_with_their_answers_whatever_the_order(labels: SoftLabels, workers) -> None:
    model, seen = teacher(), 0
    for inputs, targets, soft in labels.join(loader(num_workers=workers)):
        assert torch.allclose(soft, expected(model, inputs), rtol=1e-3, atol=1e-5)
        assert targets is not None
        seen += len(inputs)
    assert seen == SAMPLES


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_loss_is_that_with_the_live_teacher(labels: SoftLabels, temperature: float) -> None:
    torch.manual_seed(0)
    student, logits = torch.randn(SAMPLES, 11), teacher().eval()(images())
    live, stored = (KD(temperature)(student, t) for t in (logits, labels.answers()))
    assert stored.item() == pytest.approx(live.item(), rel=1e-3)


def test_epochs_cycle_through_the_views(tmp_path: Path) -> None:
    replay = Replay(dataset(), lambda x: x + torch.randn_like(x), mix=Mixup(classes=11))
    write(tmp_path, loader(replay), views=2)
    labels, model = SoftLabels(tmp_path), teacher()
    first = {}
    data = labels.identified(loader(replay, num_workers=1, persistent_workers=True))
    assert len(data) == 7
    for epoch in range(4):
        batches = list(labels.join(data if epoch < 3 else loader(replay), epoch))
        for inputs, targets, soft in batches:
            assert torch.allclose(soft, expected(model, inputs), rtol=1e-3, atol=1e-4)
            assert targets.shape == (len(inputs), 11)
        first[epoch] = torch.cat([soft for *_, soft in batches]).sum(dim=0)
    assert torch.allclose(first[0], first[2], rtol=1e-4)
    assert torch.allclose(first[1], first[3], rtol=1e-4)
    assert not torch.allclose(first[0], first[1], rtol=1e-4)


def test_batches_in_a_list(tmp_path: Path) -> None:
    data = list(images().split(9))
    write(tmp_path, data)
    labels, model = SoftLabels(tmp_path), teacher()
    for inputs, targets, soft in labels.join(data):
        assert targets is None
        assert torch.allclose(soft, expected(model, inputs), rtol=1e-3, atol=1e-5)
    swapped = [*data[:2], data[3], data[2], *data[4:]]
    with pytest.raises(DataError, match="id 18, view 0 is another"):
        list(labels.join(swapped))
    with pytest.raises(DataError, match="number of examples"):
        list(labels.join(data[:-1]))


OTHER_DATA = {
    "longer": (lambda: loader(dataset(120)), "number of examples: the store has 100, this is 120"),
    "another order": (lambda: loader(TensorDataset(images().flip(0))), "in another order"),
    "another preprocessing": (lambda: loader(TensorDataset(images() / 2)), "other inputs"),
    "a transform": (lambda: loader(Replay(dataset())), "transform"),
    "batches": (lambda: list(images().split(9)), "ids: the store has dataset"),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_are_refused(labels: SoftLabels, name: str) -> None:
    data, words = OTHER_DATA[name]
    with pytest.raises(DataError, match=words):
        next(labels.join(data()))


def test_another_seed_of_the_transform_is_refused(tmp_path: Path) -> None:
    write(tmp_path, loader(Replay(dataset(), torch.neg, seed=1)))
    with pytest.raises(DataError, match="seed=2"):
        next(SoftLabels(tmp_path).join(loader(Replay(dataset(), torch.neg, seed=2))))


def test_features_changed_after_the_fact_are_noticed(labels: SoftLabels) -> None:
    labels.require_aligned(4, 0, item_hash(images()[4]))
    with pytest.raises(DataError, match="id 4, view 0"):
        labels.require_aligned(4, 0, item_hash(images()[4].flip(-1)))


@pytest.mark.parametrize(("ids", "view"), [([100], 0), ([-1], 0), ([0], 1), ([0], -1)])
def test_what_is_not_there_is_refused(labels: SoftLabels, ids: list[int], view: int) -> None:
    with pytest.raises(DataError, match="was asked for"):
        labels.answers(torch.tensor(ids), view)


def test_another_teacher_is_refused(labels: SoftLabels) -> None:
    labels.check(teacher())
    other = teacher()
    with torch.no_grad():
        other[3].bias[0] += 1e-6
    with pytest.raises(InputError, match="weights"):
        labels.check(other)


def test_it_can_be_sent_to_other_processes(labels: SoftLabels) -> None:
    again = pickle.loads(pickle.dumps(labels))
    assert (again.answers() == labels.answers()).all()
    assert len(pickle.dumps(labels)) < 1000
    assert "dense" in repr(labels)


# --- attacks


def attacked(path: Path) -> list[object]:
    return [SoftLabels(path).answers(), *SoftLabels(path).join(loader())]


@pytest.mark.parametrize("form", [Dense(), TopK(3), Sampled(5), Outputs()])
def test_a_flipped_bit_is_an_error_and_never_an_answer(tmp_path: Path, form) -> None:
    write(tmp_path, form=form)
    (shard,) = tmp_path.glob("*.records")
    content = shard.read_bytes()
    for at in range(0, len(content), 61):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        shard.write_bytes(damaged)
        with pytest.raises(FormatError, match="damaged"):
            SoftLabels(tmp_path).answers()
    shard.write_bytes(content)
    attacked(tmp_path)


def test_only_what_is_damaged_is_lost(labels: SoftLabels) -> None:
    shard = min(labels.path.glob("*.records"))
    content = bytearray(shard.read_bytes())
    content[3 * 30 + 5] ^= 1
    shard.write_bytes(content)
    again = SoftLabels(labels.path)
    again.answers(torch.tensor([0, 1, 2, 4]))
    with pytest.raises(FormatError, match="id 3, view 0"):
        again.answers(torch.tensor([3]))
    shard.unlink()
    write(labels.path)
    SoftLabels(labels.path).answers()


@pytest.mark.parametrize("kind", ["short", "long", "empty", "other store", "zeros", "folder"])
def test_foreign_files_are_refused(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "store")
    write(tmp_path / "other")
    (shard,) = (tmp_path / "store").glob("*.records")
    (foreign,) = (tmp_path / "other").glob("*.records")
    content = shard.read_bytes()
    made = {
        "short": content[:-1],
        "long": content + b"x",
        "empty": b"",
        "other store": foreign.read_bytes(),
        "zeros": bytes(len(content)),
    }
    shard.unlink()
    if kind == "folder":
        shard.mkdir()
    else:
        shard.write_bytes(made[kind])
    with pytest.raises(RarefyError):
        attacked(tmp_path / "store")


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write_soft_labels"):
        SoftLabels(tmp_path)
