"""What can go, and what cannot and why."""

import pytest
import torch
from torch import nn

from rarefy.errors import InputError
from rarefy.graph.trace import trace

torch.set_num_threads(1)
X = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.back = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        return self.out((x + self.back(self.inner(x).relu())).mean((2, 3)))


def test_a_residual_network_has_a_stream_and_a_block() -> None:
    network = trace(Block(), X)
    found = {g.name: {(m.path, m.dim) for m in g.members} for g in network.groups}
    assert found == {
        "stem": {
            ("stem.weight", 0),
            ("stem.bias", 0),
            ("norm.weight", 0),
            ("norm.bias", 0),
            ("norm.running_mean", 0),
            ("norm.running_var", 0),
            ("inner.weight", 1),
            ("back.weight", 0),
            ("back.bias", 0),
            ("out.weight", 1),
        },
        "inner": {("inner.weight", 0), ("inner.bias", 0), ("back.weight", 1)},
    }
    assert [len(g) for g in network.groups] == [8, 6]
    assert not network.unknown


def test_what_is_frozen_says_why_and_kernels_are_not_worth_telling() -> None:
    network = trace(Block(), X)
    told = {(f.path, f.dim, f.reason) for f in network.frozen}
    assert ("out.weight", 0, "is an output of the network") in told
    assert ("stem.weight", 1, "meets a dimension whose size cannot change") in told
    assert not any(f.dim > 1 for f in network.frozen)


def test_the_table_names_groups_and_frozen_parts() -> None:
    text = str(trace(Block(), X))
    for words in (
        "2 groups, 14 removable units",
        "stem",
        "frozen:",
        "out.weight dim 0",
        "at test_",
    ):
        assert words in text


def test_flattened_channels_take_all_their_positions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 2))
    (group,) = trace(net, X).groups
    assert {m.path: m.indices.shape for m in group.members}["2.weight"] == (5, 36)


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (nn.LayerNorm(8), "layer_norm"),
        (nn.RMSNorm(8), "rms_norm"),
        (nn.LSTM(8, 8, batch_first=True), "lstm"),
        (nn.GRU(8, 8, batch_first=True), "gru"),
        (nn.Softmax(-1), "softmax"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "linear"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), ""),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_cannot_be_carried_is_frozen_and_named(layer, operator) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(5, 8), layer, nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(self.first(x))
            return self.last(y[0] if isinstance(y, tuple) else y)

    network = trace(Sequence(), torch.randn(2, 4, 5))
    assert not any(m.path == "first.weight" for g in network.groups for m in g.members)
    held = [f for f in network.frozen if f.path == "first.weight" and f.dim == 0]
    assert len(held) == 1
    assert operator in held[0].operator


def test_operators_without_a_rule_are_counted() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).sort(1)[0])

    network = trace(Sorted(), torch.randn(2, 4))
    assert network.unknown == {"aten.sort.default": 1}
    assert "operators without a rule: aten.sort.default (1x)" in str(network)


def test_channels_that_are_read_by_position_stay_and_others_go() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y) + y[:, 2:3]

    network = trace(Picks(), torch.randn(2, 4))
    assert sum(map(len, network.groups)) == 5


@pytest.mark.parametrize("wrong", [nn.ReLU(), lambda x: x, "model"])
def test_what_is_no_network_with_parameters_is_refused(wrong) -> None:
    with pytest.raises(InputError, match="trace"):
        trace(wrong, X)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"float32 \(2, 2, 8, 8\)"):
        trace(Block(), X[:, :2])
