"""``prune`` from end to end: what it returns, refuses and leaves alone."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import rarefy as rf
from rarefy.batches import call, logits, map_tensors
from rarefy.errors import BudgetError, DataError, InputError, ProofError
from rarefy.graph.model import GraphModel
from rarefy.pruning.scoring.criteria import named
from rarefy.pruning.scoring.evidence import Evidence
from rarefy.types import Width

torch.set_num_threads(1)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HALF = rf.Budget(sparsity=0.5, scope="local")


class Net(nn.Module):
    def __init__(self, function=None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.b, self.o = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
        self.function = function or (lambda net, *x, **k: net.body(*x, **k))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3)))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def test_the_record_says_what_was_done() -> None:
    small = rf.prune(Net(), X, HALF)
    record = small.pruned
    assert type(small) is Net
    assert (record.kind, record.reason) == ("module", "")
    assert record.widths == (Width("a", 8, 4), Width("b", 6, 3), Width("o", 2, 2))
    assert record.error < 1e-10
    assert len(record.kept["a.weight", 0]) == 4
    assert np.array_equal(record.kept["a.weight", 0], record.kept["b.weight", 1])
    assert any(f.path == "o.weight" for f in record.frozen)
    assert not small.training


def test_the_caller_s_model_and_world_are_left_alone() -> None:
    net = Net().train()
    net.norm.eval()
    calls = []
    net.a.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()]
    random, filters = torch.get_rng_state(), list(warnings.filters)
    rf.prune(net, X, HALF, data=[X])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert warnings.filters == filters
    assert all(p.grad is None for p in net.parameters())
    assert len(net.a._forward_hooks) == 1


@pytest.mark.parametrize("criterion", ["magnitude", "l1", "random", lambda g, t: range(len(g))])
def test_criteria(criterion) -> None:
    net = Net()
    small = rf.prune(net, X, HALF, criterion=criterion)
    group = rf.trace(net, X).groups[0]
    scores = torch.as_tensor(named(criterion)(group, Evidence(dict(net.named_parameters()))))
    best = scores.argsort(stable=True)[len(group) // 2 :].sort().values
    assert small.pruned.kept["a.weight", 0].tolist() == best.tolist()


def test_options_that_do_not_concern_single_weights_are_refused() -> None:
    share = rf.Budget(sparsity=0.5)
    with pytest.raises(InputError, match="Leave data out"):
        rf.prune(Net(), X, share, structure="weight", criterion="magnitude", data=[X])
    with pytest.raises(InputError, match="no criterion of single weights"):
        rf.prune(Net(), X, share, structure="weight", criterion="l1")
    with pytest.raises(InputError, match="no criterion has that name"):
        rf.prune(Net(), X, share, criterion="sparsegpt")
    with pytest.raises(BudgetError, match="round_to"):
        rf.prune(Net(), X, rf.Budget(sparsity=0.5, round_to=8), structure="weight")


def test_the_first_examples_of_the_data_are_used() -> None:
    share = rf.Budget(sparsity=0.5)

    class Data(list):
        read = 0

        def __iter__(self):
            for batch in super().__iter__():
                self.read += 1
                yield batch

    data = Data([X] * 50)
    rf.prune(Net(), X, share, data=data, samples=2 * len(X), heal=False)
    assert data.read == 2
    for samples in (0, -1, 0.5):
        with pytest.raises(InputError, match="number of examples"):
            rf.prune(Net(), X, share, data=data, samples=samples)


def test_data_that_can_be_read_once_are_refused_before_any_work(monkeypatch) -> None:
    monkeypatch.setattr("rarefy.pruning.request.trace", None)
    with pytest.raises(DataError, match="only once"):
        rf.prune(Net(), X, HALF, data=iter([X]))


def test_a_defect_of_the_surgery_is_not_taken_for_a_forward_that_fails(monkeypatch) -> None:
    def broken(*_):
        raise KeyError("bug")

    monkeypatch.setattr("rarefy.pruning.narrow.cut", broken)
    with pytest.raises(KeyError, match="bug"):
        rf.prune(Net(), X, HALF)


def test_a_forward_with_literal_sizes_becomes_a_graph_or_an_error() -> None:
    net = Net(lambda n, x: n.b(n.a(x).view(-1, 8, 8, 8)).mean((2, 3)))
    small = rf.prune(net, X, HALF)
    assert isinstance(small, GraphModel)
    assert small.pruned.kind == "graph"
    assert "states sizes that cannot follow" in small.pruned.reason
    with pytest.raises(ProofError, match=r"keep_class.*holds all units in place"):
        rf.prune(net, X, HALF, keep_class=True)
    again = rf.prune(small, X, rf.Budget(sparsity=0.25, scope="local"))
    assert again.get_parameter("a.weight").shape[0] == 3


def test_an_assertion_about_widths_in_forward_becomes_a_graph() -> None:
    def body(net, x):
        y = net.a(x)
        assert y.shape[1] == 8
        return net.b(y).mean((2, 3))

    assert rf.prune(Net(body), X, HALF).pruned.kind == "graph"


FORMS = {
    "tensor": (None, X),
    "one example": (None, X[:1]),
    "as many examples as channels": (None, X.repeat(4, 1, 1, 1)),
    "tuple": (lambda n, x, y: n.body(x + y), (X, X)),
    "mapping": (lambda n, x, y=None: n.body(x + y), {"y": X, "x": X}),
    "number": (lambda n, x, k: n.body(x * k), (X, 2.0)),
    "list": (lambda n, xs: n.body(xs[0]) + n.body(xs[1]), ([X, X],)),
    "several outputs": (lambda n, x: (n.body(x), {"more": [n.a(x).sum()]}, 3), X),
    "complex outputs": (lambda n, x: torch.fft.fft(n.body(x)), X),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_outputs_of_every_form(form) -> None:
    function, inputs = FORMS[form]
    small = rf.prune(Net(function), inputs, HALF)
    assert small.pruned.kind == "module"
    call(small, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype) -> None:
    small = rf.prune(Net().to(dtype), X.to(dtype), HALF)
    assert small.pruned.error < 1e-10
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_frozen_parameters_are_pruned_and_stay_frozen() -> None:
    small = rf.prune(Net().requires_grad_(False), X, HALF)
    assert small.a.out_channels == 4
    assert not any(p.requires_grad for p in small.parameters())


SURVIVORS = {
    "channel mean": lambda n, x: n.a(x).mean(1),
    "channel maximum": lambda n, x: n.a(x).max(1)[0],
    "softmax": lambda n, x: n.b(n.a(x).softmax(1)).mean((2, 3)),
    "variance of all": lambda n, x: n.b(n.a(x) / (n.a(x).var(unbiased=False) + 1)).mean((2, 3)),
}


@pytest.mark.parametrize("name", SURVIVORS)
def test_statistics_are_taken_over_what_remains(name) -> None:
    """By convention: the same network written with fewer channels computes just that."""
    net = Net(SURVIVORS[name])
    small = rf.prune(net, X, HALF)
    kept = torch.from_numpy(small.pruned.kept["a.weight", 0])
    assert len(kept) == 4
    by_hand = Net(SURVIVORS[name])
    by_hand.a.weight.data, by_hand.a.bias.data = net.a.weight[kept], net.a.bias[kept]
    rows = torch.from_numpy(small.pruned.kept.get(("b.weight", 0), np.arange(6)))
    by_hand.b.weight.data = net.b.weight[rows][:, kept]
    by_hand.b.bias.data = net.b.bias[rows]
    torch.testing.assert_close(small(X), by_hand.eval()(X))


HOSTILE = {
    "cumulative sum": lambda n, x: n.a(x).cumsum(1).mean((2, 3)),
    "ratio": lambda n, x: n.b(1 / n.a(x)).mean((2, 3)),
    "logarithm": lambda n, x: n.b(n.a(x).square().log()).mean((2, 3)),
    "negative power": lambda n, x: n.b(n.a(x) ** -2).mean((2, 3)),
    "sum of sigmoids": lambda n, x: n.a(x).sigmoid().sum(1),
    "sum after a write": lambda n, x: written(n.a(x)).sum(1),
    "sum after padding": lambda n, x: nn.functional.pad(n.a(x), (1, 1), value=1.0).sum(1),
    "computed weight": lambda n, x: nn.functional.conv2d(
        n.a(x).sigmoid(), n.b.weight.sigmoid()
    ).mean((2, 3)),
    "roll": lambda n, x: n.b(n.a(x).roll(1)).mean((2, 3)),
}


def written(y: torch.Tensor) -> torch.Tensor:
    y[:, 1:] += 1
    return y


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_pruned_exactly_is_left_as_it_is(name) -> None:
    """At most the other layer is pruned, and the proof holds."""
    net = Net(HOSTILE[name])
    if not rf.trace(net, X).groups:
        with pytest.raises(InputError, match="no unit"):
            rf.prune(net, X, HALF)
        return
    small = rf.prune(net, X, HALF)
    kept = small.pruned.kept.get(("a.weight", 0), range(8))
    assert len(kept) == 8 or (name == "sum after a write" and len(kept) > 4)


def test_several_attentions_and_a_transformer() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 2)).eval()
    small = rf.prune(net, torch.randn(2, 7, 5), rf.Budget(sparsity=0.5, scope="local"))
    assert small.pruned.kind == "module"
    assert small[1].linear1.out_features == 8
    assert small[1].self_attn.num_heads == 2
    assert small[1].self_attn.embed_dim == small[0].out_features == 8


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), "holds no values"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to("meta"), "holds no values"),
        (nn.ReLU(), "no parameter"),
        (nn.Linear(3, 2), "no unit"),
    ],
    ids=["lazy", "meta", "no parameter", "no unit"],
)
def test_models_that_cannot_be_pruned_are_refused(model, words) -> None:
    with pytest.raises(InputError, match=words):
        rf.prune(model, torch.zeros(2, 3), HALF)


def test_weights_that_are_not_finite_are_named() -> None:
    net = Net()
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"b\.weight"):
        rf.prune(net, X, HALF)


def test_buffers_that_are_no_numbers_are_named() -> None:
    net = Net()
    net.norm.running_var[3] = torch.nan
    with pytest.raises(InputError, match=r"norm\.running_var.*NaN"):
        rf.prune(net, X, HALF)


def test_a_graph_does_not_have_to_fit_the_forward() -> None:
    """Where the class is given up anyway, nothing is left whole for its sake."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(14, 2)

        def forward(self, x):
            ramp = self.b(x) * torch.arange(6.0)  # stays whole in the class
            return self.c(torch.cat([self.a(x).view(-1, 8).relu(), ramp], 1))

    small = rf.prune(Mixed(), torch.randn(2, 4), HALF, criterion="random")
    assert small.pruned.kind == "graph"
    assert small.get_parameter("b.weight").shape[0] == 3
    assert not any(f.operator == "forward" for f in small.pruned.frozen)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match="holds a int"):
        rf.prune(Net(), X, HALF, exclude=[0])
    for options in ({"structure": "block"}, {"criterion": "best"}, {"exclude": ["c"]}):
        with pytest.raises(InputError, match=next(iter(options))):
            rf.prune(Net(), X, HALF, **options)
    with pytest.raises(BudgetError):
        rf.prune(Net(), X, rf.Budget(macs=0.001))


@pytest.mark.filterwarnings("ignore:.*no weight is left:RuntimeWarning")
def test_single_weights() -> None:
    sparse = rf.prune(Net(), X, rf.Budget(sparsity=0.9), structure="weight")
    assert (sparse.b.weight == 0).float().mean() > 0.7


def test_repair_follows_where_data_are_given() -> None:
    small = rf.prune(Net(), X, HALF, data=[X.repeat(4, 1, 1, 1)])
    assert small.repaired.samples == 8
    assert small.pruned.kind == "module"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "module"),
        ("mobilenet_v3_small", "module"),
        ("efficientnet_b0", "module"),
        ("shufflenet_v2_x0_5", "module"),
        ("squeezenet1_1", "module"),
        ("regnet_y_400mf", "module"),
        ("densenet121", "module"),
        ("googlenet", "module"),
    ],
)
def test_torchvision_networks(name, kind) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    net = torchvision.models.get_model(name, weights=None, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    small = rf.prune(net, x, rf.Budget(macs=0.6), criterion="random")
    assert small.pruned.kind == kind
    assert small.pruned.error < 1e-9
    assert logits(map_tensors(torch.detach, small(x))).shape == (1, 1000)


@pytest.mark.parametrize(
    "criterion", ["magnitude", "fisher", "taylor", "obd", "obs", "compensated"]
)
@pytest.mark.parametrize("made_in_it", [False, True])
def test_inference_mode_changes_nothing(criterion, made_in_it) -> None:
    data = [(torch.rand(8, 3, 8, 8), torch.arange(8) % 2)]
    options = {"criterion": criterion, "data": data}
    wanted = rf.prune(Net(), X, HALF, **options)
    with torch.inference_mode(made_in_it):
        net = Net()
    with torch.inference_mode():
        found = rf.prune(net, X, HALF, **options)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.is_inference()


class SharedSizes(nn.Module):
    """Attention whose forward holds the widths of queries and keys in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(16, 20)
        self.o = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.softmax(q @ k.mT * 24**-0.5, -1) @ v)


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        (rf.Budget(sparsity=0.5), 22),
        (rf.Budget(sparsity=0.5, layers={"q": 0.25}), 22),
        (rf.Budget(sparsity=0.0, layers={"q": 0.5}), 32),
    ],
)
def test_what_a_sparsity_takes_goes_also_where_the_class_holds_it(budget, left) -> None:
    torch.manual_seed(0)
    net = SharedSizes().eval()
    small = rf.prune(net, torch.randn(2, 5, 16), budget)
    widths = {w.layer: w.after for w in small.pruned.widths}
    assert widths["q"] == widths["k"]
    assert widths["k"] + widths["v"] == left
    assert not small.pruned.missed
