"""Quantized networks learn from the teacher: pruned, masked, with scales that stay."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rarefy as rf
from rarefy.distillation.losses import KD
from rarefy.pruning.prune import prune
from rarefy.pruning.sparsity.masks import hold
from rarefy.quantization.quantize import quantize
from rarefy.schemes import Int8
from rarefy.training.distill import distill
from rarefy.training.evaluate import evaluate
from rarefy.training.train import train
from rarefy.types import Budget
from training_networks import conv


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:500], order[500:]
    return TensorDataset(x[rest], y[rest]), TensorDataset(x[held], y[held])


@pytest.fixture(scope="module")
def teacher(digits):
    data = DataLoader(digits[0], 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    return train(conv(8), data, epochs=8, lr=0.1, progress=False)


def distance(teacher, net, data):
    x = data.tensors[0]
    with torch.no_grad():
        return float(KD()(net.eval()(x), teacher.eval()(x)))


def quantizers(net):
    return {name: b.clone() for name, b in net.named_buffers() if "scale" in name or "zero" in name}


@pytest.mark.parametrize("structure", ["2:4", "channel", "weight"])
def test_pruned_networks_learn_in_int8_and_stay_pruned(structure, digits, teacher):
    data = DataLoader(digits[0], 64)
    budget = None if structure == "2:4" else Budget(sparsity=0.5)
    small = prune(teacher, digits[0].tensors[0][:4], budget, structure=structure)
    before = quantize(small, [digits[0].tensors[0][:256]], Int8())
    kept = hold(before)
    after = distill(teacher, before, data, epochs=3, lr=0.01, after_step=kept, progress=False)
    assert distance(teacher, after, digits[1]) < 0.7 * distance(teacher, before, digits[1])
    test = DataLoader(digits[1], 256)
    assert evaluate(after, test) >= evaluate(before, test)
    for name, value in quantizers(before).items():
        assert torch.equal(dict(after.named_buffers())[name], value)
    for name, old in before.named_parameters():
        new = after.get_parameter(name)
        if structure != "channel" and old.ndim > 1 and name in small.sparsified.zeros:
            assert (new[old == 0] == 0).all()
        if structure == "2:4" and name in small.sparsified.zeros:
            assert ((new.flatten(1).unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()
        if new.ndim > 1:  # no gradient moves a weight on that has left its grid
            reach = 127.5 * dict(after.named_buffers())[f"{name}_scale"]
            assert (new.flatten(1).abs() / reach[:, None]).max() < 1.1


def test_training_weights_that_were_rounded_alone_is_told():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 4)
    small = rf.quantize(net, None, rf.WeightOnly(method="rtn"))
    with pytest.warns(RuntimeWarning, match=r"2 weights that were rounded alone, '0.weight'"):
        rf.distill(net, small, [x], epochs=1, progress=False)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    trained = rf.distill(net, small, [x], epochs=1, progress=False)
    assert torch.equal(trained[0].weight, small[0].weight)
