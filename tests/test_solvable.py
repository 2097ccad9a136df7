"""Which weights can be solved for, where their entries lie, and what is left of their outputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from product_networks import IMAGE, Reads, X, graph
from rarefy.pruning.running.products import outputs_dim, positions
from rarefy.pruning.running.solvable import Layers, part_of, picked, put, survivors

REASONS = {
    "linear": (Reads((3, 4), lambda x, w, b: F.linear(x, w, b), 3), X, ""),
    "a slice": (Reads((6, 4), lambda x, w, b: F.linear(x, w[2:5], b[1:4]), 6), X, ""),
    "a turned slice": (Reads((4, 8), lambda x, w, b: x @ w[:, 2:5]), X, ""),
    "several inputs": (
        Reads((5, 4, 3), lambda x, w, b: torch.einsum("bhk,hko->bo", x, w)), X, ""),
    "a kernel in a row": (Reads((3, 4, 1, 1), lambda x, w, b: F.linear(x, w.flatten(1))), X, ""),
    "groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE, ""),
    "a bias in a row": (
        Reads((4, 3), lambda x, w, b: torch.addmm(b, x[0], w), (1, 3)), X, ""),
    "cast": (Reads((3, 4), lambda x, w, b: F.linear(x, w.to(torch.bfloat16).float(), b), 3), X, ""),
    "twice": (
        Reads((4, 4), lambda x, w, b: F.linear(F.linear(x, w).relu(), w)), X, "several times"),
    "overlapping": (
        Reads((6, 4), lambda x, w, b: F.linear(x, w[:4]) + F.linear(x, w[2:])), X, "several times"),
    "side by side": (Reads((8, 4), lambda x, w, b: F.linear(x, w[:4]) + F.linear(x, w[4:])), X, ""),
    "spread": (
        Reads((1, 4), lambda x, w, b: F.linear(x, w.expand(3, 4))), X, "several times"),
    "read elsewhere": (
        Reads((3, 4), lambda x, w, b: F.linear(x, w) * w.norm()), X, "several times"),
    "its own bias": (
        Reads((3, 4), lambda x, w, b: F.linear(x, w, w[:, 0])), X, "several times"),
    "a shared bias": (
        Reads((3, 4), lambda x, w, b: F.linear(x, w, b) + b, 3), X, "bias is used several"),
    "a computed bias": (
        Reads((3, 4), lambda x, w, b: F.linear(x, w, b * 2), 3), X, "bias is computed"),
    "a matrix added": (
        Reads((4, 3), lambda x, w, b: torch.addmm(b, x[0], w), (5, 3)), X, "not a plain product"),
    "scaled": (
        Reads((4, 3), lambda x, w, b: torch.addmm(b, x[0], w, alpha=2), 3), X, "not a plain"),
    "one matrix each": (
        Reads((5, 4, 3), lambda x, w, b: torch.einsum("btc,tcd->btd", x, w)), X, "not a plain"),
    "several outputs": (
        Reads((4, 2, 3), lambda x, w, b: torch.einsum("btc,chd->bthd", x, w)), X, "not a plain"),
    "no batch": (nn.Conv2d(4, 3, 3), IMAGE[0], "no batch"),
    "nothing": (Reads((0, 4), lambda x, w, b: F.linear(x, w)), X, "no entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_solved_is_told(name) -> None:
    net, x, reason = REASONS[name]
    layers = Layers(graph(net, x))
    found = [layers.unsolvable(uses) for uses in layers.groups()]
    assert found
    assert all(reason in why if reason else not why for why in found), found


@pytest.mark.parametrize("name", [name for name, (*_, reason) in REASONS.items() if not reason])
def test_entries_are_taken_and_put_back(name) -> None:
    net, x, _ = REASONS[name]
    layers = Layers(graph(net, x))
    weight = net.weight.detach().clone()
    for product in layers.products.values():
        at = positions(product)
        assert len(at.unique()) == at.numel()
        found = picked(weight, at)
        wanted = weight.clone()
        wanted.view(-1)[at.flatten()] = 2 * found.flatten()
        put(weight, at, 2 * found)
        assert torch.equal(weight, wanted)
        outputs = at.shape[0] * at.shape[1]
        assert product.node.shape[outputs_dim(product)] == outputs


def test_entries_are_put_into_memory_of_any_order() -> None:
    weight = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
    wanted = weight.clone().contiguous()
    at = torch.arange(16, 32).view(1, 1, 16)
    put(weight, at, torch.arange(16.0))
    wanted[1] = torch.arange(16.0).view(4, 2, 2)
    assert torch.equal(weight, wanted)


def test_parts_of_a_parameter_are_named_as_they_are_indexed() -> None:
    cases = {
        "[2:5]": lambda w: w[2:5],
        "[:, 1:3]": lambda w: w[:, 1:3],
        "[0:5:2]": lambda w: w[::2],
        "[1:6:2, 0:2]": lambda w: w[1::2, :2],
        "[3:4]": lambda w: w[3:4],
        "": lambda w: w.view(6, 4),
    }
    for expected, take in cases.items():
        width = take(torch.zeros(6, 4)).shape[1]
        net = Reads((6, 4), lambda x, w, b, take=take, n=width: F.linear(x[..., :n], take(w)))
        (product,) = Layers(graph(net, X)).products.values()
        assert part_of(product) == expected


KEPT = {
    "linear": (nn.Linear(4, 6), nn.Linear(3, 2), X, {0: [1, 4], 1: [0, 2, 3]}, [1, 4]),
    "conv": (nn.Conv2d(4, 6, 3), nn.Conv2d(2, 3, 3), IMAGE, {0: [5, 0, 3], 1: [1, 2]}, [5, 0, 3]),
    "depthwise": (
        nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(2, 4, 3, groups=2), IMAGE,
        {0: [2, 3, 6, 7]}, [2, 3, 6, 7]),
    "one group is left of a transposed one": (
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(2, 3, 3), IMAGE,
        {0: [2, 3]}, [3, 4, 5]),
    "groups of a transposed one": (
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 2, 3, groups=2), IMAGE,
        {1: [2]}, [2, 5]),
    "nothing went": (nn.Linear(4, 3), nn.Linear(4, 3), X, {}, [0, 1, 2]),
    "what went is not known": (nn.Linear(4, 3), nn.Linear(4, 2), X, {}, None),
    "which inputs went is not known": (nn.Linear(4, 3), nn.Linear(2, 3), X, {}, [0, 1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_outputs_that_are_left_are_known_by_their_entries(name) -> None:
    net, small, x, kept, wanted = KEPT[name]
    inputs = small.weight.shape[1] if isinstance(small, nn.Linear) else small.in_channels
    y = x[..., :inputs] if isinstance(small, nn.Linear) else x[:, :inputs]
    (left,), (right,) = (Layers(graph(n, v)).products.values() for n, v in ((net, x), (small, y)))
    given = {dim: torch.from_numpy(np.array(index)) for dim, index in kept.items()}
    found = survivors(left, right, given)
    assert (found if found is None else found.tolist()) == wanted


def test_packed_projections_have_names_of_their_own() -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    layers = Layers(graph(net, x, y, y))
    names = [layers.name(uses[0]) for uses in layers.groups()]
    assert names == ["in_proj_weight[0:8]", "in_proj_weight[8:24]", "out_proj"]
    assert not any(layers.unsolvable(uses) for uses in layers.groups())
