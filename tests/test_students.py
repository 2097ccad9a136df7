"""Students made of their teachers: what is left, what it computes, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.errors import BudgetError, InputError
from rarefy.graph.count import count
from rarefy.graph.program import GraphModel
from residual_networks import Residual, inputs

torch.set_num_threads(1)
X = inputs()
KINDS = ("PreNorm",) * 5 + ("Basic",) * 2


@pytest.fixture(scope="module")
def teacher() -> Residual:
    return Residual(KINDS)


class Encoder(nn.Module):
    """Post-norm layers in a list, and two outputs of each of which one is read."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(20, 8)
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(count)
            )
            self.head = nn.Linear(8, 3)
            for parameter in self.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


IDS = torch.arange(14).reshape(2, 7)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def by_hand(model: Residual, kept: tuple[int, ...], x: Tensor) -> Tensor:
    """The teacher's forward with some blocks only, in plain code."""
    with torch.no_grad():
        x = torch.relu(model.stem(x))
        for number in kept:
            x = model.blocks[number](x)
        return model.head(x.mean((2, 3)))


def test_a_shallow_student_is_the_teacher_without_those_blocks(teacher) -> None:
    before = copy.deepcopy(teacher.state_dict())
    small = rf.student(teacher, X, depth=0.5)
    assert [(s.path, s.kept, s.gone) for s in small.derived.layers] == [
        ("blocks", (0, 2, 4), (1, 3)),
        ("blocks", (5,), (6,)),
    ]
    assert type(small) is Residual
    torch.testing.assert_close(output(small, X), by_hand(teacher, (0, 2, 4, 5), X))
    assert small.derived.params[1] == sum(p.numel() for p in small.parameters())
    assert small.derived.macs == (count(teacher, X).macs, count(small, X).macs)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_layers_of_a_transformer_go_with_their_normalizations() -> None:
    teacher = Encoder()
    small = rf.student(teacher, IDS, layers={"layers": (0, 3)})
    expected = teacher.embed(IDS)
    for number in (0, 3):
        expected = teacher.layers[number](expected)
    torch.testing.assert_close(output(small, IDS), teacher.head(expected.mean(1)).detach())
    assert {p.split(".")[1] for p in small.derived.gone} == {"1", "2"}
    assert len(small.derived.gone) == 24


def test_a_narrow_student_is_the_teacher_with_units_masked() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = nn.Sequential(
            nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(),
            nn.Linear(8, 3),
        ).eval()  # fmt: skip
    x = torch.randn(5, 6)
    small = rf.student(teacher, x, width=0.5, round_to=2)
    assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)] == [6, 4, 3]
    masked = copy.deepcopy(teacher)
    for (path, dim), kept in small.pruned.kept.items():
        if path.split(".")[0] in ("3", "5") and dim == 1:  # what reads a unit that goes
            gone = sorted(set(range(masked.get_parameter(path).shape[1])) - set(kept))
            masked.get_parameter(path).data[:, gone] = 0
    torch.testing.assert_close(output(small, x), output(masked, x))
    # the best units stay: by the norm of what makes a unit
    rows = teacher[3].weight.data.square().sum(1)
    assert len(small.pruned.kept["3.weight", 0]) == 4
    assert rows[torch.from_numpy(small.pruned.kept["3.weight", 0])].sum() > rows.sum() / 2


def test_both_in_one_call_copy_the_teachers_values(teacher) -> None:
    small = rf.student(teacher, X, width=0.5, depth=0.5)
    record = small.derived
    state = dict(teacher.named_parameters())
    for c in record.copied:
        part = state[c.path].detach()
        assert c.before == tuple(part.shape)
        for dim in range(part.ndim):
            kept = small.pruned.kept.get((c.path, dim))
            if kept is not None:
                part = part.index_select(dim, torch.from_numpy(kept))
        assert torch.equal(part, small.get_parameter(c.path).detach()), c.path
        assert c.after == tuple(part.shape)
    assert [s.kept for s in record.layers] == [(0, 2, 4), (5,)]
    assert record.error < 1e-6
    assert (small.pruned.kind, record.kind) == ("module", "module")
    narrow = rf.student(teacher, X, width=0.5)
    assert all(c.after <= c.before for c in narrow.derived.copied)
    assert small.derived.params[1] < narrow.derived.params[1]


@pytest.mark.parametrize("name", ["params", "macs"])
def test_budgets_are_shares_of_the_teacher(teacher, name) -> None:
    small = rf.student(teacher, X, depth=0.6, **{name: 0.4})
    before, after = getattr(small.derived, name)
    assert 0.3 * before < after <= 0.4 * before
    loose = rf.student(teacher, X, depth=0.2, **{name: 0.99})  # layers alone reach it
    assert all(c.before == c.after for c in loose.derived.copied)


def test_a_student_trains_and_its_file_is_loaded(teacher, tmp_path) -> None:
    small = rf.student(teacher, X, width=0.5, depth=0.5)
    assert not small.training
    again = rf.load(rf.save(small, tmp_path / "a.safetensors"), Residual(KINDS))
    assert torch.equal(output(again, X), output(small, X))
    trained = copy.deepcopy(small).train()
    assert trained.derived == small.derived
    before = [p.detach().clone() for p in trained.parameters()]
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    trained(X).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True)]
    assert all(changed)


def test_what_may_be_trained_is_as_in_the_teacher_unless_all_is_frozen() -> None:
    teacher = Encoder().requires_grad_(False)
    small = rf.student(teacher, IDS, depth=0.5)
    assert small.derived.thawed
    assert all(p.requires_grad for p in small.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.head.requires_grad_(True)
    small = rf.student(teacher, IDS, width=0.5)
    assert not small.derived.thawed
    assert {n for n, p in small.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
    }


def test_what_is_excluded_stays(teacher) -> None:
    small = rf.student(teacher, X, depth=0.2, width=0.5, exclude=["blocks.3.norm", "blocks.1.up"])
    (first, second) = small.derived.layers
    assert first.kept == (1, 3)
    assert second.kept == (5,)
    assert dict(small.named_parameters())["blocks.1.up.weight"].shape[0] == 12
    assert dict(small.named_parameters())["blocks.3.up.weight"].shape[0] == 6


def test_nothing_smaller_is_a_copy(teacher) -> None:
    small = rf.student(teacher, X, width=1.0, depth=1)
    assert small is not teacher
    assert torch.equal(output(small, X), output(teacher, X))
    assert small.derived.params[0] == small.derived.params[1]
    assert small.derived.gone == ()


def test_a_graph_where_the_class_cannot_be_kept() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(128, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu().view(-1, 128))

    small = rf.student(Plain().eval(), X, width=0.5)
    assert isinstance(small, GraphModel)
    assert "not the teacher's class" in str(small.derived)
    assert [c.after[:2] for c in small.derived.copied if len(c.after) > 1] == [(4, 3), (2, 64)]


def test_the_record_is_a_table(teacher) -> None:
    text = str(rf.student(teacher, X, width=0.5, layers={"blocks": (0, 4, 5, 6)}).derived)
    assert "blocks: layers 0, 4 stay of 5" in text
    assert "stem.weight" in text
    assert "8x3x3x3 -> 4x3x3x3" in text
    assert "blocks.1.norm.weight" in text.split("left out")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not told what to make smaller"),
        ({"width": 0}, r"student\(width=0\).*above 0 and at most 1"),
        ({"width": 1.5}, "above 0 and at most 1"),
        ({"width": float("nan")}, "above 0 and at most 1"),
        ({"depth": True}, "above 0 and at most 1"),
        ({"depth": "half"}, "above 0 and at most 1"),
        ({"width": 0.5, "macs": 0.5}, r"student\(width=..., macs=...\).*how narrow"),
        ({"layers": [0, 1]}, "a list was given"),
        ({"layers": {"block": (0,)}}, "Did you mean 'blocks'"),
        ({"layers": {"blocks": (0, 9)}}, "index 9 is out of range.*below 7"),
        ({"layers": {"blocks": (-1,)}}, "index -1 is out of range"),
        ({"layers": {"blocks": (0, 0)}}, "indices repeat"),
        ({"layers": {"blocks": "01"}}, "whole numbers"),
        ({"width": 0.5, "exclude": "stem"}, "a str was given"),
        ({"width": 0.5, "exclude": ["stm"]}, "Did you mean stem"),
        ({"width": 0.5, "round_to": 0}, "round_to must be at least 1"),
        ({"params": 0.001}, "smallest share"),
        ({"depth": 0.2, "params": 0.001}, "remain"),
        ({"width": 0.5, "criterion": "nonsense"}, "nonsense"),
    ],
)
def test_bad_arguments(teacher, options, message) -> None:
    with pytest.raises(InputError, match=message):
        rf.student(teacher, X, **options)


def test_networks_that_cannot_be_made_smaller() -> None:
    with pytest.raises(InputError, match="a list was given"):
        rf.student([], X, width=0.5)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    with pytest.raises(InputError, match="no stack of layers with residual blocks"):
        rf.student(plain, x, depth=0.5)
    with pytest.raises(InputError, match="no stack of layers that can go"):
        rf.student(plain, x, layers={"0": (0,)})
    with pytest.raises(InputError, match="no unit of this network can be removed"):
        rf.student(nn.Linear(4, 2), x, width=0.5)
    with pytest.raises(InputError, match="holds no values"):
        rf.student(nn.Linear(4, 2, device="meta"), x, width=0.5)
    plain[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"parameter 0\.weight: it holds NaN"):
        rf.student(plain, x, width=0.5)


def test_a_layer_that_changes_the_shape_stays() -> None:
    class Stage(nn.Module):
        def __init__(self, width: int, after: int) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(width, 6), nn.Linear(6, after)
            self.skip = nn.Identity() if width == after else nn.Linear(width, after)

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) + self.fc2(torch.relu(self.fc1(x)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = nn.Sequential(*(Stage(a, b) for a, b in ((4, 8), (8, 8), (8, 8), (8, 8)))).eval()
    x = torch.randn(3, 4)
    small = rf.student(teacher, x, depth=0.5)
    (stack,) = small.derived.layers
    assert (stack.path, stack.kept, stack.gone) == ("", (0, 3), (1, 2))
    torch.testing.assert_close(output(small, x), output(nn.Sequential(teacher[0], teacher[3]), x))
    with pytest.raises(InputError, match="layer 0 cannot go"):
        rf.student(teacher, x, layers={"": (1, 2)})


def test_shared_layers_and_shared_parameters_stay_shared() -> None:
    teacher = Encoder()
    teacher.head = nn.Linear(8, 20, bias=False)
    teacher.head.weight = teacher.embed.weight
    small = rf.student(teacher, IDS, width=0.5, depth=0.5)
    assert small.head.weight is small.embed.weight
    assert output(small, IDS).shape == (2, 20)
    twice = Encoder()
    twice.layers[2] = twice.layers[1]
    small = rf.student(twice, IDS, depth=0.5)
    kept = small.derived.layers[0].kept
    expected = twice.embed(IDS)
    for number in kept:
        expected = twice.layers[number](expected)
    torch.testing.assert_close(output(small, IDS), twice.head(expected.mean(1)).detach())


def test_data_score_units_and_repair_is_a_call_of_its_own() -> None:
    teacher = Residual(("Basic", "Basic", "PreNorm"))
    data = [torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    small = rf.student(teacher, X, width=0.5, criterion="wanda", data=data)
    assert not hasattr(small, "repaired")
    healed = rf.repair(teacher, small, data)
    expected = output(teacher, data[0])
    distance = [float((output(net, data[0]) - expected).norm()) for net in (healed, small)]
    assert distance[0] < distance[1]


def test_budget_errors_are_input_errors(teacher) -> None:
    with pytest.raises(BudgetError, match=r"student\(params=0\.001\)"):
        rf.student(teacher, X, depth=0.2, params=0.001)
