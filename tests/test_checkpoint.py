"""Checkpoints, and going on from them as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from rarefy.errors import DataError, FormatError, InputError, OutputError
from rarefy.pruning.gradual import GradualPruning
from rarefy.schedules import Cubic
from rarefy.training.checkpoint import Checkpoints, decode, encode, read
from rarefy.training.distill import distill
from rarefy.training.identity import described
from rarefy.training.train import train
from training_networks import Augmented, conv, mlp, random_batches, same

STEPS = 18
"""Three epochs of 44 examples in batches of 8."""


class KilledError(Exception):
    """Stands for what ends a process."""


def recorded(call, dies=0):
    """The losses of a training that dies in a step, and its result."""
    losses = []

    def loss(logits, reference, **rest):
        found = nn.functional.cross_entropy(logits, reference)
        losses.append(found.item())
        if len(losses) == dies:
            raise KilledError
        return found

    try:
        return losses, call(loss)
    except KilledError:
        return losses, None


def history(net):
    return [(e.number, e.loss, e.lr, e.val) for e in net.trained.epochs]


class Fading(torch.optim.SGD):
    """Its steps get smaller, by a count that each group holds."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] /= group["count"]
        super().step(closure)


class Summing(torch.optim.SGD):
    """Its state is of other types than the parameters, and nested."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                start = {"n": torch.tensor(2**24), "sums": [torch.zeros_like(p).double()]}
                state = self.state[p] = self.state[p] or start
                state["n"] += 1
                state["sums"][0] += p.grad.double() / 3
                p -= group["lr"] * (state["sums"][0] * (state["n"] % 7)).float()


class Several(torch.optim.Optimizer):
    """An optimizer for matrices and one for vectors, which hold all that there is to hold."""

    def __init__(self, groups, lr=0.01):
        self.within = [torch.optim.NAdam(groups[:1], lr), torch.optim.Adamax(groups[1:], lr)]
        super().__init__(groups, {"lr": lr})
        self.join()

    def join(self):
        self.param_groups = [group for one in self.within for group in one.param_groups]

    def step(self, closure=None):
        for one in self.within:
            one.step()

    def state_dict(self):
        return {"within": [one.state_dict() for one in self.within]}

    def load_state_dict(self, state_dict):
        for one, held in zip(self.within, state_dict["within"], strict=True):
            one.load_state_dict(held)
        self.join()


VARIANTS = [
    {"optimizer": "sgd"},
    {"optimizer": Fading, "lr": 0.05},
    {"optimizer": Summing, "lr": 0.01},
    {"optimizer": Several},
    {"optimizer": "adamw", "lr": 0.01, "ema": 0.9, "keep": "best"},
    {"accumulate": 4, "clip_norm": 1.0, "precision": "bf16"},
]


@pytest.mark.parametrize(
    "options", VARIANTS, ids=["sgd", "fading", "summing", "several", "adamw", "accumulate"]
)
@pytest.mark.parametrize("every", [1, 4, None])
def test_going_on_is_never_having_stopped(tmp_path, options, every) -> None:
    def run(folder, **more):
        return lambda loss: train(
            conv(),
            DataLoader(Augmented(), 8, shuffle=True),
            loss=loss,
            val=random_batches(1),
            progress=False,
            epochs=3,
            checkpoint=folder,
            every=every,
            **more,
            **options,
        )

    wanted, whole = recorded(run(tmp_path / "whole"))
    assert len(wanted) == STEPS
    before, _ = recorded(run(tmp_path / "cut"), dies=11)
    after, found = recorded(run(tmp_path / "cut", resume=True))
    assert before == wanted[:11]
    assert after == wanted[-len(after) :]
    assert 0 < len(after) < STEPS
    assert same(found, whole)
    assert history(found) == history(whole)
    assert found.trained.resumed is not None
    assert whole.trained.resumed is None
    assert found.trained.steps == whole.trained.steps
    assert len(list((tmp_path / "cut").glob("*"))) == 2


def test_what_tells_trainings_apart_is_the_same_in_another_process() -> None:
    own = Path(__file__).stem
    made = partial(Fading, [history], foreach=None, hooks={"first": recorded})
    assert described(made).startswith(f"{own}.Fading([<function history>]")
    assert " at 0x" not in described(made)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_kill_at_any_step(tmp_path, optimizer) -> None:
    def run(folder, dies):
        (tmp_path / folder).mkdir(exist_ok=True)
        script = Path(__file__).with_name("killed_training.py")
        return subprocess.run(
            [sys.executable, str(script), str(tmp_path / folder), optimizer, str(dies)],
            capture_output=True,
            text=True,
            check=False,
        )

    whole = run("whole", 0)
    assert whole.returncode == 0, whole.stderr
    dies = random.Random(optimizer).randint(2, STEPS - 1)
    assert run("cut", dies).returncode == -signal.SIGKILL
    after = run("cut", 0)
    assert after.returncode == 0, after.stderr
    assert after.stdout == whole.stdout
    wanted, found = ((tmp_path / name / "losses").read_text().split() for name in ("whole", "cut"))
    assert found[: dies - 1] + found[dies:] == wanted


def test_callbacks_with_a_state_go_on(tmp_path) -> None:
    def run(folder, resume=False):
        return lambda loss: train(
            mlp(),
            random_batches(),
            loss=loss,
            after_step=GradualPruning(Cubic(0.8, steps=10), every=2),
            progress=False,
            epochs=3,
            checkpoint=tmp_path / folder,
            every=1,
            resume=resume,
        )

    wanted, whole = recorded(run("whole"))
    recorded(run("cut"), dies=6)
    after, found = recorded(run("cut", resume=True))
    assert after == wanted[5:]
    assert same(found, whole)


def test_a_finished_training_is_returned_at_once(tmp_path) -> None:
    options = {"epochs": 2, "progress": False, "checkpoint": tmp_path, "val": random_batches(1)}
    whole = distill(conv(), mlp(), random_batches(), ema=0.5, **options)
    calls = []
    found = distill(
        conv(), mlp(), random_batches(), ema=0.5, resume=True, after_step=None, **options
    )
    assert same(found, whole)
    assert not calls
    assert history(found) == history(whole)
    assert found.trained.teachers == whole.trained.teachers


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lr": 0.2}, "lr: 0.1, now 0.2"),
        ({"epochs": 3}, "epochs: 2, now 3"),
        ({"seed": 1}, "seed: 0, now 1"),
        ({"model": mlp(seed=1)}, "network: "),
        ({"data": random_batches(5)}, "batches: 4, now 5"),
        ({"data": random_batches(seed=1)}, "does not begin with the batch"),
        ({"loss": nn.functional.cross_entropy}, "loss: "),
    ],
)
def test_checkpoints_of_another_training_are_refused(tmp_path, change, what) -> None:
    given = {"model": mlp(), "data": random_batches(), "lr": 0.1, "epochs": 2}
    options = {"progress": False, "checkpoint": tmp_path}
    train(**given, **options)
    with pytest.raises(InputError, match=what):
        train(**(given | change), **options, resume=True)


def test_folders_are_taken_only_when_asked(tmp_path) -> None:
    options = {"epochs": 1, "progress": False, "checkpoint": tmp_path / "new"}
    first = train(mlp(), random_batches(), resume=True, **options)
    with pytest.raises(OutputError, match=r"resume=True to go on"):
        train(mlp(), random_batches(), **options)
    assert same(first, train(mlp(), random_batches(), resume=True, **options))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(mlp(), random_batches(), epochs=1, checkpoint=tmp_path / "file")


def damage(file, how):
    held = bytearray(file.read_bytes())
    if how == "truncated":
        held = held[: len(held) // 2]
    elif how == "flipped":
        held[-5] ^= 1
    else:
        held = bytearray()
    file.write_bytes(held)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, how) -> None:
    options = {"epochs": 3, "checkpoint": tmp_path}
    whole = train(mlp(), random_batches(), progress=False, **options)
    folder = Checkpoints(tmp_path, "train")
    damage(folder.files()[0], how)
    with pytest.warns(RuntimeWarning, match="passed over a damaged checkpoint, step-"):
        found = train(mlp(), random_batches(), resume=True, progress=False, **options)
    assert same(found, whole)
    for file in folder.files():
        damage(file, how)
    with pytest.raises(FormatError, match="no checkpoint can be read"):
        train(mlp(), random_batches(), resume=True, progress=False, **options)


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch) -> None:
    import safetensors.torch

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    options = {"epochs": 2, "progress": False, "checkpoint": tmp_path}
    train(mlp(), random_batches(), **{**options, "epochs": 1})
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.warns(RuntimeWarning, match=r"No space left.*earlier checkpoints"):
            found = train(mlp(), random_batches(), **{**options, "checkpoint": tmp_path / "other"})
        with pytest.raises(OutputError, match="Make room"):
            Checkpoints(tmp_path, "train").write(9, {})
    assert same(found, train(mlp(), random_batches(), epochs=2, progress=False))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == kept
    assert not list((tmp_path / "other").iterdir())


def test_an_interrupt_saves_the_step(tmp_path) -> None:
    wanted, whole = recorded(
        lambda loss: train(mlp(), random_batches(), loss=loss, epochs=3, progress=False)
    )
    own = signal.getsignal(signal.SIGINT)

    def stop(model):
        stop.calls += 1
        if stop.calls == 6:
            os.kill(os.getpid(), signal.SIGINT)

    stop.calls = 0

    def run(loss, **more):
        return train(
            mlp(),
            random_batches(),
            loss=loss,
            epochs=3,
            progress=False,
            checkpoint=tmp_path,
            after_step=stop,
            **more,
        )

    model = mlp()
    with pytest.raises(KeyboardInterrupt, match=r"step 6; go on with resume=True"):
        recorded(run)
    assert signal.getsignal(signal.SIGINT) is own
    after, found = recorded(lambda loss: run(loss, resume=True))
    assert after == wanted[6:]
    assert same(found, whole)
    assert same(model, mlp())


def test_arguments_that_do_not_fit(tmp_path) -> None:
    for wrong in ({"resume": True}, {"every": 5}):
        with pytest.raises(InputError, match="checkpoint="):
            train(mlp(), random_batches(), **wrong)
    with pytest.raises(InputError, match="counts optimizer steps"):
        train(mlp(), random_batches(), checkpoint=tmp_path, every=0)
    with pytest.raises(DataError, match="only once"):
        train(mlp(), iter(random_batches()), checkpoint=tmp_path, epochs=1)


def test_plain_values_come_back_as_they_were() -> None:
    value = {
        "a": [1, 2.5, None, True, "x"],
        3: (torch.arange(3), {"b": float("inf")}),
        "empty": [{}, (), []],
        "tiny": 0.1 + 0.2,
    }
    tensors = {}
    import json

    found = decode(json.loads(json.dumps(encode(value, tensors))), tensors)
    assert torch.equal(found[3][0], value[3][0])
    assert found | {3: 0} == value | {3: 0}
    assert found[3][1] == value[3][1]
    with pytest.raises(InputError, match="a set is in the state"):
        encode({"a": {1}}, {})


def test_damage_anywhere_is_noticed(tmp_path) -> None:
    """A bit of the header's text is as much under the checksum as one of the numbers."""
    data = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))]
    train(nn.Linear(4, 2), data, epochs=2, checkpoint=tmp_path, progress=False)
    newest = sorted(tmp_path.iterdir())[-1]
    whole = newest.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    begin = whole.index(b'"state"')
    for place in range(begin, min(8 + length, len(whole)), 37):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FormatError):
            read(newest)
