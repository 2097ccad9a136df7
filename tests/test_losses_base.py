"""What all losses share: sums, schedules, and the places of features."""

import doctest
import importlib
import inspect
import math
import pickle
import pkgutil
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import rarefy
from loss_cases import pair
from rarefy import losses
from rarefy.distillation.losses import KD, MSE, SP, At, CrossEntropy, FitNet, Loss, Weighted
from rarefy.errors import InputError
from rarefy.schedules import Cosine, Linear


def test_the_namespace_is_the_room() -> None:
    assert rarefy.losses is losses
    assert all(hasattr(losses, name) for name in losses.__all__)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(losses.__path__)])
def test_examples_of_docstrings_are_true(name) -> None:
    module = importlib.import_module(f"{losses.__name__}.{name}")
    known = {n: getattr(losses, n) for n in losses.__all__}
    known |= {"torch": torch, "math": math, "Linear": Linear}
    assert doctest.testmod(module, extraglobs=known).failed == 0


def test_losses_add_and_scale() -> None:
    student, teacher = pair((4, 5))
    mixed = 0.9 * KD(4) + MSE() * 0.1
    wanted = 0.9 * KD(4)(student, teacher) + 0.1 * MSE()(student, teacher)
    assert mixed(student, teacher).item() == pytest.approx(wanted.item())
    assert (2 * mixed)(student, teacher).item() == pytest.approx(2 * wanted.item())
    assert mixed == Weighted(((0.9, KD(4)), (0.1, MSE())))
    assert mixed.against == "teacher"
    assert (CrossEntropy() * 2).against == "labels"


def test_sums_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="label_weight"):
        KD() + CrossEntropy()
    with pytest.raises(InputError, match="finite"):
        math.nan * KD()
    with pytest.raises(TypeError):
        KD() + 1


def test_a_schedule_is_a_weight_or_a_number_of_a_loss() -> None:
    student, teacher = pair((4, 5))
    loss = Linear(1, 0, 10) * KD(temperature=Linear(8, 2, 10)) + MSE()
    for step, (weight, temperature) in {0: (1, 8), 5: (0.5, 5), 99: (0, 2)}.items():
        found = loss.at_step(step)
        assert found == weight * KD(float(temperature)) + MSE()
        wanted = weight * KD(temperature)(student, teacher) + MSE()(student, teacher)
        assert found(student, teacher).item() == pytest.approx(wanted.item())


def test_factors_multiply_schedules() -> None:
    loss = 3 * (Linear(0, 1, 10) * (Cosine(4.0, 10) * KD()))
    (weight, _), *others = loss.at_step(5).terms
    assert not others
    assert weight == pytest.approx(3 * 0.5 * 2.0)
    assert (1 * (Linear(0, 1, 10) * KD())).terms == ((Linear(0, 1, 10), KD()),)
    assert (2 * (3 * KD())).terms == ((6, KD()),)
    assert ((lambda step: step / 2) * KD()).at_step(3).terms == ((1.5, KD()),)


def test_what_depends_on_no_step_is_the_same_object() -> None:
    loss = KD(4) + 2 * SP().at("layer3")
    assert loss.at_step(7) is loss
    assert KD().at_step(0).at_step(1) == KD()


def test_sums_within_sums_have_flat_terms() -> None:
    inner = KD(2) + 2 * MSE()
    outer = Weighted(((3.0, inner), (Linear(0, 1, 10), inner)))
    assert [loss for _, loss in outer.terms] == [KD(2), MSE()] * 2
    assert [weight for weight, _ in outer.at_step(5).terms] == [3, 6, 0.5, 1]


def test_a_call_names_no_step() -> None:
    student, teacher = pair((4, 5))
    for loss in (KD(temperature=Linear(8, 2, 10)), Linear(1, 0, 10) * KD()):
        with pytest.raises(InputError, match=r"at_step\(step\)"):
            loss(student, teacher)


def test_what_a_schedule_gives_is_checked() -> None:
    with pytest.raises(InputError, match="temperature"):
        KD(temperature=Linear(1, -1, 10)).at_step(10)
    with pytest.raises(InputError, match="finite"):
        ((lambda step: math.nan) * KD()).at_step(0)


def test_losses_are_values() -> None:
    loss = KD(Linear(8, 2, 10)) + Linear(0, 1, 9) * FitNet().at("a", "b")
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert hash(loss) == hash(KD(Linear(8, 2, 10)) + Linear(0, 1, 9) * FitNet().at("a", "b"))


def test_terms_of_features_and_of_outputs_mix() -> None:
    loss = KD(4) + 100 * SP().at("layer3") + FitNet().at("layer2", teacher="layer4")
    assert loss.against == "teacher"
    assert (SP().at("a") + FitNet().at("b")).against == "features"
    assert [w for w, _ in loss.terms] == [1, 100, 1]
    assert loss.terms[2][1] == At(FitNet(), "layer2", "layer4")
    student, teacher = pair((4, 5))
    assert loss.terms[1][1](student, teacher) == SP()(student, teacher)
    with pytest.raises(InputError, match="features at 'layer3'"):
        loss(student, teacher)
    with pytest.raises(InputError, match="label_weight"):
        loss + CrossEntropy()


def test_a_term_of_features_says_which() -> None:
    for make in (lambda: KD() + SP(), lambda: 2 * SP(), lambda: SP() * Linear(0, 1, 9)):
        with pytest.raises(InputError, match=r"SP\(\.\.\.\)\.at\('layer3'\)"):
            make()


@pytest.mark.parametrize("path", [("a", "b"), (), 3, ("a", 3)])
def test_a_loss_of_one_feature_takes_one_path(path) -> None:
    with pytest.raises(InputError, match="one module"):
        SP().at(path)


def test_a_loss_of_several_features_takes_as_many_paths_of_both() -> None:
    @dataclass(frozen=True)
    class Several(FitNet):
        several: ClassVar[bool] = True

    assert Several().at(("a", "b")).teacher == ("a", "b")
    with pytest.raises(InputError, match="2 modules of the student, 1 of the teacher"):
        Several().at(("a", "b"), ("c",))
    with pytest.raises(InputError, match="several modules"):
        Several().at("a")


def test_a_loss_of_the_users_own_adds_too() -> None:
    class Mine(Loss):
        against = "teacher"

        def __call__(self, logits, reference, mask=None):
            return (logits - reference).abs().mean()

    student, teacher = pair((4, 5))
    loss = (0.5 * Mine() + KD()).at_step(3)
    wanted = 0.5 * (student - teacher).abs().mean() + KD()(student, teacher)
    assert loss(student, teacher).item() == pytest.approx(wanted.item())


def test_a_module_within_a_loss_is_no_schedule() -> None:
    @dataclass(frozen=True)
    class Wrapped(Loss):
        module: nn.Module
        against = "teacher"

        def __call__(self, logits, reference, mask=None):
            return self.module(logits, reference)

    student, teacher = pair((4, 5))
    loss = (2 * Wrapped(nn.MSELoss())).at_step(3)
    wanted = 2 * (student - teacher).square().mean()
    assert loss(student, teacher).item() == pytest.approx(wanted.item())


def test_labels_go_to_the_terms_that_need_them() -> None:
    class Labelled(Loss):
        against = "teacher"
        needs_labels = True

        def __call__(self, logits, reference, mask=None, labels=None):
            return logits.sum() * 0 + labels.sum()

    student, teacher = pair((4, 5))
    loss = Labelled() + 0 * KD()
    assert loss.needs_labels
    assert not (KD() + MSE()).needs_labels
    assert loss(student, teacher, None, torch.arange(4)).item() == 6


LOSSES = sorted(
    (v for v in vars(losses).values() if isinstance(v, type) and issubclass(v, Loss)),
    key=lambda v: v.__name__,
)
VALUES = [v for v in LOSSES if v not in (Loss, losses.FeatureLoss, losses.Regression)]


@pytest.mark.parametrize("kind", LOSSES, ids=lambda v: v.__name__)
def test_every_loss_is_documented_with_an_example(kind) -> None:
    assert kind.__name__ in losses.__all__
    text = inspect.getdoc(kind)
    if kind in VALUES:
        assert "Example:" in text
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen


@pytest.mark.parametrize("kind", [v for v in VALUES if v not in (Weighted, At)])
def test_every_number_of_a_loss_may_be_a_schedule(kind) -> None:
    names = [f.name for f in fields(kind) if f.type == "Number"]
    loss = kind(**dict.fromkeys(names, Linear(0.25, 0.75, 10)))
    found = loss.at_step(5)
    assert all(getattr(found, name) == 0.5 for name in names)
    assert (found is loss) == (not names)
    assert pickle.loads(pickle.dumps(loss)) == loss
    for name in names:
        with pytest.raises(InputError, match=name):
            loss.number(name)
        with pytest.raises(InputError, match=name):
            kind(**{name: math.nan})
        with pytest.raises(InputError, match=name):
            kind(**{name: "0.5"})


def test_terms_add_up() -> None:
    assert sum([KD(), MSE()]) == KD() + MSE()
    assert sum([SP().at("a")]) == SP().at("a")
    with pytest.raises(TypeError):
        1 + KD()
