"""Attention: heads, positions within heads, grouped queries, masks; pruning equals masking."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from masking import check_masking, described, holders, random_plan, zeroed
from rarefy.graph.trace import trace
from rarefy.pruning.narrow import operate
from rarefy.pruning.structure.surgery import kept_entries, rewrite

torch.set_num_threads(1)
X = torch.randn(2, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LENGTH = 9
OFFSETS = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) + LENGTH - 1


class Attention(nn.Module):
    """Four heads of 6 (values of 5) over any number of heads of the keys."""

    def __init__(self, attend, kv: int = 4, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Linear(7, 12)
            self.q, self.k = nn.Linear(12, 24), nn.Linear(12, kv * 6)
            self.v, self.out = nn.Linear(12, kv * 5), nn.Linear(20, 3)
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(*shape)))
        self.attend, self.kv = attend, kv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        heads = [
            layer(x).unflatten(2, (count, -1)).transpose(1, 2)
            for layer, count in ((self.q, 4), (self.k, self.kv), (self.v, self.kv))
        ]
        return self.out(self.attend(self, *heads).transpose(1, 2).flatten(2))


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, length, size = x.shape
    return x[:, :, None].expand(batch, heads, times, length, size).reshape(batch, -1, length, size)


def by_hand(n, q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(6)).softmax(-1) @ v


def linear_attention(n, q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = torch.einsum("bhld,bhle->bhde", k, v)
    scale = 1 / (torch.einsum("bhld,bhd->bhl", q, k.sum(2)) + 1)
    return torch.einsum("bhld,bhde,bhl->bhle", q, context, scale)


def talking(n, q, k, v):
    scores = torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1) * 0.3, n.before)
    return torch.einsum("bhij,hg->bgij", scores.softmax(-1), n.after) @ v


def flat(n, q, k, v):
    """Batch and heads as one dimension, in the order of ``nn.MultiheadAttention``."""
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).view(*shape[:3], -1)


sdpa = F.scaled_dot_product_attention
Q, K, V = (f"{name}.bias[0] {name}.weight[0]" for name in "qkv")
EMBED = "12: embed.bias[0] embed.weight[0] k.weight[1] q.weight[1] v.weight[1]"
WITHIN, VALUES = f"6: {K} {Q}", f"5: out.weight[1] {V}"
HEADS = f"4: {K} out.weight[1] {Q} {V}"
PLAIN = {EMBED, WITHIN, VALUES, HEADS}
SHARED = f"2: {K} out.weight[1] {Q} {V}"
QUERIES = f"out.weight[1] {Q}"
GROUPED = {EMBED, WITHIN, VALUES, SHARED, f"2: {QUERIES}"}
SINGLE = {EMBED, WITHIN, VALUES, f"4: {QUERIES}"}


def tied(group: str, *members: str) -> str:
    size, _, rest = group.partition(": ")
    return f"{size}: " + " ".join(sorted([*rest.split(), *members]))


CARRIED = {
    "plain": (lambda n, q, k, v: sdpa(q, k, v), {}, PLAIN),
    "causal": (lambda n, q, k, v: sdpa(q, k, v, is_causal=True), {}, PLAIN),
    "scaled": (lambda n, q, k, v: sdpa(q, k, v, scale=0.3), {}, PLAIN),
    "batch and heads in one": (flat, {}, PLAIN),
    "by hand": (by_hand, {}, PLAIN),
    "grouped queries": (
        lambda n, q, k, v: sdpa(q, k, v, enable_gqa=True),
        {"kv": 2},
        GROUPED,
    ),
    "single key head": (lambda n, q, k, v: sdpa(q, k, v, enable_gqa=True), {"kv": 1}, SINGLE),
    "single key head by broadcast": (lambda n, q, k, v: sdpa(q, k, v), {"kv": 1}, SINGLE),
    "bias": (
        lambda n, q, k, v: sdpa(q, k, v, attn_mask=n.bias),
        {"bias": (4, LENGTH, LENGTH)},
        {EMBED, WITHIN, VALUES, tied(HEADS, "bias[0]")},
    ),
    "bias per head": (
        lambda n, q, k, v: sdpa(q, k, v, attn_mask=n.bias),
        {"bias": (1, 4, 1, LENGTH)},
        {EMBED, WITHIN, VALUES, tied(HEADS, "bias[1]")},
    ),
    "bias without heads": (
        lambda n, q, k, v: sdpa(q, k, v, attn_mask=n.bias),
        {"bias": (LENGTH, LENGTH)},
        PLAIN,
    ),
    "bias from a table": (
        lambda n, q, k, v: sdpa(
            q, k, v, attn_mask=F.embedding(torch.arange(LENGTH) % 5, n.table).t()[None, :, None]
        ),
        {"table": (5, 4)},
        {EMBED, WITHIN, VALUES, tied(HEADS, "table[1]")},
    ),
    "bias by relative position": (
        lambda n, q, k, v: sdpa(q, k, v, attn_mask=n.table[OFFSETS].permute(2, 0, 1)[None]),
        {"table": (17, 4)},
        {EMBED, WITHIN, VALUES, tied(HEADS, "table[1]")},
    ),
    "linear": (linear_attention, {}, {EMBED, VALUES, HEADS}),
    "talking heads": (
        talking,
        {"before": (4, 4), "after": (4, 4)},
        {
            EMBED,
            WITHIN,
            VALUES,
            f"4: before[0] {K} {Q}",
            "4: after[0] before[1]",
            f"4: after[1] out.weight[1] {V}",
        },
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_heads_and_positions_within_them_can_go(name) -> None:
    attend, options, groups = CARRIED[name]
    network, _ = check_masking(Attention(attend, **options), X)
    assert described(network) == groups


def test_repeated_key_heads_go_with_their_queries() -> None:
    def attend(n, q, k, v):
        return sdpa(q, repeated(k, 2), repeated(v, 2))

    network, _ = check_masking(Attention(attend, kv=2), X)
    assert {EMBED, WITHIN, VALUES, SHARED} <= described(network)
    assert holders(network, "k.weight", 0) == {2, 6}


def test_a_learned_query_is_a_row_of_its_own() -> None:
    def attend(n, q, k, v):
        return sdpa(n.query, k, v).mean(2, keepdim=True)

    network, _ = check_masking(Attention(attend, query=(1, 4, 1, 6)), X)
    assert tied("4: " + f"{K} out.weight[1] {V}", "query[1]") in described(network)
    assert tied(f"6: {K}", "query[3]") in described(network)


@pytest.mark.parametrize("causal", [False, True])
def test_the_length_of_keys_is_never_pruned(causal) -> None:
    """Keys that are parameters have a length that could go, were it not for the softmax."""

    def attend(n, q, k, v):
        return sdpa(q, n.keys, n.values, is_causal=causal)

    net = Attention(attend, keys=(1, 4, 11, 6), values=(1, 4, 11, 5))
    network, _ = check_masking(net, X)
    assert not holders(network, "keys", 2)
    assert not holders(network, "values", 2)
    reasons = {f.reason for f in network.frozen if f.path in ("keys", "values")}
    assert reasons == {"attention normalizes over positions"}


def test_the_implicit_scale_stays_that_of_the_original() -> None:
    net = Attention(lambda n, q, k, v: sdpa(q, k, v)).double()
    network = trace(net, X)
    (name,) = network.flow.implicit_scale
    atoms = network.flow.implicit_scale[name]
    assert len(atoms) == 6
    plan = random_plan(net, network, 0)
    assert plan.gone[atoms].any()
    small = rewrite(net, network, plan)
    assert small.graph.by_name[name].argument("scale") == pytest.approx(6**-0.5)
    reference = zeroed(net, kept_entries(network, plan))
    with torch.no_grad():
        torch.testing.assert_close(small(X), reference(X))


def test_a_stated_scale_is_left_alone() -> None:
    network = trace(Attention(lambda n, q, k, v: sdpa(q, k, v, scale=0.3)), X.float())
    assert not network.flow.implicit_scale


def test_a_head_with_what_is_not_zero_keeps_its_positions() -> None:
    network, _ = check_masking(Attention(lambda n, q, k, v: sdpa(q.exp(), k.sigmoid(), v)), X)
    assert described(network) == {EMBED, VALUES, HEADS}


# --- PyTorch's own modules ---------------------------------------------------------------------


class Multihead(nn.Module):
    def __init__(self, first: bool, weights: bool, mask: bool, padding: bool, width: int = 12):
        super().__init__()
        self.embed, self.keys, self.out = nn.Linear(7, 12), nn.Linear(7, width), nn.Linear(12, 3)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=first, kdim=width, vdim=width)
        self.first, self.weights, self.mask, self.padding = first, weights, mask, padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, k = self.embed(x), self.keys(x)
        if not self.first:
            y, k = y.transpose(0, 1), k.transpose(0, 1)
        mask = x.new_zeros(LENGTH, LENGTH) if self.mask else None
        padding = x[..., 0] > 1 if self.padding and not self.mask else None
        y, _ = self.attention(
            y, k, k, need_weights=self.weights, attn_mask=mask, key_padding_mask=padding
        )
        return self.out(y if self.first else y.transpose(0, 1))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "mask", "padding"])
@pytest.mark.parametrize("width", [12, 10])
def test_multihead_attention_in_all_its_spellings(first, weights, mask, width) -> None:
    net = Multihead(first, weights, mask == "mask", mask == "padding", width)
    network, _ = check_masking(net, X, seeds=(0,))
    rows = "q_proj_weight" if width != 12 else "in_proj_weight"
    assert holders(network, f"attention.{rows}", 0) == {3, 4}
    assert holders(network, "attention.out_proj.weight", 0) == {12}


class Encoder(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(7, 12), nn.Linear(12, 3)
        layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, norm_first=first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.embed(x)))


class Decoder(nn.Module):
    """Cross attention: queries of one sequence, keys of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(7, 12), nn.Linear(12, 3)
        self.body = nn.Transformer(12, 4, 1, 1, 20, batch_first=True)
        self.body.encoder.enable_nested_tensor = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        return self.out(self.body(y, y[:, :5]))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("make", [lambda: Encoder(True), lambda: Encoder(False), Decoder])
def test_heads_of_transformers_are_found_without_the_fast_path(make) -> None:
    net = make().eval()
    network = trace(net, X.float())
    assert not network.unknown
    assert not any("_native" in n.op or "fast" in n.op for n in network.captured.graph.calls)
    projections = [p for p, _ in net.named_parameters() if p.endswith("in_proj_weight")]
    assert projections
    for path in projections:
        assert holders(network, path, 0) == {3, 4}
    assert operate(net, X.float(), network, random_plan(net, network, 0)).pruned.error < 1e-6
