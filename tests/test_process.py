"""Training leaves the process and all that is the caller's as they were."""

import logging
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from rarefy.copies import fingerprint
from rarefy.process import replayable, set_epoch
from rarefy.training.distill import distill
from rarefy.training.evaluate import evaluate
from rarefy.training.train import train
from training_networks import (
    QUICK,
    conv,
    loader,
    mlp,
    random_batches,
    same,
)


def test_runs_repeat_bit_for_bit_and_the_seed_matters() -> None:
    runs = [train(conv(), loader(), seed=seed, **QUICK) for seed in (3, 3, 4)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    runs = [distill(conv(), conv(4), loader(), seed=seed, **QUICK) for seed in (3, 3, 4)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_runs_repeat_with_a_generator_of_the_loaders_own() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    data = loader(generator=generator)
    runs = [train(mlp(), data, **QUICK) for _ in range(2)]
    assert same(*runs)
    assert torch.equal(generator.get_state(), before)


def test_showing_accuracy_does_not_change_the_result(capsys) -> None:
    shown = train(conv(), loader(), val=loader(), epochs=2, lr=0.05, progress=True)
    assert same(shown, train(conv(), loader(), **QUICK))


def test_the_callers_networks_are_untouched() -> None:
    teacher, student = conv(), conv(4)
    teacher[2].eval()
    student[1].weight.requires_grad_(False)
    student[1].weight.grad = torch.ones_like(student[1].weight)
    flags = [m.training for n in (teacher, student) for m in n.modules()]
    kept = [fingerprint(teacher), fingerprint(student)]
    found = distill(teacher, student, random_batches(), **QUICK)
    evaluate(teacher, random_batches())
    assert [m.training for n in (teacher, student) for m in n.modules()] == flags
    assert [fingerprint(teacher), fingerprint(student)] == kept
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert (student[1].weight.grad == 1).all()
    assert torch.equal(found[1].weight, student[1].weight)
    assert not found[1].weight.requires_grad
    assert set(found.__dict__) - {"trained"} == set(student.__dict__)


def test_a_network_can_be_its_own_teacher() -> None:
    net = mlp()
    kept = fingerprint(net)
    found = distill(net, net, random_batches(), **QUICK)
    assert fingerprint(net) == kept
    assert not same(found, net)


def surroundings():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        list(warnings.filters),
        dict(os.environ),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        (logging.root.level, list(logging.root.handlers)),
        [dict(s._shared_state) for s in (PartialState, AcceleratorState, GradientState)],
        (sys.stdout, sys.stderr),
    )


def test_the_process_is_as_before() -> None:
    data = loader()
    before = surroundings()
    train(mlp(), data, **QUICK)
    distill(mlp(), mlp(seed=1), data, val=data, epochs=1)
    evaluate(mlp(), data)
    assert surroundings() == before


def test_the_process_is_as_before_an_error() -> None:
    before = surroundings()

    def interrupt(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(mlp(), loader(), after_step=interrupt)
    assert surroundings() == before
    train(mlp(), loader(), **QUICK)


def test_a_new_process_keeps_its_environment_and_filters() -> None:
    code = (
        "import os, sys, warnings, torch\n"
        "import rarefy as r\n"
        "assert not {'accelerate', 'rich', 'onnx'} & set(sys.modules)\n"
        "old = dict(os.environ), list(warnings.filters), torch.get_num_threads()\n"
        "data = [(torch.ones(2, 2), torch.tensor([0, 1]))]\n"
        "r.train(torch.nn.Linear(2, 2), data, progress=False)\n"
        "assert old == (dict(os.environ), list(warnings.filters), torch.get_num_threads())\n"
        "from accelerate import Accelerator\n"
        "assert Accelerator(mixed_precision='bf16').mixed_precision == 'bf16'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_an_accelerator_of_the_callers_stays_as_it_was() -> None:
    code = (
        "import torch, rarefy as r\n"
        "from accelerate import Accelerator\n"
        "own = Accelerator(gradient_accumulation_steps=4, mixed_precision='bf16')\n"
        "net = torch.nn.Linear(2, 2)\n"
        "out = r.train(net, [(torch.ones(2, 2), torch.tensor([0, 1]))], progress=False)\n"
        "assert not torch.equal(out.weight, net.weight)\n"
        "assert out.weight.dtype == out(torch.ones(2, 2)).dtype == torch.float32\n"
        "assert set(out.__dict__) - {'trained'} == set(net.__dict__)\n"
        "assert own.gradient_accumulation_steps == 4 and own.mixed_precision == 'bf16'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_works_where_gradients_are_off() -> None:
    model, data = mlp(), random_batches()
    wanted = train(model, data, **QUICK)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert same(train(model, data, **QUICK), wanted)
            assert not same(distill(mlp(seed=1), model, data, **QUICK), model)


def test_a_sampler_within_a_batch_sampler_is_told_of_epochs() -> None:
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
    data = DataLoader(range(8), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    with replayable(data):
        set_epoch(data, 3)
        assert sampler.epoch == 3
    assert sampler.epoch == 0
