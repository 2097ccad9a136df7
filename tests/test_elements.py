"""Every criterion of single weights in every structure, against its formula ranked another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rarefy as rf
from rarefy.errors import DataError, InputError
from rarefy.pruning.scoring.criteria import ELEMENT, Element
from rarefy.pruning.scoring.evidence import LABELS
from rarefy.pruning.sparsity import elements
from rarefy.pruning.sparsity.elements import ELEMENT_CRITERIA, SparseGPT
from rarefy.types import Budget

torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).double()
    X, Y = torch.randn(12, 4, 4, 4).double(), torch.randint(4, (12,))
LAYERS = ("0.weight", "3.weight")


def data_of(name: str):
    """What a criterion asks for, in two batches; nothing where it asks for nothing."""
    needs = getattr(ELEMENT_CRITERIA[name], "needs", {"inputs"})
    batches = zip(X.split(6), Y.split(6), strict=True) if LABELS in needs else X.split(6)
    return list(batches) if needs else None


def formula(name: str) -> list[np.ndarray]:
    """The scores of both weights, by autograd on single samples and by unfolded inputs."""
    weights = [NET[0].weight, NET[3].weight]
    per_sample = []
    for x, y in zip(X, Y, strict=True):
        loss = F.cross_entropy(NET(x[None]), y[None])
        per_sample.append([g.numpy() for g in torch.autograd.grad(loss, weights)])
    hidden = F.relu(NET[0](X)).flatten(1).detach().numpy()
    patches = F.unfold(X, 3).movedim(1, 2).reshape(-1, 36).numpy()
    found = []
    for number, (weight, x) in enumerate(zip(weights, (patches, hidden), strict=True)):
        w = weight.detach().numpy()
        each = np.stack([gradients[number] for gradients in per_sample])
        g, f, gram = each.mean(0), (each**2).mean(0), x.T @ x / len(X)
        damped = gram + 1e-2 * np.trace(gram) / len(gram) * np.eye(len(gram))
        found.append(
            {
                "magnitude": lambda w=w: np.abs(w),
                "square": lambda w=w: w**2,
                "lamp": lambda w=w: np.vectorize(lambda v: v**2 / (w**2)[abs(w) >= abs(v)].sum())(
                    w
                ),
                "gradient": lambda g=g: np.abs(g),
                "taylor": lambda w=w, g=g: np.abs(g * w),
                "taylor2": lambda w=w, g=g, f=f: np.abs(f * w * w / 2 - g * w),
                "wanda": lambda w=w, gram=gram: (
                    np.abs(w) * np.sqrt(np.diag(gram)).reshape(w.shape[1:])
                ),
                "obs": lambda w=w, h=damped: w**2 / np.diag(np.linalg.inv(h)).reshape(w.shape[1:]),
            }[name]()
        )
    return found


@pytest.mark.filterwarnings("ignore:.*no weight is left:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(ELEMENT.keys() - {"random", "obd"}))
@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_smallest_by_the_formula_go(name, scope) -> None:
    budget = Budget(sparsity=0.6, scope=scope)
    sparse = rf.prune(NET, X, budget, structure="weight", criterion=name, data=data_of(name))
    scores = formula(name)
    gone = [(sparse.get_parameter(path) == 0).numpy() for path in LAYERS]
    if scope == "global" and name in ("wanda", "obs"):  # errors of outputs, of what is left of them
        power = {"wanda": 2, "obs": 1}[name]
        scores = [
            np.vectorize(lambda v, s=s: v**power / (s[s >= v] ** power).sum())(s) for s in scores
        ]
    if scope == "global":
        scores, gone = ([np.concatenate([a.ravel() for a in side])] for side in (scores, gone))
    for values, mask in zip(scores, gone, strict=True):
        assert mask.sum() == int(0.6 * mask.size + 1e-9)
        assert values[mask].max() <= values[~mask].min() * (1 + 1e-9)
    assert sparse.sparsified.fallback == {}
    assert sparse.sparsified.samples == (12 if data_of(name) else 0)


@pytest.mark.parametrize("name", ELEMENT_CRITERIA)
@pytest.mark.parametrize(("structure", "unit"), [("2:4", (1, 4)), ("1x4", (1, 4))])
def test_every_criterion_takes_every_structure(name, structure, unit) -> None:
    budget = None if structure == "2:4" else Budget(sparsity=0.5, scope="local")
    sparse = rf.prune(NET, X, budget, structure=structure, criterion=name, data=data_of(name))
    matrix = sparse[3].weight == 0
    cells = matrix.view(4, 8, 4).sum(-1)
    if structure == "2:4":
        assert (cells == 2).all()
        assert ((sparse[0].weight == 0).sum(1) == 2).all()
    else:
        assert int((cells == 4).sum()) == 16


def test_obd_takes_unlabelled_data_and_random_none() -> None:
    budget = Budget(sparsity=0.5)
    found = rf.prune(NET, X, budget, structure="weight", criterion="obd", data=[X])
    assert found.sparsified.samples == 12
    one, two = (rf.prune(NET, X, budget, structure="weight", criterion="random") for _ in range(2))
    assert torch.equal(one[0].weight, two[0].weight)


def test_the_loss_decides() -> None:
    def third(logits, targets):
        return logits[:, 2].mean()

    budget = Budget(sparsity=0.5, scope="local")
    options = {"structure": "weight", "criterion": "gradient", "data": [(X, Y)]}
    found = rf.prune(NET, X, budget, loss=third, **options)
    kept = found[3].weight != 0
    assert kept[2].sum() > 16  # no other class has a gradient
    assert not torch.equal(kept, rf.prune(NET, X, budget, **options)[3].weight != 0)
    with pytest.raises(InputError, match="no use of a loss"):
        rf.prune(NET, X, budget, structure="weight", criterion="wanda", data=[X], loss=third)


def test_movement_and_elements_of_ones_own() -> None:
    track = rf.Movement(NET)
    NET.zero_grad()
    F.cross_entropy(NET(X), Y).backward()
    track()
    budget = Budget(sparsity=0.5, scope="local")
    found = rf.prune(NET, X, budget, structure="weight", criterion=track.element)
    for layer in (0, 3):
        scores = -(NET[layer].weight.grad * NET[layer].weight)
        gone = found[layer].weight == 0
        assert scores[gone].max() <= scores[~gone].min()
    NET.zero_grad()
    own = Element(lambda path, evidence: evidence.gradients[path].abs(), frozenset({"gradients"}))
    same = [
        rf.prune(NET, X, budget, structure="weight", criterion=rule, data=[(X, Y)])
        for rule in (own, "gradient")
    ]
    assert torch.equal(same[0][0].weight, same[1][0].weight)


def test_weights_without_evidence_go_by_magnitude() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, tokens):
            return self.head(self.table(tokens).mean(1))

    net, tokens = Net(), torch.randint(10, (6, 5))
    budget = Budget(sparsity=0.5)
    found = rf.prune(net, tokens, budget, structure="weight", criterion="wanda", data=[tokens])
    assert "norms" in found.sparsified.fallback["table.weight"]
    assert set(found.sparsified.fallback) == {"table.weight"}
    assert {path: gone for path, (gone, _) in found.sparsified.zeros.items()} == {
        "table.weight": 40,
        "head.weight": 16,
    }
    gone = found.table.weight == 0
    assert net.table.weight[gone].abs().max() <= net.table.weight[~gone].abs().min()


def test_bad_evidence_is_refused() -> None:
    options = {"structure": "weight", "criterion": "taylor"}
    budget = Budget(sparsity=0.5)
    with pytest.raises(InputError, match=r"needs calibration data.*labelled"):
        rf.prune(NET, X, budget, **options)
    with pytest.raises(DataError, match="unlabelled"):
        rf.prune(NET, X, budget, data=[X], **options)
    with pytest.raises(InputError, match=r"'0\.weight'.*argument"):
        rf.prune(NET, X, budget, structure="weight", criterion=lambda group, evidence: None)


def test_names_are_looked_up_and_refused() -> None:
    assert elements.named("sparsegpt") == SparseGPT()
    assert all(elements.named(name) is rule for name, rule in ELEMENT.items())
    assert elements.named(SparseGPT(damp=0.1)) == SparseGPT(damp=0.1)
    with pytest.raises(InputError, match="sparsegpt"):
        elements.named("sparsegtp")


BAD = [
    lambda: SparseGPT(samples=0),
    lambda: SparseGPT(damp=0.0),
    lambda: SparseGPT(block=0),
]


@pytest.mark.parametrize("make", BAD)
def test_options_out_of_range_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


def test_weights_that_are_multiplied_with_zeros_alone_go_first() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(torch.zeros_like(x) * x)

    net, x = Idle().eval(), torch.randn(40, 8)
    for criterion in ("obs", "wanda"):
        sparse = rf.prune(
            net, x, Budget(sparsity=0.4), structure="weight", criterion=criterion, data=[x]
        )
        torch.testing.assert_close(sparse(x), net(x))
