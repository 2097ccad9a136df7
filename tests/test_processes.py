"""Gradients under two processes: equal on both, and those of one process on the joined batch."""

import json

import pytest

from several_processes import in_processes

WORKER = """
import json, os, sys
import torch
from torch import nn

torch.set_num_threads(1)

from accelerate import Accelerator
from rarefy.distillation.losses import KD, MSE, FitNet
from rarefy.training.distill import distill
from rarefy.training.objective import Objective
from rarefy.training.teachers import One, Peer
from rarefy.training.terms import heads_for


def net(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def objective(teacher):
    student = net(5, 1)
    tutor = teacher.start(student, "teacher")
    loss = KD(2) + 3 * FitNet().at("1")
    made = Objective("distill", student, loss, tutor, 0.25)
    made.heads = heads_for(loss, student, tutor.network, torch.zeros(2, 4))
    return made.train()


def gradients(made):
    named = sorted(made.named_parameters())
    assert all(p.grad is not None for _, p in named)
    return [(n, p.grad.flatten().tolist()) for n, p in named]


rank, out = int(os.environ["RANK"]), sys.argv[1]
torch.manual_seed(0)
x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
found = {}
for name, teacher in (("frozen", One(net(7, 2))), ("peer", Peer(net(7, 2)))):
    alone, shared = objective(teacher), objective(teacher)
    alone(x, y).backward()
    wrapped = accelerator.prepare(shared)
    mine = slice(4 * rank, 4 * rank + 4)
    accelerator.backward(wrapped(x[mine], y[mine], step=0))
    found[name] = {"alone": gradients(alone), "shared": gradients(shared)}
data = list(zip(x.split(2), y.split(2)))
result = distill(net(7, 2), net(5, 1), data, loss=KD() + FitNet().at("1"), epochs=2, progress=False)
found["trained"] = [p.flatten().tolist() for p in result.parameters()]
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    options = {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    script = folder / "worker.py"
    script.write_text(WORKER)
    in_processes(script, str(folder), **options)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["frozen", "peer"])
def test_gradients_of_student_and_heads_are_those_of_the_joined_batch(ranks, teacher) -> None:
    names = {name.split(".")[0] for name, _ in ranks[0][teacher]["shared"]}
    assert names == {"network", "heads"} | ({"tutor"} if teacher == "peer" else set())
    assert ranks[0][teacher]["shared"] == ranks[1][teacher]["shared"]
    for (name, found), (_, wanted) in zip(
        ranks[0][teacher]["shared"], ranks[0][teacher]["alone"], strict=True
    ):
        assert found == pytest.approx(wanted, abs=1e-6), name
        assert any(abs(value) > 1e-4 for value in wanted), name


@pytest.mark.slow
def test_both_processes_return_the_same_student(ranks) -> None:
    assert ranks[0]["trained"] == ranks[1]["trained"]
