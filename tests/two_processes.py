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
from torch.utils.data import DataLoader, TensorDataset

from rarefy.copies import fingerprint
from rarefy.errors import DataError, TrainingError
from rarefy.metrics import Perplexity
from rarefy.training.train import train
from training_networks import Unsized, conv, mlp, random_batches


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


CASES = {"even": even, "shuffled": shuffled, "nan": nan, "unread": unread, "too_few": too_few}


def main(folder, case):
    torch.set_num_threads(1)
    two = "RANK" in os.environ
    rank = os.environ.get("RANK", "alone")
    model, data, options = CASES[case](two)
    where = Path(folder) / f"{case}-{'two' if two else 'one'}"
    try:
        net = train(
            model,
            data,
            val=random_batches(5, seed=3),
            epochs=2,
            lr=0.05,
            checkpoint=where,
            **options,
        )
    except (DataError, TrainingError) as error:
        found = {"error": str(error)}
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
    (Path(folder) / f"{case}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        main(sys.argv[1], name)
