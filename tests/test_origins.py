"""Which example and position rows are of, against rows that carry their own numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from padded_texts import LENGTH, Reader, both_paddings, texts
from rarefy.batches import has_tokens
from rarefy.errors import DataError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.trace import trace
from rarefy.pruning.prune import prune
from rarefy.pruning.repair import repair
from rarefy.pruning.running.lockstep import batch_dims
from rarefy.pruning.running.origins import Along, Origins, counted
from rarefy.pruning.scoring.influence import influences
from rarefy.pruning.scoring.judging import judged
from rarefy.types import Budget

LAYOUTS = {  # how (examples, length, heads) become a value, and which of its dimensions tell rows
    "examples first": (lambda t: t[:, :, 0], (0, 1)),
    "sequences first": (lambda t: t[:, :, 0].T, (0, 1)),
    "merged": (lambda t: t[:, :, 0].flatten(), (0,)),
    "merged, sequences first": (lambda t: t[:, :, 0].T.flatten(), (0,)),
    "heads first, merged with examples": (lambda t: t.permute(2, 0, 1).flatten(0, 1), (0, 1)),
    "heads between": (lambda t: t.transpose(1, 2), (0, 1, 2)),
    "heads last": (lambda t: t, (0, 1, 2)),
    "heads merged with examples": (lambda t: t.transpose(1, 2).flatten(0, 1), (0, 1)),
    "channels between": (lambda t: t.transpose(1, 2), (0, 2)),
    "merged between sequences and heads": (lambda t: t.transpose(0, 1).flatten(), (0,)),
    "merged between heads and sequences": (lambda t: t.permute(2, 0, 1).flatten(), (0,)),
}
BATCH = {
    "sequences first": lambda length, heads: Along(1),
    "merged, sequences first": lambda length, heads: Along(0, before=length),
    "heads first, merged with examples": lambda length, heads: Along(0, before=heads),
    "merged between sequences and heads": lambda length, heads: Along(0, before=length),
    "merged between heads and sequences": lambda length, heads: Along(0, before=heads),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_rows_are_of_the_example_and_the_token_that_they_come_from(layout, data) -> None:
    examples, length = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    heads = data.draw(st.integers(7, 9))  # unlike a length
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=examples * length, max_size=examples * length))
    ).view(examples, length)
    form, dims = LAYOUTS[layout]
    own = torch.arange(examples)[:, None, None].expand(examples, length, heads)
    value, tokens = form(own), form(mask[:, :, None].expand(examples, length, heads))
    if layout == "channels between":
        value, tokens = value[:, 0], tokens[:, 0]
        shape = (examples, heads, length)
    else:
        shape = value.shape
    inputs = {"input_ids": torch.zeros(examples, length), "attention_mask": mask.long()}
    along = BATCH[layout](length, heads) if layout in BATCH else Along(0)
    origins = Origins.of(inputs, {"x": along})
    assert torch.equal(origins.examples_at("x", shape, dims), value.flatten())
    found = origins.tokens_at("x", shape, dims)
    assert found is None if mask.all() else torch.equal(found, tokens.flatten())


def test_rows_of_what_has_no_dimension_of_the_sequence_all_count() -> None:
    origins = Origins(4, torch.zeros(4, 5, dtype=torch.bool), {"x": Along(0)})
    assert origins.tokens_at("x", (4, 7), (0, 1)) is None
    assert origins.tokens_at("x", (4, 7), (0,)) is None
    assert origins.tokens_at("x", (6,), (0,)) is None
    assert origins.tokens_at("x", (), ()) is None
    assert origins.examples_at("x", (), ()).tolist() == [0]


def test_where_the_dimension_is_not_known_it_is_the_first_of_a_multiple() -> None:
    assert Origins(4).examples_at("x", (3, 8), (0, 1)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3


def test_outputs_that_are_no_sequences_count_whole() -> None:
    tokens = torch.tensor([[1, 0], [1, 1]])
    assert counted(torch.ones(2, 2), tokens) is True
    assert counted(torch.ones(2, 3, 2), tokens) is True
    assert counted(torch.ones(2, 2, 3), None) is True
    kept = torch.ones(2, 2, 3, dtype=torch.bool) & counted(torch.ones(2, 2, 3), tokens)
    assert kept.sum(-1).tolist() == [[3, 0], [3, 3]]


class SequenceFirst(nn.Module):
    """Two linear layers on (L, B, C), with a table that is the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("table", torch.randn(6, 1, 6))

    def forward(self, x):
        return self.b((self.a(x.transpose(0, 1)) + self.table.sin()).relu()).transpose(0, 1)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_the_dimension_of_the_examples_is_the_one_that_grows(size) -> None:
    net = SequenceFirst()
    x = torch.randn(size, 6, 4)
    model = graph_model(net, capture(net, torch.randn(3, 6, 4)))
    dims = batch_dims(model, x)
    kinds = {node.kind: dims.get(node.name) for node in model.graph.calls}
    assert kinds["linear"] == kinds["relu"] == Along(1)
    assert kinds["sin"] is None
    output = model.graph.output.inputs[0]
    assert dims[output] == Along(0)


@pytest.mark.parametrize("same", [1, 2, 5])
def test_what_is_merged_before_the_examples_is_told_from_what_is_merged_behind_them(same) -> None:
    class Merging(nn.Module):
        def forward(self, x):
            middle = x.unflatten(1, (2, 2)).permute(1, 0, 2, 3).flatten(0, 2)
            before = x.transpose(0, 1).flatten(0, 1)
            return x.flatten(0, 1).sin(), before.cos(), middle.tan(), before.abs().log()

    net, x = Merging(), torch.randn(6, 4, 4)
    x[:same] = x[0, 0]  # examples that are alike do not tell
    x[..., 0] = 0  # whose logarithm is infinite
    model = graph_model(net, capture(net, x))
    dims = batch_dims(model, x)
    kinds = {node.kind: dims.get(node.name) for node in model.graph.calls}
    assert [kinds[kind].before for kind in ("sin", "tan", "cos", "log")] == [1, 2, 4, 4]


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "activation"])
def test_a_dimension_that_is_squeezed_where_there_is_one_example_is_known(criterion) -> None:
    class Pooled(nn.Module):
        def __init__(self, *, squeezed: bool) -> None:
            super().__init__()
            self.conv, self.head, self.squeezed = nn.Conv2d(3, 16, 3), nn.Linear(16, 5), squeezed

        def forward(self, x):
            h = self.conv(x).relu().mean((2, 3), keepdim=True)
            return self.head(h.squeeze() if self.squeezed else h.flatten(1))

    squeezed, flat = Pooled(squeezed=True).eval(), Pooled(squeezed=False).eval()
    flat.load_state_dict(squeezed.state_dict())
    x = torch.randn(32, 3, 8, 8)
    data = [(x, torch.randint(5, (32,)))]
    one, two = (judged(net, trace(net, x), criterion, data).scores for net in (squeezed, flat))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4)


@pytest.mark.parametrize("criterion", [None, "obs", "wanda", "activation", "compensated"])
def test_a_network_that_squeezes_a_single_example_is_scored_and_repaired(criterion) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(6, 16), nn.Linear(16, 1)

        def forward(self, x):
            return self.c(self.a(x).relu()).squeeze()

    x = torch.randn(32, 6)
    small = prune(Squeezed().eval(), x, Budget(sparsity=0.5), data=[x], criterion=criterion)
    assert small.repaired.errors


def test_networks_on_pairs_of_examples_tell_where_they_lie() -> None:
    class Pairs(nn.Module):
        def forward(self, x):
            first, second = x.unflatten(0, (2, -1)).unbind(0)
            return first.sin() + second.cos()

    x = torch.randn(6, 4)
    model = graph_model(Pairs(), capture(Pairs(), x))
    dims = batch_dims(model, x)
    kinds = {node.kind: dims.get(node.name) for node in model.graph.calls}
    assert kinds["sin"] == kinds["cos"] == kinds["add"] == Along(0)


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_units_count_as_much_however_examples_are_laid_out(criterion) -> None:
    data = [(x, x["input_ids"] % 4) for x in (texts(0), texts(0, seed=1))]
    found = []
    for first in ("examples", "sequences", "merged", "merged, sequences first"):
        net = Reader(first).eval()
        found.append(judged(net, trace(net, texts(0)), criterion, data).scores)
    for other in found[1:]:
        for own, its in zip(other, found[0], strict=True):
            np.testing.assert_allclose(own, its, rtol=1e-3)


@pytest.mark.parametrize("batch_first", [False, True])
def test_heads_of_attention_count_as_one_example_at_a_time(batch_first) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(12, 4, batch_first=batch_first)
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            h = x if batch_first else x.transpose(0, 1)
            mixed, _ = self.mix(h, h, h, need_weights=False)
            return self.head(mixed.mean(1 if batch_first else 0))

    net, x, y = Mixing().eval(), torch.randn(12, 6, 12), torch.randint(5, (12,))
    network = trace(net, x)
    whole = judged(net, network, "fisher", [(x, y)]).scores
    alone = judged(net, network, "fisher", [(x[i : i + 1], y[i : i + 1]) for i in range(12)]).scores
    for own, its in zip(whole, alone, strict=True):
        np.testing.assert_allclose(own, its, rtol=1e-3)


class Sized(nn.Module):
    """On tokens, sequences first; it takes the inputs as ``form`` has them."""

    def __init__(self, form) -> None:
        super().__init__()
        self.first, self.last, self.form = nn.Linear(6, 8), nn.Linear(8, 5), form
        self.register_buffer("places", torch.randn(3, 4, 6))

    def forward(self, x):
        tokens = self.form(self, x).transpose(0, 1)
        return self.last(self.first(tokens).relu()).mean(0)


FORMS = {
    "as they lie in memory": lambda net, x: x.transpose(1, 2).view(-1, 24).view(-1, 4, 6),
    "at most three": lambda net, x: x.transpose(1, 2) + net.places[: x.shape[0]],
}


@pytest.mark.parametrize("form", FORMS)
def test_where_examples_lie_is_found_though_a_network_is_particular(form) -> None:
    net = Sized(FORMS[form]).eval()
    x = torch.randn(3, 4, 6).transpose(1, 2)
    model = graph_model(net, capture(net, x))
    dims = batch_dims(model, x)
    assert {dims[node.name] for node in model.graph.calls if node.kind == "relu"} == {Along(1)}


@pytest.mark.parametrize(
    "criterion", [None, "fisher", "taylor", "activation", "obs", "compensated"]
)
def test_networks_on_pairs_are_pruned(criterion) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.last(self.first(x.reshape(-1, 2, 4)).relu()).reshape(-1, 5)

    x, y = torch.randn(8, 4), torch.randint(5, (8,))
    small = prune(Pairs().eval(), x, Budget(macs=0.6), criterion=criterion, data=[(x, y)])
    assert len(small.first.weight) < 8


def test_of_a_network_of_one_batch_size_it_is_not_known() -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(3, 2, 2).sum(0)

    net = Fixed()
    assert batch_dims(graph_model(net, capture(net, torch.randn(3, 4))), torch.randn(3, 4)) is None


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("first", ["examples", "sequences", "merged"])
@pytest.mark.parametrize(
    "criterion",
    [None, "fisher", "compensated", "obs", "reconstruction", "activation", "wanda"],
)
def test_units_count_as_much_whatever_stands_at_padding(criterion, first, pooled) -> None:
    net = Reader(first, pooled=pooled).eval()
    zeros, words = both_paddings()
    network = trace(net, zeros[0])
    one, two = (judged(net, network, criterion, data) for data in (zeros, words))
    for own, other in zip(one.scores, two.scores, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-7 * np.abs(own).max())
    for number, curve in (one.losses or {}).items():
        assert float(curve(0.5)) == pytest.approx(float(two.losses[number](0.5)), rel=1e-3)


@pytest.mark.parametrize("first", ["examples", "sequences", "merged", "merged, sequences first"])
@pytest.mark.parametrize("criterion", ["wanda", "obs", "sparsegpt", "obd", "taylor2"])
def test_weights_go_and_are_solved_whatever_stands_at_padding(criterion, first) -> None:
    net = Reader(first).eval()
    given = [[(x, x["input_ids"] % 4) for x in data] for data in both_paddings()]
    if criterion in ("wanda", "obs", "sparsegpt"):
        given = [[x for x, _ in data] for data in given]
    else:  # labels, those of padding too, which do not count
        zeros, words = given
        given = [zeros, [(x, y) for (x, _), (_, y) in zip(words, zeros, strict=True)]]
    budget, example = Budget(sparsity=0.5), texts(0)
    one, two = (
        prune(net, example, budget, structure="weight", criterion=criterion, data=data)
        for data in given
    )
    for own, other in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_repair_is_the_same_whatever_stands_at_padding_and_however_rows_are_laid_out() -> None:
    found = []
    for first in ("examples", "sequences", "merged", "merged, sequences first"):
        net = Reader(first).eval()
        small = prune(net, texts(0), Budget(macs=0.6))
        found += [repair(net, small, data) for data in both_paddings()]
    for other in found[1:]:
        assert other.repaired.errors.keys() == found[0].repaired.errors.keys()
        for layer, errors in found[0].repaired.errors.items():
            assert other.repaired.errors[layer] == pytest.approx(errors, rel=1e-3)
        for p, q in zip(found[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)
    assert all(after < before for before, after in found[0].repaired.errors.values())


def test_blocks_count_as_much_whatever_stands_at_padding() -> None:
    net = Reader().eval()
    found = [influences(net, trace(net, texts(0)), data) for data in both_paddings()]
    assert len(found[0]) == 2
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_without_padding_examples_whose_trunk_is_zero_count_among_blocks() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch, self.last = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            h = self.first(x).relu()
            return self.last(h + self.branch(h))

    net, x = Residual().eval(), torch.randn(64, 6)
    net.first.bias.data.fill_(-0.5)
    with torch.no_grad():
        trunk = net.first(x).relu()
        turned = 1 - torch.cosine_similarity(trunk, trunk + net.branch(trunk), dim=1)
    assert 0 < int((~trunk.any(1)).sum()) < 64
    found = influences(net, trace(net, x), [x])
    np.testing.assert_allclose(found, [float(turned.mean())], rtol=1e-4)
    for parameter in net.branch.parameters():
        parameter.data.zero_()
    assert influences(net, trace(net, x), [x]).tolist() == [0]


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(4, 1, 5, 5),  # added to the scores of attention
        torch.zeros(5, 5),
        torch.ones(5, 5, dtype=torch.bool).tril(),
        torch.tensor([[0.0, -1e4, -1e4]] * 4),
        torch.ones(4, 5, 5, dtype=torch.int64).tril(),
    ],
)
def test_masks_that_are_added_or_of_pairs_tell_no_padding(mask) -> None:
    inputs = {"x": torch.randn(4, 5, 8), "attention_mask": mask}
    assert Origins.of(inputs).tokens is None
    assert has_tokens(inputs)


def test_a_network_with_an_additive_mask_is_pruned_and_repaired() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x, attention_mask):
            mixed = F.scaled_dot_product_attention(
                self.q(x), self.k(x), self.v(x), attn_mask=attention_mask
            )
            return self.o(mixed)

    net = Masked().eval()
    hidden = torch.full((5, 5), -1e4).triu(1)
    data = [{"x": torch.randn(16, 5, 8), "attention_mask": mask} for mask in (hidden * 0, hidden)]
    for criterion in ("activation", "wanda", "compensated"):
        small = prune(net, data[1], Budget(macs=0.6), criterion=criterion, data=data)
        assert repair(net, small, data).repaired is not None


@pytest.mark.parametrize("criterion", ["activation", "wanda", "obs", "taylor", "fisher"])
def test_data_that_are_all_padding_are_named(criterion) -> None:
    net, empty = Reader(pooled=False).eval(), _all_padding()
    labels = torch.zeros(16, LENGTH, dtype=torch.int64)
    with pytest.raises(DataError, match="every position is padding"):
        prune(net, texts(0), Budget(macs=0.6), criterion=criterion, data=[(empty, labels)])


def test_data_that_are_all_padding_solve_nothing() -> None:
    net, example, budget = Reader(pooled=False).eval(), texts(0), Budget(macs=0.6)
    small, data = prune(net, example, budget), [_all_padding()]
    with pytest.raises(DataError, match="every position is padding"):
        repair(net, small, data)
    with pytest.raises(DataError, match="every position is padding"):
        prune(net, example, budget, criterion="compensated", data=data)
    with pytest.raises(DataError, match="every position is padding"):
        prune(
            net,
            example,
            Budget(sparsity=0.5),
            structure="weight",
            criterion="sparsegpt",
            data=data,
        )


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("criterion", ["compensated", "activation", "taylor", "fisher"])
def test_a_batch_that_is_all_padding_is_passed_over(criterion, pooled) -> None:
    net, budget = Reader("merged, sequences first", pooled=pooled).eval(), Budget(macs=0.6)
    data = [(x, x["input_ids"] % 4) for x in (_all_padding(), texts(0), texts(0, seed=1))]
    if pooled:  # whose mean of no token is not a number
        data = [(x, y[:, 0]) for x, y in data]
    both, alone = (
        prune(net, texts(0), budget, criterion=criterion, data=given) for given in (data, data[1:])
    )
    for own, other in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(own, other)


def test_examples_of_a_batch_that_is_all_padding_are_not_counted_for_repair() -> None:
    net = Reader("merged, sequences first").eval()
    small = prune(net, texts(0), Budget(macs=0.6))
    data = [_all_padding(), texts(0), texts(0, seed=1)]
    healed, alone = (repair(net, small, given, samples=32) for given in (data, data[1:]))
    labelled = [(inputs, inputs["input_ids"] % 4) for inputs in data]
    first, second = (
        prune(net, texts(0), Budget(macs=0.6), criterion="taylor", data=given, samples=16)
        for given in (labelled, labelled[1:])
    )
    assert torch.equal(first.head.weight, second.head.weight)
    assert healed.repaired.errors == alone.repaired.errors
    assert any(after < before for before, after in healed.repaired.errors.values())


def _all_padding() -> dict[str, torch.Tensor]:
    """Texts without a token, all of whose positions hold one word."""
    return {k: torch.zeros_like(v) for k, v in texts(0).items()}


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_that_merges_positions_before_examples_knows_nothing_of_padding(
    batch_first,
) -> None:
    """``nn.MultiheadAttention`` projects its outputs as rows (L * B, C), whatever comes first."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=batch_first)
            self.embed, self.layer = nn.Embedding(40, 12), layer
            self.head = nn.Linear(12, 4)

        def forward(self, input_ids, attention_mask):
            h, hidden = self.embed(input_ids), attention_mask == 0
            h = h if batch_first else h.transpose(0, 1)
            h = self.layer(h, src_key_padding_mask=hidden)
            return self.head(h if batch_first else h.transpose(0, 1))

    net = Encoder().eval()
    found = [
        prune(net, texts(0), Budget(sparsity=0.5), structure="weight", data=data)
        for data in both_paddings()
    ]
    assert "layer.self_attn.out_proj.weight" in found[0].sparsified.errors
    for own, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
