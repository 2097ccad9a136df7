"""Recurrent layers: hidden units of all layers and directions go together, gates and all."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.graph.ops import find
from rarefy.graph.rules.recurrent import GATES, ROWS
from rarefy.graph.trace import Network, trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import prove
from rarefy.pruning.structure.surgery import rewrite

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")
X = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
HALF = rf.Budget(sparsity=0.5, scope="local")


def seeded(build, *args, **kwargs) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **kwargs).eval()


class Layers(nn.Module):
    """A linear layer, recurrent layers, and an output layer."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int = 12, **options) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 8)
        self.rnn = kind(8, hidden, **options)
        width = getattr(self.rnn, "proj_size", 0) or hidden
        self.out = nn.Linear(width * (1 + self.rnn.bidirectional), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(self.inner(x).relu())[0])


class Cells(nn.Module):
    """A cell called once a step."""

    def __init__(self, kind: type[nn.RNNCellBase], steps: int, **options) -> None:
        super().__init__()
        self.inner, self.cell, self.out = nn.Linear(5, 8), kind(8, 12, **options), nn.Linear(12, 3)
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, state = self.inner(x), None
        for t in range(self.steps):
            state = self.cell(x[:, t], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class FirstState(nn.Module):
    """A first state that is learned, or that is not zero where units are masked."""

    def __init__(self, kind: type[nn.RNNBase], learned: bool, mean: bool = False) -> None:
        super().__init__()
        self.rnn, self.out = kind(5, 12, batch_first=True), nn.Linear(12, 3)
        self.first = nn.Parameter(torch.randn(2, 1, 1, 12)) if learned else None
        self.mean = mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            first = x.new_ones(2, 1, x.shape[0], 12).unbind(0)
        else:
            first = self.first.expand(-1, -1, x.shape[0], -1).unbind(0)
        y = self.rnn(x, first if isinstance(self.rnn, nn.LSTM) else first[0])[0]
        return y.sum(2) if self.mean else self.out(y)


class LastState(nn.Module):
    def __init__(self, given: bool = False) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 12, 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (h, c) = self.rnn(x)
        return self.out(torch.cat([h[-2], h[-1], c[0]], 1))


class Classifier(nn.Module):
    """A bidirectional LSTM of two layers over frames of features, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 16, 2, bidirectional=True, batch_first=True, dropout=0.2)
        self.hidden, self.out = nn.Linear(32, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.rnn(x)[0].mean(1)).relu())


class Speech(nn.Module):
    """Strided convolutions over a spectrogram, a GRU over what they leave of time."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.rnn = nn.GRU(6 * 8, 12, bidirectional=True, batch_first=True)
        self.out = nn.Linear(24, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.front(x.unsqueeze(1))
        y = y.permute(0, 2, 1, 3).flatten(2)
        return self.out(self.rnn(y)[0]).log_softmax(-1)


class Residual(nn.Module):
    """Recurrent layers that are normalized and added to their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.rnns = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        for rnn, norm in zip(self.rnns, self.norms, strict=True):
            y = y + rnn(norm(y))[0]
        return self.out(y)


class Translator(nn.Module):
    """One LSTM hands its last state to another."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.out = nn.LSTM(5, 12, batch_first=True), nn.Linear(12, 4)
        self.writer = nn.LSTM(5, 12, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.writer(x, self.reader(x)[1])[0])


def check(net: nn.Module, inputs=X) -> tuple[Network, nn.Module]:
    """Prune by half, as a module and as a graph, and hold the module against masking by hand."""
    network = trace(net, inputs)
    assert not network.unknown
    small = rf.prune(net, inputs, HALF, criterion="random")
    removed = np.zeros(network.coupling.units, bool)
    for group in network.groups:
        removed[group.units[::2]] = len(group) > 1
    plan = Plan.of(network, removed)
    assert prove(net, inputs, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-4
    reference = copy.deepcopy(net)
    state = dict(reference.named_parameters()) | dict(reference.named_buffers())
    for (path, dim), kept in small.pruned.kept.items():
        gone = np.setdiff1d(np.arange(state[path].shape[dim]), kept)
        state[path].data.index_fill_(dim, torch.from_numpy(gone), 0)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    assert torch.allclose(small(*given), reference(*given), atol=1e-5)
    assert not torch.allclose(small(*given), net(*given), atol=1e-3)
    return network, small


def sizes(network: Network) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for group in network.groups:
        found.setdefault(group.name, []).append(len(group))
    return {name: sorted(numbers) for name, numbers in found.items()}


OPTIONS = {
    "one": {"batch_first": True},
    "time first, without bias": {"bias": False},
    "two layers": {"num_layers": 2, "dropout": 0.1},
    "two layers in both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=["LSTM", "GRU", "RNN"])
def test_hidden_units_go_in_all_layers_directions_and_gates(kind, options) -> None:
    network, small = check(seeded(Layers, kind, **options))
    assert sizes(network) == {"inner": [8], "rnn": [12]}
    (group,) = (g for g in network.groups if g.name == "rnn")
    assert {m.path for m in group.members} == {
        *(f"rnn.{name}" for name, _ in small.rnn.named_parameters()),
        "out.weight",
    }
    assert small.pruned.kind == "module"
    assert (small.rnn.input_size, small.rnn.hidden_size) == (4, 6)
    assert all(a is b for a, b in zip(small.rnn._flat_weights, small.rnn.parameters(), strict=True))


def test_rnn_with_relu() -> None:
    network, _ = check(seeded(Layers, nn.RNN, nonlinearity="relu"))
    assert sizes(network) == {"inner": [8], "rnn": [12]}


@pytest.mark.parametrize("layers", [1, 2])
def test_projections_are_units_of_their_own(layers) -> None:
    options = {"proj_size": 6, "num_layers": layers, "bidirectional": True, "batch_first": True}
    network, small = check(seeded(Layers, nn.LSTM, **options))
    assert sizes(network) == {"inner": [8], "rnn": [6, 12]}
    assert (small.rnn.hidden_size, small.rnn.proj_size) == (6, 3)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "without bias"])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind, options, steps) -> None:
    network, small = check(seeded(Cells, kind, steps, **options))
    expected = {"inner": [8], "cell": [12]}
    if steps == 1 and not options:
        assert sizes(network) == expected
    assert (small.cell.input_size, small.cell.hidden_size) == (4, 6)


def test_unbatched_sequences() -> None:
    network, _ = check(seeded(Layers, nn.GRU), X[0])
    assert sizes(network) == {"inner": [8], "rnn": [12]}


def test_last_states() -> None:
    network, _ = check(seeded(LastState))
    assert sizes(network) == {"rnn": [12]}


def test_states_handed_on_tie_the_units_of_both() -> None:
    network = trace(seeded(Translator), X)
    assert [len(g) for g in network.groups] == [12]


def test_residual_layers_share_one_width() -> None:
    net = seeded(Residual)
    network = trace(net, X)
    assert [len(g) for g in network.groups] == [8]
    small = rf.prune(net, X, HALF, criterion="random")
    assert [rnn.hidden_size for rnn in small.rnns] == [4, 4]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_first_states_shrink_with_the_units(kind, learned) -> None:
    network = trace(seeded(FirstState, kind, learned), X)
    assert sizes(network) == {"rnn": [12]}
    removed = np.arange(12) % 3 == 0
    plan = Plan.of(network, removed)
    net = seeded(FirstState, kind, learned)
    assert prove(net, X, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_outputs_are_zero_only_if_nothing_remembered_is_not(kind) -> None:
    """A masked unit of an RNN forgets its first state, that of an LSTM or GRU does not."""
    network = trace(seeded(FirstState, kind, learned=False, mean=True), X)
    assert bool(network.groups) == (kind is nn.RNN)
    network = trace(seeded(FirstState, kind, learned=True, mean=True), X)
    assert [len(g) for g in network.groups] == [12]


def test_a_given_first_state_freezes_and_says_so() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.rnn = nn.Linear(5, 8), nn.GRU(8, 12, batch_first=True)
            self.out = nn.Linear(12, 3)

        def forward(self, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(self.inner(x), first)[0])

    network, _ = check(seeded(Given), (X, torch.ones(1, 3, 12)))
    assert sizes(network) == {"inner": [8]}
    reasons = {f.reason for f in network.frozen if f.path == "rnn.weight_hh_l0"}
    assert reasons == {"its initial state is given and cannot change"}


def test_time_and_examples_cannot_go() -> None:
    class OverTime(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 6)
            self.rnn = nn.GRU(7, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(self.inner(x).transpose(1, 2))[0][..., 0]

    network = trace(seeded(OverTime), X)
    (frozen,) = (f for f in network.frozen if f.path == "inner.weight" and f.dim == 0)
    assert frozen.reason == "the recurrence runs along it"


def test_weights_that_are_not_zero_at_masked_units_freeze() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRUCell(5, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            c = self.cell
            first = x.new_zeros(x.shape[0], 8)
            weights = c.weight_ih.cos(), c.weight_hh, c.bias_ih, c.bias_hh
            return self.out(torch.gru_cell(x[:, 0], first, *weights))

    network = trace(seeded(Computed), X)
    assert not network.groups
    assert "meets computed weights that masked units leave" in {f.reason for f in network.frozen}


def test_a_single_hidden_unit_stays() -> None:
    network = trace(seeded(Layers, nn.LSTM, hidden=1, bidirectional=True, num_layers=2), X)
    assert sizes(network) == {"inner": [8]}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (Classifier, X),
        (Speech, torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(1))),
        (lambda: Layers(nn.LSTM, proj_size=6, num_layers=2, batch_first=True), X),
        (lambda: Cells(nn.LSTMCell, 3), X),
        (Translator, X),
    ],
    ids=["classifier", "speech", "projections", "cells", "translator"],
)
def test_networks_are_saved_loaded_copied_trained_and_exported(build, inputs, tmp_path) -> None:
    _, small = check(seeded(build), inputs)
    assert small.pruned.kind == "module"
    expected = small(inputs)
    loaded = rf.load(rf.save(small, tmp_path / "small.safetensors"), build())
    assert torch.equal(loaded(inputs), expected)
    assert torch.equal(copy.deepcopy(small)(inputs), expected)
    again = build()
    again = rf.prune(again, inputs, HALF, criterion="magnitude")
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(inputs), expected)
    if not getattr(getattr(small, "rnn", None), "proj_size", 0):  # ONNX has no projections
        rf.export(small, tmp_path / "small.onnx", inputs)
    small.train()(inputs).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_graphs_drop_between_layers_in_training_only(kind, tmp_path) -> None:
    net = seeded(Layers, kind, num_layers=2, dropout=0.5, batch_first=True)
    network = trace(net, X)
    small = rewrite(net, network, Plan.of(network, np.arange(network.coupling.units) % 2 == 0))
    assert torch.equal(small(X), small(X))
    loaded = rf.load(rf.save(small, tmp_path / "small.safetensors"))
    assert torch.equal(loaded(X), small(X))
    assert not torch.equal(small.train()(X), small(X))


def test_packed_sequences_have_no_rule() -> None:
    assert set(ROWS) == {f"aten.{k}{s}" for k in GATES for s in (".input", "_cell.default")}
    assert all(find(f"aten.{kind}.data").__name__ == "_unknown" for kind in GATES)
