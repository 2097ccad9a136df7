"""Trains in one of two processes whose Accelerate is configured for FSDP; writes what it returned.

Arguments: folder, name of the run. Accelerate spreads over accelerators alone; on CPUs it
leaves out what it does there, which is all that ``on_cpus`` adds.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import accelerate.state
import torch
from torch import nn

import rarefy as rf
from rarefy.copies import fingerprint
from training_networks import random_batches


def on_cpus(begin):
    """``AcceleratorState.__init__`` that heeds ``ACCELERATE_USE_FSDP`` on CPUs, too."""

    def init(self, *args, fsdp_plugin=None, **options):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = accelerate.state.DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type

    return init


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(self.linear(x).relu())


class Net(nn.Module):
    def __init__(self, width, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.out = nn.Linear(width, 10)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)))


class Kill:
    """Sets a row to zero after every step; fails after some, once."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self, model):
        model.out.weight[0].zero_()
        self.count += 1
        if self.count == self.at:
            raise RuntimeError("killed")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def __repr__(self):
        return "Kill()"


def penalty(model, step):
    return 0.01 * model.stem[1].weight.abs().sum()


def plain(data, options, folder):
    return rf.train(Net(15, seed=int(os.environ["RANK"])), data, clip_norm=0.5, **options)


def average(data, options, folder):
    options |= {"accumulate": 2, "ema": 0.9, "keep": "best", "optimizer": "adamw"}
    return rf.train(Net(15), data, **options)


def features(data, options, folder):
    loss = rf.losses.KD(4) + rf.losses.FitNet().at("blocks.1")
    return rf.distill(Net(24, seed=1), Net(15), data, loss=loss, precision="bf16", **options)


def peer(data, options, folder):
    return rf.distill(rf.teachers.Peer(Net(24, seed=1)), Net(15), data, **options)


def follower(data, options, folder):
    return rf.distill(rf.teachers.Earlier(0.9), Net(15), data, **options)


def captured(data, options, folder):
    net = Net(15)
    small = rf.quantize(net, [x for x, _ in data], rf.Int8())
    return rf.distill(net, small, data, **options)


def resumed(data, options, folder):
    run = partial(rf.train, Net(15), data, regularizer=penalty, ema=0.9, **options)
    options["optimizer"] = "adamw"
    whole = run(after_step=Kill(0))
    try:
        run(after_step=Kill(5), checkpoint=folder, every=2)
    except RuntimeError:
        found = run(after_step=Kill(0), checkpoint=folder, every=2, resume=True)
    assert found.trained.resumed == 4
    assert fingerprint(found) == fingerprint(whole)
    assert not found.out.weight[0].any()
    return found


class Shifted(Net):
    """Its forward reads a buffer that its batches move."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        x = self.stem(x)
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return self.out(self.blocks(x - self.mean))


def buffered(data, options, folder):
    return rf.train(Shifted(15), data, **options)


def mixed(data, options, folder):
    net = Net(15)
    net.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=torch.float64)))
    return rf.train(net, data, **options)


def scalar(data, options, folder):
    net = Net(15)
    net.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    return rf.train(net, data, **options)


CASES = [plain, average, features, peer, follower, captured, resumed, buffered, scalar, mixed]


def main(folder, run, case):
    torch.set_num_threads(1)
    data = random_batches(6)
    options = {"epochs": 2, "lr": 0.05, "val": random_batches(5, seed=3), "progress": False}
    try:
        net = case(data, options, folder / f"{run}-checkpoints")
    except rf.errors.InputError as error:
        found = {"error": str(error)}
    else:
        assert all(type(p) is nn.Parameter for p in net.parameters())
        found = {
            "class": type(net).__name__,
            "print": fingerprint(net),
            "weights": [p.double().abs().sum().item() for p in net.state_dict().values()],
            "history": [(e.loss, e.val) for e in net.trained.epochs],
        }
    path = folder / f"{case.__name__}-{run}-{os.environ['RANK']}.json"
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    if "ACCELERATE_USE_FSDP" in os.environ:
        state = accelerate.state.AcceleratorState
        state.__init__ = on_cpus(state.__init__)
    for one in CASES if os.environ["WORLD_SIZE"] != "1" else [plain]:
        main(Path(sys.argv[1]), sys.argv[2], one)
