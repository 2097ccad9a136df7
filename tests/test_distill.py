"""Distillation: kinds of losses, outputs and teachers, and what is found before the first step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rarefy.copies import fingerprint
from rarefy.distillation.losses import (
    CRD,
    DKD,
    KD,
    MGD,
    MSE,
    SP,
    AttentionMaps,
    Binary,
    CrossEntropy,
    FitNet,
    ReviewKD,
)
from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.views import Replay
from rarefy.distillation.soft_labels.write import write_soft_labels
from rarefy.errors import DataError, InputError, TrainingError
from rarefy.schedules import Linear
from rarefy.training.distill import distill
from rarefy.training.evaluate import evaluate
from rarefy.training.teachers import Earlier, Ensemble, Peer

torch.set_num_threads(1)

ONE = {"epochs": 1, "lr": 0.05, "schedule": "constant", "warmup": 0, "weight_decay": 0,
       "progress": False}  # fmt: skip


def seeded(make, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def conv(width: int = 4, seed: int = 0, classes: int = 3) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
        ),
        seed,
    )  # fmt: skip


def images(count: int = 3, size: int = 6, classes: int = 3):
    made = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 8, 8, generator=made),
         torch.randint(0, classes, (size,), generator=made))
        for _ in range(count)
    ]  # fmt: skip


def close(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, atol=1e-6) for x, y in pairs)


# --- features ------------------------------------------------------------------------------------


def test_steps_with_features_and_schedules_are_those_of_a_bare_loop() -> None:
    """Also statistics of BatchNorm: looking at the first batch must leave no trace."""
    teacher, student, data = conv(4, 1), conv(4, 2), images(2)
    loss = KD(Linear(4, 2, 2)) + Linear(1, 3, 2) * FitNet().at("2") + 0.5 * SP().at("5", "4")
    found = distill(teacher, student, data, loss=loss, label_weight=0.2, **ONE)
    wanted = copy.deepcopy(student).train()
    teacher = copy.deepcopy(teacher).eval()
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.05, momentum=0.9)
    for step, (x, y) in enumerate(data):
        with torch.no_grad():
            theirs = {i: teacher[: i + 1](x) for i in (2, 4, 8)}
        ours, value = {}, x
        for i, layer in enumerate(wanted):
            value = ours[i] = layer(value)
        total = KD((4, 3)[step])(ours[8], theirs[8])
        total = total + (1, 2)[step] * (ours[2] - theirs[2]).square().mean()
        total = total + 0.5 * SP()(ours[5], theirs[4])
        total = 0.8 * total + 0.2 * F.cross_entropy(ours[8], y)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert close(found, wanted)


def test_heads_are_trained_along_and_gone() -> None:
    teacher, student, data = conv(8, 1), conv(4, 2), images(2, 8)
    kept = fingerprint(student), fingerprint(teacher)
    loss = (
        FitNet().at("2") + 0.1 * CRD(width=5).at("5") + MGD().at("5") + ReviewKD(8).at(("2", "5"))
    )
    options = {**ONE, "epochs": 8, "lr": 0.02, "label_weight": 0.0}
    found = distill(teacher, student, data, loss=KD() + loss, **options)
    assert found.state_dict().keys() == student.state_dict().keys()
    assert not any(m._forward_hooks for net in (found, student, teacher) for m in net.modules())
    assert (fingerprint(student), fingerprint(teacher)) == kept
    assert set(vars(found)) - {"trained"} == set(vars(student))
    # Hints do what they are for: a fresh regressor fits the features of the result better.
    gap = [_left_by_a_linear_map(net, teacher, data) for net in (student, found)]
    assert gap[1] < gap[0]


def _left_by_a_linear_map(student, teacher, data) -> float:
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        ours = student.eval()[:3](x).movedim(1, -1).flatten(0, 2)
        theirs = copy.deepcopy(teacher).eval()[:3](x).movedim(1, -1).flatten(0, 2)
    ours = torch.cat([ours, torch.ones(len(ours), 1)], 1)
    solved = torch.linalg.lstsq(ours, theirs).solution
    return float((ours @ solved - theirs).square().mean())


def test_a_loss_of_features_alone() -> None:
    student, teacher = conv(4, 2), conv(4, 1)
    found = distill(teacher, student, images(), loss=1 * FitNet().at("2"), label_weight=0, **ONE)
    assert not torch.equal(found[0].weight, student[0].weight)
    assert torch.equal(found[8].weight, student[8].weight)
    bound = distill(teacher, student, images(), loss=FitNet().at("2"), label_weight=0, **ONE)
    assert fingerprint(bound) == fingerprint(found)


def test_pairs_are_found_and_told(capsys) -> None:
    teacher, student = conv(8, 1), conv(4, 2)
    options = ONE | {"progress": True}
    found = distill(teacher, student, images(), loss=KD() + 2 * SP().at("*"), **options)
    told = capsys.readouterr().err
    assert "features: 2 (6, 4, 8, 8) <- 2 (6, 8, 8, 8)" in told
    assert "features: 5 (6, 4, 4, 4) <- 5 (6, 8, 4, 4)" in told
    named = KD() + 1.0 * SP().at("2") + 1.0 * SP().at("5")
    assert close(found, distill(teacher, student, images(), loss=named, **ONE))
    several = KD() + ReviewKD(4).at(("*",))
    distill(teacher, student, images(), loss=several, **ONE)


def test_a_pruned_network_that_is_a_graph_has_features() -> None:
    from rarefy.graph.capture import capture, graph_model

    teacher, net = conv(4, 1).eval(), conv(4, 2).eval()
    graph = graph_model(net, capture(net, images()[0][0]))
    loss = KD() + FitNet().at("2")
    found = distill(teacher, graph, images(), loss=loss, **ONE)
    wanted = distill(teacher, net, images(), loss=loss, **ONE)
    for name, parameter in wanted.named_parameters():
        assert torch.allclose(found.get_parameter(name), parameter, atol=1e-6)
    with pytest.raises(InputError, match=r"no module has the path 'layer2'"):
        distill(teacher, graph, images(), loss=FitNet().at("layer2"), **ONE)


def test_wrong_places_are_named_before_the_first_step() -> None:
    steps = []
    options = {**ONE, "after_step": steps.append}
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    flat = [torch.randn(6, 4)]
    for loss, what in (
        (FitNet().at("33"), r"student: no module has the path '33'"),
        (FitNet().at("2", "44"), r"teacher: no module has the path '44'"),
        (FitNet().at("2", "7"), "no projector leads"),
    ):
        with pytest.raises(InputError, match=what):
            distill(conv(8), conv(), images(), loss=loss, **options)
    with pytest.raises(InputError, match="overwritten in place"):
        distill(net, net, flat, loss=FitNet().at("0"), **options)
    with pytest.raises(InputError, match="Name the features"):
        distill(net, net, flat, loss=FitNet().at("*"), **options)
    assert not steps


# --- kinds of outputs and labels -----------------------------------------------------------------


class Text(nn.Module):
    """Tokens to logits and attention."""

    def __init__(self, width: int = 8, words: int = 20, classes: int = 6) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(words, width), Attention(width)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        return {"logits": self.head(x + self.attend(x, attention_mask)[0])}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(mask[:, None, None] == 0, -1e4)
        shares = scores.softmax(-1)
        return (shares @ v).transpose(1, 2).flatten(2), shares


def test_padding_counts_for_nothing_in_logits_and_features() -> None:
    ids = torch.randint(1, 20, (4, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 4)
    loss = KD() + FitNet().at("embed") + SP().at("attend") + 5 * AttentionMaps().at("attend[1]")
    found = []
    for inputs in (ids, torch.where(mask.bool(), ids, 0)):
        labels = torch.where(mask.bool(), inputs % 6, -100)
        data = [{"input_ids": inputs, "attention_mask": mask, "labels": labels}]
        student, teacher = seeded(Text, 1), seeded(lambda: Text(16), 2)
        found.append(distill(teacher, student, data, loss=loss, **ONE))
    assert torch.equal(found[0].head.weight, found[1].head.weight)
    assert torch.equal(found[0].attend.qkv.weight, found[1].attend.qkv.weight)
    assert not torch.equal(found[0].attend.qkv.weight, student.attend.qkv.weight)


def test_dense_outputs() -> None:
    def net(seed):
        return seeded(
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)), seed
        )

    x = torch.randn(2, 3, 6, 6)
    y = torch.randint(0, 5, (2, 6, 6))
    y[0, 0] = -100
    for batch in ((x, y), x):
        found = distill(net(1), net(2), [batch], loss=KD(dim=1) + SP().at("0"), **ONE)
        assert not close(found, net(2))
    with pytest.raises(InputError, match=r"KD\(dim=1\)"):
        distill(net(1), net(2), [x], **ONE)


def test_images_to_images() -> None:
    def net(seed):
        return seeded(lambda: nn.Conv2d(3, 3, 3, padding=1), seed)

    noisy, clean = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    teacher, student = net(1), net(2)
    found = distill(
        teacher, student, [(noisy, clean)], loss=F.mse_loss, label_loss=F.l1_loss,
        label_weight=0.5, **ONE,
    )  # fmt: skip
    wanted = copy.deepcopy(student)
    out = wanted(noisy)
    value = 0.5 * F.mse_loss(out, teacher(noisy).detach()) + 0.5 * F.l1_loss(out, clean)
    value.backward()
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter.sub_(0.05 * parameter.grad)
    assert close(found, wanted)


def test_several_labels_and_targets_of_any_kind() -> None:
    many = [(x, F.one_hot(y, 3).float()) for x, y in images()]
    loss, label_loss = Binary(), nn.functional.binary_cross_entropy_with_logits
    distill(conv(8), conv(), many, loss=loss, label_loss=label_loss, **ONE)
    boxes = [(x, {"boxes": y}) for x, y in images()]
    named = distill(
        conv(8), conv(), boxes, label_loss=lambda out, y: F.cross_entropy(out, y["boxes"]), **ONE
    )
    assert close(named, distill(conv(8), conv(), images(), **ONE))
    distill(conv(8), conv(), boxes, label_weight=0, **ONE)  # nobody reads them
    with pytest.raises(DataError, match="labels are a dict"):
        distill(conv(8), conv(), boxes, **ONE)


def test_losses_that_need_labels() -> None:
    distill(conv(8), conv(), images(), loss=DKD(), label_weight=0, **ONE)
    bare = [x for x, _ in images()]
    assert distill(conv(8), conv(), bare, loss=DKD(), **ONE).trained  # by the teacher's best class


# --- teachers ------------------------------------------------------------------------------------


def test_an_ensemble_of_one_is_that_one() -> None:
    wanted = distill(conv(8), conv(), images(), **ONE)
    for average in ("logits", "probabilities"):
        teacher = Ensemble([conv(8), conv(8)], weights=[1, 3], average=average)
        assert close(distill(teacher, conv(), images(), **ONE), wanted)


def test_born_again() -> None:
    wanted = distill(conv(4, 1), conv(4, 1), images(), **ONE)
    assert fingerprint(distill(Earlier(), conv(4, 1), images(), **ONE)) == fingerprint(wanted)


def test_a_mean_teacher_follows() -> None:
    teacher, student, x = Earlier(decay=0.5), conv(4, 1), images(1)[0]
    data = [x] * 3
    found = distill(teacher, student, data, loss=MSE(), label_weight=0.5, **ONE)
    wanted, average = copy.deepcopy(student).train(), copy.deepcopy(student).eval()
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.05, momentum=0.9)
    for _ in data:
        out = wanted(x[0])
        with torch.no_grad():
            answers = average(x[0])
        optimizer.zero_grad()
        (0.5 * MSE()(out, answers) + 0.5 * F.cross_entropy(out, x[1])).backward()
        optimizer.step()
        with torch.no_grad():
            for own, its in zip(
                average.state_dict().values(), wanted.state_dict().values(), strict=True
            ):
                own.copy_(0.5 * own + 0.5 * its if own.is_floating_point() else its)
    assert close(found, wanted)


def test_peers_learn_from_each_other() -> None:
    student, peer, (x, y) = conv(4, 1), conv(8, 2), images(1)[0]
    kept = fingerprint(peer)
    found = distill(Peer(peer), student, [(x, y)] * 2, label_weight=0.5, loss=KD(2), **ONE)
    nets = [copy.deepcopy(student).train(), copy.deepcopy(peer).train()]
    optimizer = torch.optim.SGD([p for n in nets for p in n.parameters()], lr=0.05, momentum=0.9)
    for _ in range(2):
        a, b = (net(x) for net in nets)
        total = sum(
            0.5 * KD(2)(own, its.detach()) + 0.5 * CrossEntropy()(own, y)
            for own, its in ((a, b), (b, a))
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert close(found, nets[0])
    assert close(found.trained.peer, nets[1])
    assert fingerprint(peer) == kept
    options = {**ONE, "val": images(), "loss": KD(2)}
    shown = distill(Peer(peer), student, images(), **options).trained
    assert shown.teachers["peer"].val == evaluate(shown.peer, images())


def test_stored_answers_are_those_of_the_teacher(tmp_path) -> None:
    calls = []
    teacher = conv(8, 1)
    x, y = (torch.cat(parts) for parts in zip(*images(4, 6), strict=True))
    data = DataLoader(TensorDataset(x, y), 6, shuffle=True, generator=torch.Generator())
    write_soft_labels(teacher, data, tmp_path / "store", progress=False)
    teacher.register_forward_hook(lambda *a: calls.append(1))
    stored = distill(SoftLabels(tmp_path / "store"), conv(4, 2), data, **{**ONE, "epochs": 2})
    assert not calls
    live = distill(conv(8, 1), conv(4, 2), data, **{**ONE, "epochs": 2})
    for a, b in zip(stored.parameters(), live.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)
    valued = distill(SoftLabels(tmp_path / "store"), conv(4, 2), data, val=data, **ONE)
    assert valued.trained.student.train is not None
    others = DataLoader(TensorDataset(x.flip(0), y), 6)
    with pytest.raises(DataError, match="not those that it was written from"):
        distill(SoftLabels(tmp_path / "store"), conv(4, 2), others, **ONE)
    loss = KD() + SP().at("2")
    with pytest.raises(InputError, match="a store holds outputs alone"):
        distill(SoftLabels(tmp_path / "store"), conv(4, 2), data, loss=loss, **ONE)


def test_every_epoch_has_its_view(tmp_path) -> None:
    def crop(image):
        return image.roll(int(torch.randint(0, 8, ())), -1)

    x, y = images(1)[0]
    data = DataLoader(Replay(TensorDataset(x, y), crop, seed=1), 3, shuffle=True)
    write_soft_labels(conv(8, 1), data, tmp_path / "store", views=2, progress=False)
    store, views = SoftLabels(tmp_path / "store"), []
    answers = store.answers

    def watched(ids, view):
        views.append(view)
        return answers(ids, view)

    store.answers = watched
    distill(store, conv(4, 2), data, **{**ONE, "epochs": 3})
    assert views[1:] == [0, 0, 1, 1, 0, 0]  # the first looked at the first batch


class Kill:
    """Ends the training after a step, once."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, model) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["features", "average", "peer", "store"])
def test_a_killed_distillation_goes_on_as_if_nothing_had_been(kind, tmp_path) -> None:
    x, y = (torch.cat(parts) for parts in zip(*images(2, 6), strict=True))
    data = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator())
    store = tmp_path / "store"
    if kind == "store":
        write_soft_labels(conv(8, 1), data, store, progress=False)
    teacher, loss = {
        "features": lambda: (conv(8, 1), KD() + FitNet().at("2")),
        "average": lambda: (Earlier(0.9), MSE()),
        "peer": lambda: (Peer(conv(8, 1)), KD()),
        "store": lambda: (SoftLabels(store), KD()),
    }[kind]()
    options = {**ONE, "epochs": 3, "loss": loss, "every": 2}
    whole = distill(teacher, conv(4, 2), data, after_step=Kill(99), checkpoint=tmp_path / "a",
                    **options)  # fmt: skip
    options["checkpoint"] = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, conv(4, 2), data, after_step=Kill(5), **options)
    again = distill(teacher, conv(4, 2), data, after_step=Kill(99), resume=True, **options)
    assert again.trained.resumed == 4
    assert fingerprint(again) == fingerprint(whole)
    if kind == "peer":
        assert fingerprint(again.trained.peer) == fingerprint(whole.trained.peer)


# --- students ------------------------------------------------------------------------------------


def test_a_quantized_network_trains() -> None:
    from rarefy.quantization.quantize import quantize
    from rarefy.schemes import Int8

    teacher, data = conv(8, 1), images()
    student = quantize(conv(8, 2).eval(), [x for x, _ in data], Int8())
    x = torch.cat([x for x, _ in data])
    found = distill(teacher, student, data, label_weight=0, **{**ONE, "epochs": 20})
    before, after = (
        KD()(net.eval()(x), teacher.eval()(x)).item() for net in (copy.deepcopy(student), found)
    )
    assert after < 0.5 * before
    assert type(found) is type(student)
    assert found.quantization == student.quantization


def test_zeros_stay() -> None:
    from rarefy.pruning.sparsity.masks import hold

    student = conv(8, 2)
    with torch.no_grad():
        student[3].weight.mul_(torch.rand_like(student[3].weight) < 0.5)
    gone = student[3].weight == 0
    loss = KD() + FitNet().at("2")
    found = distill(conv(8, 1), student, images(), loss=loss, after_step=hold(student), **ONE)
    assert (found[3].weight[gone] == 0).all()
    assert not close(found, student)


# --- what is refused before the first step -------------------------------------------------------


class Overwriting(nn.Module):
    """Computes on its input in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.mul_(0.5))


class Halving(Overwriting):
    """The same without that."""

    def forward(self, x):
        return self.inner(x * 0.5)


def test_networks_that_overwrite_their_inputs_spoil_nothing() -> None:
    data = [x for x, _ in images()]
    before = [x.clone() for x in data]
    found = [
        distill(kind(conv(seed=1)), kind(conv()), data, epochs=2, progress=False)
        for kind in (Overwriting, Halving)
    ]
    losses = [[epoch.loss for epoch in net.trained.epochs] for net in found]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(before, data, strict=True))


def test_networks_that_do_not_take_the_data_are_named() -> None:
    with pytest.raises(InputError, match="a str was given"):
        distill(conv(), "student", images(), epochs=1, progress=False)
    data = images()
    other = nn.Linear(7, 3)
    with pytest.raises(InputError, match=r"distill\(student\): it does not run on the first batch"):
        distill(conv(), other, data, epochs=1, progress=False)
    with pytest.raises(InputError, match=r"distill\(teacher\): it does not run on the first batch"):
        distill(other, conv(), data, epochs=1, progress=False)


def test_a_teacher_that_answers_with_nan() -> None:
    class Bad(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] / torch.zeros(1) * 0

    with pytest.raises(InputError, match=r"distill\(teacher\): 18 of the 18 numbers.*first batch"):
        distill(Bad(), conv(), images(), **ONE)


def test_other_classes_and_vocabularies() -> None:
    with pytest.raises(InputError, match="3 and 4 classes"):
        distill(conv(classes=4), conv(), images(), **ONE)
    ids = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(InputError, match="6 and 7 classes"):
        distill(Text(classes=7), Text(), [ids], **ONE)
    with pytest.raises(InputError, match="3 and 4 classes"):
        distill(Peer(conv(classes=4)), conv(), images(), **ONE)


def test_data_that_end_early() -> None:
    with pytest.raises(DataError, match=r"list_iterator can be read only once"):
        distill(conv(8), conv(), iter(images()), **{**ONE, "epochs": 2})
    once = distill(conv(8), conv(), iter(images()), **ONE)
    assert close(once, distill(conv(8), conv(), images(), **ONE))
    for empty in ([], [torch.zeros(0, 3, 8, 8)], iter([])):
        with pytest.raises(DataError, match="no example"):
            distill(conv(8), conv(), empty, **ONE)


def test_what_is_no_loss() -> None:
    for loss in ("KD", KD):
        with pytest.raises(InputError, match="no loss that can be called"):
            distill(conv(8), conv(), images(), loss=loss, **ONE)
    with pytest.raises(InputError, match=r"does not say which.*FitNet\(...\).at"):
        distill(conv(8), conv(), images(), loss=FitNet(), **ONE)
    with pytest.raises(InputError, match="label_weight='half'"):
        distill(conv(8), conv(), images(), label_weight="half", **ONE)


def test_an_attribute_of_the_users_own_is_kept_beside_a_peer() -> None:
    student = conv()
    student.trained = "by me"
    assert distill(Peer(conv(8)), student, images(), **ONE).trained == "by me"


def test_a_teacher_that_changes_is_refused_before_the_first_step() -> None:
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv(8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    steps = []
    with pytest.raises(TrainingError, match="changed while it only answered"):
        distill(Counting(), conv(), images(), after_step=steps.append, **ONE)
    assert not steps


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_answers_that_nobody_can_learn_from(bad) -> None:
    class Bad(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1, 0, 0] > 90, bad, x.flatten(1)[:, :3])

    data = images()
    data[2][0][0] = 99.0
    with pytest.raises(TrainingError, match=r"step 3: the teacher's answers hold NaN or \+inf"):
        distill(Bad(), conv(), data, **ONE)
    with pytest.raises(InputError, match=r"3 of the 18 numbers.*first batch"):
        distill(Bad(), conv(), data[::-1], **ONE)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_accumulated_texts_are_those_of_one_large_batch(share) -> None:
    """The teacher's words count by the padding of the inputs, not by labels that prompts lack."""
    made = torch.Generator().manual_seed(0)
    lengths, spoken = torch.tensor([[5, 4], [2, 1]]), torch.tensor([[3, 4], [0, 0]])
    batches = []
    for real, prompt in zip(lengths, spoken, strict=True):
        place = torch.arange(5).expand(2, 5)
        silent = (place < prompt[:, None]) | (place >= real[:, None])
        labels = torch.randint(0, 6, (2, 5), generator=made)
        batches.append({
            "input_ids": torch.randint(0, 20, (2, 5), generator=made),
            "attention_mask": (place < real[:, None]).long(),
            "labels": labels.masked_fill(silent, -100),
        })  # fmt: skip
    whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    student, teacher = seeded(Text, 1), seeded(lambda: Text(16), 2)
    options = {**ONE, "loss": KD(2) + FitNet().at("embed"), "label_weight": share}
    found = distill(teacher, student, batches, accumulate=2, **options)
    wanted = distill(teacher, student, [whole], **options)
    assert close(found, wanted)
