"""Students made of their teachers: what is left, what it computes, and what is refused."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.errors import BudgetError, InputError
from rarefy.graph.count import count
from rarefy.graph.model import GraphModel
from rarefy.students import LEAST

torch.set_num_threads(1)
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A perceptron with a normalization after its sum; a layer of another width has a shortcut."""

    def __init__(self, width: int = 6, after: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, after)
        self.norm = nn.LayerNorm(after)
        self.skip = nn.Identity() if width == after else nn.Linear(width, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.skip(x) + self.down(torch.relu(self.up(x))))


class Net(nn.Module):
    """A stack of such layers."""

    def __init__(self, count: int = 5, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(5, 6)
            self.layers = nn.ModuleList(Layer() for _ in range(count))
            self.head = nn.Linear(6, 3)
            for parameter in self.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def output(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def by_hand(net: Net, kept: Sequence[int]) -> Tensor:
    """The teacher's forward with some layers only, in plain code."""
    x = net.embed(X)
    for number in kept:
        x = net.layers[number](x)
    return net.head(x).detach()


@pytest.fixture(scope="module")
def teacher() -> Net:
    return Net()


@pytest.fixture(scope="module")
def both(teacher) -> Net:
    """Half as deep and half as wide."""
    return rf.student(teacher, X, width=0.5, depth=0.5)


def test_a_shallow_student_is_the_teacher_without_those_layers(teacher) -> None:
    before = copy.deepcopy(teacher.state_dict())
    small = rf.student(teacher, X, depth=0.5)
    assert [(s.path, s.kept, s.gone) for s in small.derived.layers] == [
        ("layers", (0, 2, 4), (1, 3))
    ]
    assert type(small) is Net
    torch.testing.assert_close(output(small), by_hand(teacher, (0, 2, 4)))
    assert small.derived.params[1] == sum(p.numel() for p in small.parameters())
    assert small.derived.macs == (count(teacher, X).macs, count(small, X).macs)
    assert {path.split(".")[1] for path in small.derived.gone} == {"1", "3"}
    assert len(small.derived.gone) == 2 * 6  # normalizations and all
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_layers_are_chosen_by_index(teacher) -> None:
    small = rf.student(teacher, X, layers={"layers": [3, 0]})
    torch.testing.assert_close(output(small), by_hand(teacher, (0, 3)))


def test_a_narrow_student_is_the_teacher_with_the_least_units_masked() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = nn.Sequential(
            nn.Linear(5, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(),
            nn.Linear(8, 3),
        ).eval()  # fmt: skip
    small = rf.student(teacher, X, width=0.5, round_to=2)
    assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)] == [6, 4, 3]
    masked = copy.deepcopy(teacher)
    for (path, dim), kept in small.pruned.kept.items():
        if path in ("3.weight", "5.weight") and dim == 1:  # what reads a unit that goes
            gone = sorted(set(range(masked.get_parameter(path).shape[1])) - set(kept))
            masked.get_parameter(path).data[:, gone] = 0
    torch.testing.assert_close(output(small), output(masked))


def test_the_best_units_stay(teacher) -> None:
    net = copy.deepcopy(teacher)
    weak = [1, 2, 5, 7]
    with torch.no_grad():
        for parameter in (net.layers[0].up.weight, net.layers[0].up.bias):
            parameter[weak] *= 1e-3
        net.layers[0].down.weight[:, weak] *= 1e-3
    small = rf.student(net, X, width=0.5, exclude=["embed"])
    assert list(small.pruned.kept["layers.0.up.weight", 0]) == [0, 3, 4, 6]


def test_both_in_one_call_copy_the_teachers_values(teacher, both) -> None:
    record = both.derived
    state = dict(teacher.named_parameters())
    for c in record.copied:
        part = state[c.path].detach()
        assert c.before == tuple(part.shape)
        for dim in range(part.ndim):
            kept = both.pruned.kept.get((c.path, dim))
            if kept is not None:
                part = part.index_select(dim, torch.from_numpy(kept))
        assert torch.equal(part, both.get_parameter(c.path).detach()), c.path
        assert c.after == tuple(part.shape)
    assert [s.kept for s in record.layers] == [(0, 2, 4)]
    assert both.layers[0].up.weight.shape == (4, 3)
    assert record.error < 1e-6
    assert (both.pruned.kind, record.kind) == ("module", "module")
    text = str(record)
    assert "layers: layers 0, 2, 4 stay, 1, 3 go" in text
    assert "8x6 -> 4x3" in text
    assert "layers.1.norm.weight" in text.split("left out")[1]


@pytest.mark.parametrize("name", ["params", "macs"])
def test_budgets_are_shares_of_the_teacher(teacher, name) -> None:
    small = rf.student(teacher, X, depth=0.6, **{name: 0.45})
    before, after = getattr(small.derived, name)
    assert 0.3 * before < after <= 0.45 * before


def test_layers_alone_may_reach_a_budget(teacher) -> None:
    small = rf.student(teacher, X, depth=0.2, params=0.99)
    assert all(c.before == c.after for c in small.derived.copied)


def test_a_student_trains_and_its_file_is_loaded(both, tmp_path) -> None:
    assert not both.training
    again = rf.load(rf.save(both, tmp_path / "a.safetensors"), Net(seed=1))
    assert torch.equal(output(again), output(both))
    trained = copy.deepcopy(both).train()
    assert trained.derived == both.derived
    before = [p.detach().clone() for p in trained.parameters()]
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    trained(X).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True)]
    assert all(changed)


def test_what_may_be_trained_is_as_in_the_teacher_unless_all_is_frozen() -> None:
    frozen = Net(2).requires_grad_(False)
    small = rf.student(frozen, X, depth=0.5)
    assert small.derived.thawed
    assert all(p.requires_grad for p in small.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.head.requires_grad_(True)
    small = rf.student(frozen, X, width=0.5)
    assert not small.derived.thawed
    free = {name for name, p in small.named_parameters() if p.requires_grad}
    assert free == {"head.weight", "head.bias"}


def test_what_is_excluded_stays(teacher) -> None:
    named = ["layers.3.norm", "layers.1.up"]
    small = rf.student(teacher, X, depth=0.2, width=0.5, exclude=named)
    assert small.derived.layers[0].kept == (1, 3)
    assert small.layers[1].up.weight.shape[0] == 8
    assert small.layers[3].up.weight.shape[0] == 4
    chosen = rf.student(teacher, X, layers={"layers": (0,)}, exclude=named)
    assert chosen.derived.layers[0].kept == (0, 1, 3)


def test_nothing_smaller_is_a_copy(teacher) -> None:
    small = rf.student(teacher, X, width=1.0, depth=1)
    assert small is not teacher
    assert torch.equal(output(small), output(teacher))
    assert small.derived.params[0] == small.derived.params[1]
    assert small.derived.gone == ()


def test_a_graph_where_the_class_cannot_be_kept() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 8, 2), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x[:, None]).relu().view(-1, 32))

    small = rf.student(Plain().eval(), X, width=0.5)
    assert isinstance(small, GraphModel)
    assert "not the teacher's class" in str(small.derived)
    assert [c.after[:2] for c in small.derived.copied if len(c.after) > 1] == [(4, 1), (2, 16)]


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
        ({"layers": {"layer": (0,)}}, "Did you mean 'layers'"),
        ({"layers": {"layers": (0, 9)}}, "index 9 is out of range.*below 5"),
        ({"layers": {"layers": (-1,)}}, "index -1 is out of range"),
        ({"layers": {"layers": (0, 0)}}, "indices repeat"),
        ({"layers": {"layers": ()}}, "indices repeat, or are none"),
        ({"layers": {"layers": "01"}}, "whole numbers"),
        ({"width": 0.5, "exclude": "embed"}, "a str was given"),
        ({"width": 0.5, "exclude": ["embd"]}, "Did you mean embed"),
        ({"width": 0.5, "round_to": 0}, "round_to must be at least 1"),
        ({"width": 0.5, "criterion": "nonsense"}, "nonsense"),
    ],
)
def test_bad_arguments(teacher, options, message) -> None:
    with pytest.raises(InputError, match=message):
        rf.student(teacher, X, **options)


def test_a_budget_out_of_reach_says_what_is_in_reach(teacher) -> None:
    with pytest.raises(BudgetError, match=r"student\(params=0\.001\): .*layers that go .* share"):
        rf.student(teacher, X, depth=0.2, params=0.001)


def test_networks_that_cannot_be_made_smaller() -> None:
    with pytest.raises(InputError, match="a list was given"):
        rf.student([], X, width=0.5)
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(InputError, match="no stack of layers with residual blocks"):
        rf.student(plain, X, depth=0.5)
    with pytest.raises(InputError, match="no stack of layers that can go"):
        rf.student(plain, X, layers={"0": (0,)})
    with pytest.raises(InputError, match="no unit of this network can be removed"):
        rf.student(nn.Linear(5, 2), X, width=0.5)
    with pytest.raises(InputError, match="holds no values"):
        rf.student(nn.Linear(5, 2, device="meta"), X, width=0.5)
    plain[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"parameter 0\.weight: it holds NaN"):
        rf.student(plain, X, width=0.5)


def test_a_layer_that_changes_the_shape_stays() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(Layer(5, 6), Layer(), Layer(), Layer()).eval()
    small = rf.student(net, X, depth=0.5)
    (stack,) = small.derived.layers
    assert (stack.path, stack.kept, stack.gone) == ("", (0, 3), (1, 2))
    torch.testing.assert_close(output(small), output(nn.Sequential(net[0], net[3])))
    with pytest.raises(InputError, match="layer 0 cannot go"):
        rf.student(net, X, layers={"": (1, 2)})


def test_shared_parameters_stay_shared() -> None:
    tied = Net(3)
    tied.layers[2].up.weight = tied.layers[0].up.weight
    small = rf.student(tied, X, width=0.5, depth=0.5)
    assert small.layers[2].up.weight is small.layers[0].up.weight
    assert small.derived.layers[0].kept == (0, 2)
    gone = rf.student(tied, X, layers={"layers": (1, 2)})
    torch.testing.assert_close(output(gone), by_hand(tied, (1, 2)))
    assert "layers.2.up.weight" not in gone.derived.gone


def test_repair_is_a_call_of_its_own(teacher) -> None:
    data = [torch.randn(32, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    small = rf.student(teacher, X, width=0.5, criterion="wanda", data=data)
    assert not hasattr(small, "repaired")
    healed = rf.repair(teacher, small, data)
    assert healed.derived == small.derived
    expected = output(teacher, data[0])
    after, before = (float((output(n, data[0]) - expected).norm()) for n in (healed, small))
    assert after < before


def test_no_layer_becomes_a_bottleneck():
    """Where one layer has nearly all parameters, the share alone would leave little of it."""
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    share = 0.15
    for given in ({"params": share}, {"macs": share}):
        small = rf.student(teacher, x, criterion=small_first, **given)
        least = LEAST * share**0.5
        for layer, width in ((0, 16), (2, 64), (4, 64)):
            assert small[layer].out_channels >= math.floor(least * width)


def small_first(group, evidence):
    """Scores that take the widest groups first."""
    return torch.arange(len(group)) + (0.0 if len(group) > 16 else 1e6)
