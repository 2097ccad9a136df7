"""Mixtures of experts: hidden units of experts go, whole experts where they share a tensor."""

import numpy as np
import pytest
import torch
from torch import nn

import rarefy as rf
from rarefy.graph.trace import Network, trace
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import prove
from rarefy.pruning.structure.surgery import rewrite

torch.set_num_threads(1)
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
HALF = rf.Budget(sparsity=0.5, scope="local")
EXPERTS, WIDTH, HIDDEN = 4, 16, 24


class Listed(nn.Module):
    """Experts that are modules, mixed by a softmax; with ``best``, only the two best of them."""

    def __init__(self, best: int = 0) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(5, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        )
        self.out = nn.Linear(WIDTH, 3)
        self.best = best

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x).relu()
        gates = self.gate(x).softmax(-1)
        if self.best:
            values, chosen = gates.topk(self.best, -1)
            gates = torch.zeros_like(gates).scatter(-1, chosen, values)
        y = torch.stack([expert(x) for expert in self.experts], -1)
        return self.out((y * gates.unsqueeze(-2)).sum(-1) + x)


class Routed(Listed):
    """Each expert sees only the examples that chose it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x).relu()
        values, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            example, place = torch.where(chosen == number)
            y.index_add_(0, example, expert(x[example]) * values[example, place, None])
        return self.out(y + x)


class Stacked(nn.Module):
    """Experts whose weights are stacked in one tensor."""

    def __init__(self, letters: bool, bias: bool, squash: str) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(5, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.first = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.2)
        self.second = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.2)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 1, HIDDEN)) if bias else None
        self.out = nn.Linear(WIDTH, 3)
        self.letters, self.squash = letters, squash

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x).relu()
        gates = self.gate(x)
        gates = gates.softmax(-1) if self.squash == "softmax" else gates.sigmoid()
        if self.letters:
            hidden = torch.einsum("bd,edh->ebh", x, self.first)
        else:
            hidden = torch.bmm(x.unsqueeze(0).expand(EXPERTS, -1, -1), self.first)
        if self.bias is not None:
            hidden = hidden + self.bias
        if self.letters:
            y = torch.einsum("ebh,ehd,be->bd", hidden.relu(), self.second, gates)
        else:
            y = (torch.bmm(hidden.relu(), self.second) * gates.t().unsqueeze(-1)).sum(0)
        return self.out(y + x)


def seeded(build, *args) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args).eval()


def sizes(network: Network) -> dict[str, int]:
    return {group.name: len(group) for group in network.groups}


def reasons(network: Network, path: str) -> set[str]:
    return {f.reason for f in network.frozen if f.path == path and f.dim == 0}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Listed(), "meets a dimension whose size cannot change"),
        (lambda: Listed(best=2), "is sorted along"),
        (Routed, "is sorted along"),
    ],
    ids=["all", "best", "routed"],
)
def test_experts_that_are_modules_lose_hidden_units_and_stay(build, reason) -> None:
    net = seeded(build)
    network = trace(net, X)
    assert sizes(network) == {"inner": WIDTH} | {f"experts.{e}.0": HIDDEN for e in range(EXPERTS)}
    assert reasons(network, "gate.weight") == {reason}
    small = rf.prune(net, X, HALF, criterion="random")
    assert small.pruned.kind == "module"
    assert [e[0].out_features for e in small.experts] == [HIDDEN // 2] * EXPERTS


@pytest.mark.parametrize("letters", [True, False], ids=["einsum", "bmm"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("squash", ["softmax", "sigmoid"])
def test_stacked_experts_share_hidden_positions_and_go_whole(letters, bias, squash) -> None:
    net = seeded(Stacked, letters, bias, squash)
    network = trace(net, X)
    assert sizes(network) == {"inner": WIDTH, "gate": EXPERTS, "first": HIDDEN}
    small = rf.prune(net, X, HALF, criterion="random")
    assert tuple(small.get_parameter("first").shape) == (EXPERTS // 2, WIDTH // 2, HIDDEN // 2)
    assert tuple(small.get_parameter("second").shape) == (EXPERTS // 2, HIDDEN // 2, WIDTH // 2)


def test_an_expert_that_goes_leaves_the_softmax_to_the_others() -> None:
    net = seeded(Stacked, True, False, "softmax")
    network = trace(net, X)
    (group,) = (g for g in network.groups if g.name == "gate")
    removed = np.zeros(network.coupling.units, bool)
    removed[group.units[1]] = True
    plan = Plan.of(network, removed)
    assert prove(net, X, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-7
    small = rewrite(net, network, plan)
    kept = [0, 2, 3]
    with torch.no_grad():
        x = net.inner(X).relu()
        gates = net.gate(x)[:, kept].softmax(-1)
        each = [(x @ net.first[e]).relu() @ net.second[e] for e in kept]
        y = sum(gates[:, [n]] * part for n, part in enumerate(each))
        assert torch.allclose(small(X), net.out(y + x), atol=1e-5)


TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_mixtral(way) -> None:
    """Hidden positions go in all experts alike."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    net = seeded(lambda: Logits(transformers.MixtralForCausalLM(config)))
    net.model.config._experts_implementation = way
    ids = torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(0))
    network = trace(net, ids)
    experts = "model.model.layers.0.mlp.experts"
    assert experts in sizes(network)
    assert reasons(network, f"{experts}.down_proj")
    small = rf.prune(net, ids, HALF, criterion="random")
    shape = small.get_parameter(f"{experts}.down_proj").shape
    assert (shape[0], shape[-1]) == (4, 24)


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe", "Qwen3Moe"])
def test_experts_behind_a_routing_lose_their_hidden_units(name) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=40,
        use_cache=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    tokens = {"input_ids": torch.randint(1, 40, (2, 13))}
    network = trace(model, tokens)
    assert not network.unknown.keys() & {"transformers.grouped_mm_fallback.default"}
    hidden = [g for g in network.groups if any("experts" in m.path for m in g.members)]
    assert sorted(len(g) for g in hidden) == [32, 48]  # the stream, and what is inside of experts
    small = rf.prune(model, tokens, HALF, criterion="random")
    assert small.pruned.kind == "module"
    assert any(
        f.dim == 0 and "routing" in f.reason for f in small.pruned.frozen if "experts" in f.path
    )
