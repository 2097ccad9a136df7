"""Importance of blocks: against formulas computed another way."""

import numpy as np
import pytest
import torch
from torch import nn

from rarefy.errors import DataError
from rarefy.graph.trace import trace
from rarefy.pruning.scoring.criteria import CRITERIA, scored
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.pruning.scoring.influence import importances, influences, inner, magnitudes
from residual_networks import Residual, inputs

torch.set_num_threads(1)
KINDS = ("Basic", "PreNorm", "Half", "Gated")


@pytest.fixture(scope="module")
def traced():
    model = Residual(KINDS)
    return model, trace(model, inputs())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean over examples of the cosine between them, in NumPy."""
    x, y = (t.detach().double().flatten(1).numpy() for t in (a, b))
    return float(np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)))


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_comes_out(traced) -> None:
    model, network = traced
    data = [(inputs(seed), torch.zeros(3)) for seed in range(3)]
    found = influences(model, network, data)
    x = torch.cat([batch for batch, _ in data])
    with torch.no_grad():
        x = torch.relu(model.stem(x))
        for number, block in enumerate(model.blocks):
            before = x.clone()
            after = block(x.clone())
            if number:  # of the first, the sum is taken before its relu
                assert found[number] == pytest.approx(1 - cosine(before, after), rel=1e-4)
            else:
                sums = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(before))))) + before
                assert found[0] == pytest.approx(1 - cosine(before, sums), rel=1e-4)
            x = after


def test_a_sum_in_place_does_not_hide_the_branch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            y = x.clone()
            z = y.view(-1, 6)
            y += self.a(z).view(y.shape)
            return y * 2

    model, x = Net().eval(), torch.randn(2, 6)
    network = trace(model, x)
    if network.blocks:
        found = influences(model, network, [x])
        assert found[0] == pytest.approx(1 - cosine(x, x + model.a(x)), rel=1e-4)


def test_magnitude_is_the_mean_square_of_outputs_for_white_inputs(traced) -> None:
    model, network = traced
    half = model.blocks[2]
    squares = []
    for layer in (half.fc1, half.fc2):
        covariance = layer.weight.detach().flatten(1) @ layer.weight.detach().flatten(1).T
        squares.append(float(covariance.diagonal().mean()))
    assert magnitudes(model, network)[2] == pytest.approx(sum(squares) / 2, rel=1e-5)


def test_a_block_of_mean_influence_counts_as_much_as_its_units(traced) -> None:
    model, network = traced
    evidence = Evidence(dict(model.named_parameters()))
    magnitude = CRITERIA["magnitude"]
    totals = [float(scored(group, evidence, magnitude).sum()) for group in network.groups]
    found = importances(model, network, totals)
    relative = magnitudes(model, network)
    own = [sum(totals[g] for g in inner(network, [b])) for b in network.blocks]
    assert [total > 0 for total in own] == [True, True, True, False]
    own[3] = sum(own[:3]) / 3  # without units of its own it counts as the others
    np.testing.assert_allclose(found, np.array(own) * relative / relative.mean())
    doubled = importances(model, network, [2 * total for total in totals])
    np.testing.assert_allclose(doubled, 2 * found)


def test_groups_that_a_block_shares_are_not_its_own(traced) -> None:
    _, network = traced
    for block in network.blocks:
        for number in inner(network, [block]):
            assert all(m.path in block.tensors for m in network.groups[number].members)
    everything = inner(network, network.blocks)
    stream = next(n for n, g in enumerate(network.groups) if g.name == "stem")
    assert stream not in everything


def test_a_branch_that_gives_nothing_has_no_influence() -> None:
    model = Residual(("Half", "Gated"))
    nn.init.zeros_(model.blocks[0].fc2.weight)
    nn.init.zeros_(model.blocks[0].fc2.bias)
    network = trace(model, inputs())
    found = influences(model, network, [inputs()])
    assert found[0] == pytest.approx(0, abs=1e-12)
    assert found[1] > 1e-4


def test_data_that_do_not_fit_are_refused(traced) -> None:
    model, network = traced
    with pytest.raises(DataError, match="does not run on a batch"):
        influences(model, network, [torch.zeros(2, 5)])
    with pytest.raises(DataError):
        influences(model, network, [])


class Texts(nn.Module):
    """Two residual blocks over words at positions, whose graph holds the length."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Parameter(torch.randn(8, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids) + self.places[: input_ids.shape[1]]
        for block in self.blocks:
            x = x + block(x * attention_mask[..., None])
        return x


def test_texts_may_be_of_other_lengths_than_the_example() -> None:
    def batch(length: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(2 * length).view(2, length) % 9
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Texts().eval()
    short, long = (trace(model, batch(length)) for length in (5, 7))
    data = [batch(7), batch(7)]
    assert np.allclose(influences(model, short, data), influences(model, long, data))
    both = influences(model, short, [batch(4), batch(7)])
    assert both.shape == (2,)
    assert (both > 0).all()
