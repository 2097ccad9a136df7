"""The data convention."""

import operator
import random
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from rarefy.batches import (
    batch_size,
    batches,
    call,
    doubled,
    evaluating,
    logits,
    map_tensors,
    of_one_length,
    seeded,
    split_batch,
    take,
    tensors,
    unchanged,
)
from rarefy.errors import DataError, InputError
from rarefy.process import generators, replayable

X, Y = torch.zeros(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        (X, X, None),
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X,), X, None),
        (((X, X), Y), (X, X), Y),
        (([X, X], Y), (X, X), Y),
        ({"x": X}, {"x": X}, None),
        ({"x": X, "labels": Y}, {"x": X}, Y),
        (({"x": X}, Y), {"x": X}, Y),
    ],
)
def test_every_form_of_batch_is_split(batch, inputs, targets) -> None:
    found, labels = split_batch(batch)
    assert type(found) is type(inputs)
    assert all(a is b for a, b in zip(tensors(found), tensors(inputs), strict=True))
    assert labels is targets


@pytest.mark.parametrize("batch", [(X, Y, Y), (), 3, "text", ("text", Y), (3, Y)])
def test_other_batches_are_refused(batch) -> None:
    with pytest.raises(DataError, match="data"):
        split_batch(batch)


def test_a_network_is_called_with_each_form() -> None:
    def model(a, b=0):
        return a, b

    assert call(model, X) == (X, 0)
    assert call(model, (X, Y)) == (X, Y)
    assert call(model, {"a": X, "b": Y}) == (X, Y)


def test_logits_are_found() -> None:
    assert logits(X) is X
    assert logits({"logits": X}) is X
    assert logits(SimpleNamespace(logits=X)) is X
    for wrong in ((X,), {"loss": X}, None):
        with pytest.raises(InputError, match="logits"):
            logits(wrong)


def test_tensors_are_mapped_counted_and_taken() -> None:
    nested = (X, {"a": [Y, 3]}, "text")
    doubled = map_tensors(lambda t: t + 2, nested)
    assert [t.mean().item() for t in tensors(doubled)] == [2, 3]
    assert doubled[2] == "text"
    assert batch_size((torch.tensor(1), X)) == 3
    assert take({"x": X, "k": torch.tensor(1)}, 2)["x"].shape == (2, 2)
    with pytest.raises(DataError):
        batch_size((torch.tensor(1),))


def test_single_examples_are_doubled_and_others_are_not() -> None:
    first, second = tensors(doubled((X[:1], torch.ones(2, 2))))
    assert torch.equal(first, torch.cat([X[:1], X[:1]]))
    assert second.shape == (2, 2)


def test_sparse_batches_are_taken() -> None:
    assert torch.equal(take(X.to_sparse(), 2).to_dense(), X[:2])


def test_structures_are_kept_by_map_tensors() -> None:
    Pair = namedtuple("Pair", "a b")
    nested = {"list": [X], "tuple": (X, None), "named": Pair(X, 1)}
    mapped = map_tensors(lambda t: t + 1, nested)
    assert [type(v) for v in mapped.values()] == [list, tuple, Pair]
    assert torch.equal(mapped["named"].a, X + 1)


def test_unchanged_undoes_what_is_written_also_after_an_error() -> None:
    net = nn.BatchNorm1d(2)
    net.cache = {"list": [1]}
    held, mean = net.running_mean, net.running_mean.clone()

    def change() -> None:
        net.running_mean += 1
        net.running_var = torch.zeros(5)
        net.cache["list"].append(2)
        net.new = 3
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), unchanged(net):
        change()
    assert net.running_mean is held
    assert torch.equal(held, mean)
    assert net.running_var.shape == (2,)
    assert net.cache == {"list": [1]}
    assert not hasattr(net, "new")


@pytest.mark.parametrize("data", [[], [X[:0]], iter([]), X, {"x": X}, 3])
def test_data_without_an_example_are_refused(data) -> None:
    with pytest.raises(DataError, match="prune"):
        list(batches(data, "prune(data)"))


def test_empty_batches_are_skipped() -> None:
    assert len(list(batches([X[:0], X], "data"))) == 1


def test_evaluating_restores_every_flag_also_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    net[0].eval()

    def fail() -> None:
        assert not net.training
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), evaluating(net):
        fail()
    assert [m.training for m in net.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_seeded_restores_all_generators() -> None:
    with seeded(0):
        state = draws()
        with seeded(3):
            first = draws()
        after = draws()
    with seeded(0):
        assert draws() == state
        assert draws() == after
    with seeded(3):
        assert draws() == first


def sequences(length):
    """A batch as tokenizers give it, padded to its longest."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 2:] = 0
    values = torch.ones(2, length, 3)
    return {"input_ids": mask + 5, "attention_mask": mask, "values": values, "age": torch.ones(2)}


def test_sequences_with_a_mask_are_padded_to_one_length():
    data = [sequences(4), {**sequences(6), "labels": torch.ones(2)}]
    (first, _), (second, labels) = list(of_one_length(data, "f(data)"))
    assert torch.equal(first["attention_mask"], F.pad(sequences(4)["attention_mask"], (0, 2)))
    assert torch.equal(first["input_ids"][:, 4:], torch.zeros(2, 2, dtype=torch.long))
    assert first["values"].shape == (2, 6, 3)
    assert float(first["values"].sum()) == 2 * 4 * 3
    assert first["age"].shape == (2,)
    assert torch.equal(second["input_ids"], sequences(6)["input_ids"])
    assert labels is not None


def test_padded_loaders_draw_and_count_as_before():
    loader = DataLoader(range(9), 1, shuffle=True, collate_fn=lambda n: sequences(3 + n[0] % 2))
    padded = of_one_length(loader, "f(data)")
    assert operator.length_hint(padded) == 9
    with replayable(padded):
        assert generators(padded) == generators(loader)
        assert {len(batch["input_ids"][0]) for batch, _ in padded} == {4}


@pytest.mark.parametrize("data", [[X, X], [(X, Y)], [{"x": X}], [sequences(4), sequences(4)]])
def test_other_data_are_left_as_they_are(data):
    assert of_one_length(data, "f(data)") is data
