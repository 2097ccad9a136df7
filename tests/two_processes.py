"""Trains in one of two processes; writes what it returned.

Arguments: folder, the case. Where the environment says that there is one process, it reads the
same batches two at a time, so that its steps are those of the two together.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from rarefy.copies import fingerprint
from rarefy.distillation.soft_labels.write import write_soft_labels
from rarefy.errors import RarefyError
from rarefy.metrics import Perplexity
from rarefy.training.evaluate import evaluate
from rarefy.training.train import train
from training_networks import Unsized, conv, mlp, random_batches

RANK, COUNT = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))


def even(two):
    """Batches of unequal sizes, in turn."""
    data = [(x[:n], y[:n]) for (x, y), n in zip(random_batches(6), (8, 3, 5, 8, 2, 7), strict=True)]
    return mlp(), Unsized(data), {"accumulate": 1 if two else 2, "metric": Perplexity()}


def shuffled(two):
    x, y = random_batches(1, size=50)[0]
    return conv(), DataLoader(TensorDataset(x, y), 8, shuffle=True), {"ema": 0.9, "keep": "best"}


def nan(two):
    data = random_batches(4)
    data[3] = (data[3][0] * float("nan"), data[3][1])
    return mlp(), data, {}


class Unread(nn.Sequential):
    """Nobody reads its last layer, as the pooler of a text model."""

    def forward(self, x):
        return nn.Sequential(*list(self)[:-1])(x)


def unread(two):
    net = Unread(*mlp(), nn.Linear(10, 10))
    nn.init.ones_(net[-1].weight)
    return net, random_batches(6), {"accumulate": 1 if two else 2, "metric": Perplexity()}


def too_few(two):
    return mlp(), random_batches(1), {}


def penalized(two):
    """The penalty reads what the loss does not."""
    net, data, options = unread(two)
    return net, data, options | {"regularizer": lambda net, step: net[-1].weight.square().sum()}


def drawing(two):
    def noise(net):
        net[0].weight.add_(torch.randn_like(net[0].weight), alpha=1e-3)

    return mlp(), random_batches(6), {"after_step": noise}


def parted(size):
    """A data set and what draws this process's part."""
    whole = TensorDataset(*random_batches(1, size=size)[0])
    return whole, DistributedSampler(whole, COUNT, RANK)


def divided(two):
    data, sampler = parted(40)
    held, part = parted(16)
    held = DataLoader(held, 4, sampler=part)
    return mlp(), DataLoader(data, batch_sampler=BatchSampler(sampler, 4, False)), {"val": held}


def prepared(two):
    from accelerate import Accelerator

    data = DataLoader(parted(40)[0], 4, shuffle=True)
    return mlp(), Accelerator(cpu=True).prepare(data), {}


def resumed(two):
    """Processes that begin with other weights than each other, as those of no seed do."""
    return mlp(seed=RANK), random_batches(6), {"again": {"resume": True}}


def occupied(two):
    return mlp(), random_batches(6), {"again": {}}


def elsewhere(two):
    """Folders that the processes do not share."""
    options = {"checkpoint": Path(sys.argv[1]) / f"own-{RANK}", "again": {"resume": True}}
    return mlp(), random_batches(6), options


def unstorable(two):
    class Hook:
        def __call__(self, net):
            pass

        def state_dict(self):
            return {"kept": {1, 2}}

    hook = Hook()
    hook.load_state_dict = print
    return mlp(), random_batches(6), {"after_step": hook}


def misnumbered(two):
    val = random_batches(5, seed=3)
    val[1][1][0] = 99
    return mlp(), random_batches(6), {"val": val}


def uneven(two):
    return mlp(), random_batches(2 + 2 * RANK), {}


def recomputing(two):
    class Net(nn.Sequential):
        def forward(self, x):
            return self[2](checkpoint(self[1], self[0](x), use_reentrant=True))

    middle = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    ends = mlp()
    return Net(ends[0], middle, ends[2]), random_batches(6), {}


def unsent(two):
    net = mlp()
    net.register_buffer("short", torch.ones(2, dtype=torch.int16))
    return net, random_batches(6), {}


def unheard(two):
    """Not to train, but to store: answers of the second process's share are NaN."""
    data = random_batches(40)
    data[30][0].fill_(float("nan"))
    return mlp(), data, None


CASES = {
    case.__name__: case
    for case in (
        *(even, shuffled, nan, unread, too_few, penalized, drawing, divided, prepared, resumed),
        *(occupied, elsewhere, unstorable, misnumbered, uneven, unsent, unheard, recomputing),
    )
}


def main(folder, case):
    torch.set_num_threads(1)
    two = "RANK" in os.environ
    rank = os.environ.get("RANK", "alone")
    model, data, options = CASES[case](two)
    given = {
        "val": random_batches(5, seed=3),
        "epochs": 2,
        "lr": 0.05,
        "checkpoint": Path(folder) / f"{case}-{'two' if two else 'one'}",
        **(options or {}),
    }
    again = given.pop("again", None)
    try:
        if options is None:
            write_soft_labels(model, data, given["checkpoint"], progress=False)
        net = train(model, data, **given)
        if again is not None:
            net = train(model, data, **given, **again)
    except RarefyError as error:
        found = {"error": str(error), "type": type(error).__name__}
    else:
        found = {
            "print": fingerprint(net),
            "weights": net.state_dict()["7.bias" if case == "shuffled" else "2.bias"].tolist(),
            "unread": net.state_dict().get("3.weight", torch.ones(1)).unique().tolist(),
            "history": [(e.loss, e.val) for e in net.trained.epochs],
            "before": net.trained.before,
            "train": net.trained.student.train,
            "steps": net.trained.steps,
            "threads": torch.get_num_threads(),
        }
        if case == "divided":
            found["whole"] = evaluate(net, DataLoader(given["val"].dataset, 4))
    (Path(folder) / f"{case}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        main(sys.argv[1], name)
