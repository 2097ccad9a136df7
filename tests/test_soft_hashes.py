"""Hashes by which inputs are known again."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from torch.utils.data import default_collate

from rarefy.distillation.soft_labels.hashes import input_hashes, item_hash


def test_hashes_tell_inputs_apart() -> None:
    x = torch.randn(6, 3, 8, 8)
    base = input_hashes(x)
    assert len(set(base.tolist())) == 6
    assert (input_hashes(x.clone()) == base).all()
    assert (input_hashes(x.contiguous(memory_format=torch.channels_last)) == base).all()
    assert (input_hashes(x[2:3]) == base[2:3]).all()
    assert (input_hashes(x.flip(-1)) != base).all()
    assert (input_hashes(x.double()) != base).all()
    assert (input_hashes(x.reshape(6, 3, 64)) != base).all()
    assert (input_hashes({"x": x, "mask": torch.ones(6, 2)}) != base).all()
    assert len(input_hashes((torch.zeros(2, 0), torch.ones(2)))) == 2
    for kind in (torch.bool, torch.bfloat16, torch.int64, torch.complex64):
        assert len(set(input_hashes(torch.tensor([0, 1]).to(kind)).tolist())) == 2


def test_a_large_input_is_hashed_in_part_everywhere() -> None:
    x = torch.zeros(1, 3, 64, 64)
    changed = x.clone()
    changed[:, :, 32:, :] = 1
    assert input_hashes(x) != input_hashes(changed)


@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=6), unique=True))
def test_an_item_has_the_hash_that_it_has_in_a_batch(values) -> None:
    items = [(torch.from_numpy(values) + shift, shift) for shift in range(3)]
    inputs, _ = default_collate(items)
    assert [item_hash(item) for item in items] == input_hashes(inputs).tolist()


def test_targets_do_not_count() -> None:
    x = torch.randn(4)
    assert item_hash((x, 0)) == item_hash([x, 5]) == item_hash((x,)) == item_hash(x)
    for key in ("labels", "label", "label_ids"):
        assert item_hash({"ids": [1, 2], key: 1}) == item_hash({"ids": [1, 2], key: 0})
        assert item_hash({"ids": [1, 2], key: 1}) != item_hash({"ids": [1, 3], key: 1})


Pair = namedtuple("Pair", "words length")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a sentence", "another"),
        (b"a", b"b"),
        ([1, 2, 3], [1, 2, 4]),
        ([0.5, 1.0], [0.5, 1.5]),
        ([1, 2, 3], [1.0, 2.0, 3.0]),
        (np.arange(3), np.arange(1, 4)),
        (np.array(["a"]), np.array(["b"])),
        ((["a", "b", "c"], 0), (["a", "b", "d"], 0)),
        ((Pair("a", 1), 0), (Pair("b", 1), 0)),
        ({"text": "a", "mask": None}, {"text": "b", "mask": None}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (1, 2),
        (object(), None),
    ],
)
def test_hashes_tell_items_apart(one, other) -> None:
    assert item_hash(one) != item_hash(other)
    assert item_hash(one) == item_hash(one)


def test_images_are_known_by_their_pixels() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    found = item_hash((image.fromarray(pixels), 0))
    assert found == item_hash((image.fromarray(pixels.copy()), 1))
    assert found != item_hash((image.fromarray(pixels[::-1].copy()), 0))
    assert found == item_hash(pixels)


def test_what_has_no_value_that_could_be_read_counts_by_its_type() -> None:
    assert item_hash(object()) == item_hash(object())
    assert item_hash([]) == item_hash(())
