"""Losses and stores that fit each other: what is learned from a store is what the teacher says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from rarefy.distillation.losses import JSD, KD, L2, MSE, Binary, ReverseKL, Standardized
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.records import Dense, Outputs, Sampled
from rarefy.errors import InputError
from rarefy.schedules import Linear
from rarefy.training.distill import distill
from soft_label_store import CLASSES, dataset, loader, teacher, write

torch.set_num_threads(1)

ONE = {"epochs": 1, "lr": 0.01, "progress": False, "label_weight": 0}


def net(seed: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))


@pytest.mark.parametrize("loss", [MSE(), Binary(), L2(), 0.5 * KD() + 0.1 * MSE()])
def test_losses_of_the_outputs_themselves_need_them(tmp_path, loss) -> None:
    data = loader(shuffle=False)
    write(tmp_path / "dense")
    with pytest.raises(InputError, match=r"log-probabilities.*Outputs\(\)"):
        distill(SoftLabels(tmp_path / "dense"), net(), data, loss=loss, **ONE)
    write(tmp_path / "outputs", form=Outputs("float32"))
    found = distill(SoftLabels(tmp_path / "outputs"), net(), data, loss=loss, **ONE)
    live = distill(teacher(), net(), data, loss=loss, **ONE)
    for a, b in zip(found.parameters(), live.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "loss", [KD(2), Standardized(MSE()), ReverseKL(), lambda a, b: (a - b).sum()]
)
def test_losses_of_probabilities_take_any_dense_store(tmp_path, loss) -> None:
    write(tmp_path)
    distill(SoftLabels(tmp_path), net(), loader(), loss=loss, **ONE)


def test_draws_are_for_kd_at_their_temperature(tmp_path) -> None:
    write(tmp_path, form=Sampled(20, temperature=2.0))
    store = SoftLabels(tmp_path)
    for loss in (None, KD(1.0), KD(Linear(4, 2, 5)), KD(2.0) + JSD(), ReverseKL(2.0)):
        with pytest.raises(InputError, match=r"temperature 2.*KD\(temperature=2\)"):
            distill(store, net(), loader(), loss=loss, **ONE)
    student, data = net(), DataLoader(dataset(), 100)
    found = distill(store, student, data, loss=KD(2.0), warmup=0.0, **ONE).trained.epochs[0].loss
    (x,) = (x for x, _ in data)
    with torch.no_grad():
        log_q = F.log_softmax(student(x).double() / 2, -1)
    p = F.softmax(store.answers().double() / 2, -1)
    assert found == pytest.approx(4 * float(F.kl_div(log_q, p, reduction="batchmean")), rel=1e-5)


def test_one_output_is_no_choice_of_a_class(tmp_path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1))
    for form in (None, Dense(), Sampled(4)):
        with pytest.raises(InputError, match=r"\(N, 1\) have one class.*Outputs\(\)"):
            write(tmp_path / "store", model=model, form=form)
    assert not (tmp_path / "store").exists()
    write(tmp_path / "store", model=model, form=Outputs())
    assert SoftLabels(tmp_path / "store").answers().std() > 0
