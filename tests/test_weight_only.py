"""Networks whose weights alone are quantized: what they compute, keep, promise and refuse."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rarefy as rf
from rarefy.errors import DataError, InputError
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import plain_graph
from rarefy.grid import grids
from rarefy.pruning.repair import Repaired
from rarefy.quantization import weight_only as weight_only_module
from rarefy.quantization.affine import sqnr
from rarefy.quantization.palette import palette
from rarefy.quantization.rounding import grid_for
from rarefy.schemes import Half, WeightOnly

SCHEMES = [
    WeightOnly(method="rtn"),
    WeightOnly(method="awq", group=8),
    WeightOnly(bits=3, symmetric=False),
    WeightOnly(group=4),
    WeightOnly(method="palette"),
]


class Net(nn.Module):
    """Convolutions, plain, grouped and transposed, a norm, a table and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.stem = nn.Conv1d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.side = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, 5)."""
        x = self.norm(self.stem(self.table(tokens).transpose(1, 2))).relu()
        x = self.up((x + self.side(x)).relu())
        out: Tensor = self.head(x.mean(2))
        return out


def case(seed: int = 0) -> tuple[Net, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net()
    with torch.no_grad():
        for tensor in net.norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return net.eval(), torch.randint(11, (96, 12), generator=generator)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network trained on handwritten digits, images to solve, and others."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(5):
            for part in torch.randperm(1200).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[part]), labels[part]).backward()
                optimizer.step()
    return net.eval(), images[:400], images[1200:]


def noise(net: nn.Module, quantized: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        exact = net(x)
        return float((quantized(x) - exact).norm() / exact.norm())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_class_stays_and_nothing_of_the_users_changes(scheme) -> None:
    net, x = case()
    net.train()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    quantized = rf.quantize(net, [x], scheme)
    assert type(quantized) is Net
    assert not quantized.training
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert "quantization" not in vars(net)
    layers = {"table", "stem", "side", "up", "head"}
    assert quantized.quantization.layers.keys() == layers
    assert not quantized.quantization.left
    assert noise(net.eval(), quantized, x) < 0.5
    for path, grid in grids(quantized).items():
        assert grid.holds(quantized.get_parameter(path))
    assert (scheme.method == "palette") != bool(grids(quantized))


@pytest.mark.parametrize("scheme", SCHEMES[:1] + SCHEMES[4:], ids=str)
def test_without_data_weights_are_rounded_each_by_itself(scheme) -> None:
    net, _ = case()
    quantized = rf.quantize(net, None, scheme)
    for name, axis in (("table", 0), ("stem", 0), ("side", 0), ("up", 1), ("head", 0)):
        weight = net.get_submodule(name).weight.detach()
        expected = palette(weight, 16)
        if scheme.method == "rtn":
            expected = grid_for(weight, axis, scheme).nearest(weight)
        found = quantized.get_submodule(name).weight
        assert torch.equal(found, expected)
        assert quantized.quantization.layers[name] == pytest.approx(sqnr(weight, expected))
        assert torch.equal(quantized.norm.running_mean, net.norm.running_mean)


def test_figures_are_those_of_the_layers_outputs() -> None:
    net, x = case()
    quantized = rf.quantize(net, [x], WeightOnly(method="rtn"))
    found: dict[str, list[Tensor]] = {}
    for model in (net, quantized):
        for name in ("table", "stem", "side", "up", "head"):
            module = model.get_submodule(name)
            module.register_forward_hook(
                lambda _, __, out, name=name: found.setdefault(name, []).append(out)
            )
        with torch.no_grad():
            model(x[:8])
    for name, (exact, rounded) in found.items():
        assert quantized.quantization.layers[name] == pytest.approx(sqnr(exact, rounded), rel=1e-4)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_nearer_to_the_original_than_rounding(digits, bits, group) -> None:
    net, solved, others = digits
    rtn, gptq = (
        rf.quantize(net, [solved], WeightOnly(bits=bits, group=group, method=method))
        for method in ("rtn", "gptq")
    )
    assert noise(net, gptq, others) < 0.8 * noise(net, rtn, others)
    assert isinstance(gptq.repaired, Repaired)
    with torch.no_grad():
        same = (gptq(others).argmax(1) == net(others).argmax(1)).float().mean()
    assert bits < 4 or same > 0.97


def test_ranges_that_know_their_inputs_are_nearer_in_the_first_layer(digits) -> None:
    net, solved, others = digits
    errors = []
    for method in ("rtn", "awq"):
        quantized = rf.quantize(net, [solved], WeightOnly(bits=3, method=method))
        layer, exact = quantized[0], net[0]
        patches = nn.functional.unfold(others, 3, padding=1)
        squares = patches.square().mean((0, 2))
        gap = (layer.weight - exact.weight).detach().reshape(12, 9)
        errors.append(float((squares * gap.square()).sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("structure", ["weight", "2:4"])
@pytest.mark.parametrize("scheme", [WeightOnly(bits=3), WeightOnly(method="palette")], ids=str)
def test_what_was_pruned_stays_pruned(digits, structure, scheme) -> None:
    net, solved, others = digits
    budget = rf.Budget(sparsity=0.7) if structure == "weight" else None
    sparse = rf.prune(net, solved[:2], budget, structure=structure)
    quantized = rf.quantize(sparse, [solved], scheme)
    for path, parameter in sparse.named_parameters():
        if parameter.ndim > 1:
            assert not quantized.get_parameter(path)[parameter == 0].any()
    if structure == "2:4":
        matrix = quantized[5].weight.reshape(32, -1, 4)
        assert int((matrix != 0).sum(2).max()) <= 2
    assert quantized.sparsified == sparse.sparsified
    assert noise(sparse, quantized, others) < 0.6


def test_repair_keeps_the_grid(digits) -> None:
    net, solved, others = digits
    rtn = rf.quantize(net, [solved], WeightOnly(bits=3, method="rtn"))
    healed = rf.repair(net, rtn, [solved])
    assert noise(net, healed, others) < noise(net, rtn, others)
    for path, grid in grids(rtn).items():
        assert grid.holds(healed.get_parameter(path))


def test_captured_networks_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.inner = nn.Linear(6, 6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.head(self.inner(self.table(tokens)))
            return out

    torch.manual_seed(0)
    net, x = Tied().eval(), torch.randint(7, (40, 5))
    quantized = rf.quantize(net, [x], WeightOnly())
    assert quantized.head.weight is quantized.table.weight
    assert set(grids(quantized)) == {"table.weight", "inner.weight"}
    captured = plain_graph(net, x)
    again = rf.quantize(captured, [x], WeightOnly())
    assert isinstance(again, GraphModel)
    assert grids(again).keys() == grids(quantized).keys()
    torch.testing.assert_close(again(x), quantized(x))


def test_layers_that_are_skipped_or_unknown_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.randn(4, 3))
            self.late = nn.Parameter(torch.randn(3, 3))
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.own

    torch.manual_seed(0)
    net, x = Odd(), torch.randn(16, 4)
    quantized = rf.quantize(net, None, WeightOnly(method="rtn"))
    assert quantized.quantization.layers.keys() == {"first", "second"}
    assert quantized.quantization.left.keys() == {"own", "late"}
    seen = rf.quantize(net, [x], WeightOnly(method="rtn", skip=["first"]))
    assert seen.quantization.layers.keys() == {"own"}
    assert seen.quantization.left["first.weight"] == "it is to be skipped"
    assert grids(seen)["own"].axis == 1
    with pytest.raises(InputError, match="no module or parameter"):
        rf.quantize(net, None, WeightOnly(method="rtn", skip=["frist"]))


def test_weights_of_half_precision_are_on_their_grid_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(torch.bfloat16)
    quantized = rf.quantize(net, None, WeightOnly(method="rtn", group=4))
    assert quantized[0].weight.dtype == torch.bfloat16
    assert all(g.holds(quantized.get_parameter(path)) for path, g in grids(quantized).items())


def test_what_cannot_be_done_is_refused() -> None:
    net, _ = case()
    with pytest.raises(InputError, match="needs calibration data"):
        rf.quantize(net, None, WeightOnly())
    with pytest.raises(InputError, match="needs calibration data"):
        rf.quantize(net, None)
    with pytest.raises(DataError, match="no example"):
        rf.quantize(net, [], WeightOnly())
    with pytest.raises(InputError, match="no weight can be quantized"):
        rf.quantize(nn.ReLU(), None, WeightOnly(method="rtn"))
    quantized = rf.quantize(net, None, WeightOnly(method="rtn"))
    with pytest.raises(InputError, match="quantized already"):
        rf.quantize(quantized, None, WeightOnly(method="rtn"))
    linear = nn.Linear(2, 2)
    with pytest.raises(DataError, match="NaN"):
        rf.quantize(linear, [torch.full((4, 2), torch.nan)], WeightOnly())


@pytest.mark.parametrize("name", ["stem.weight", "head.bias"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(name: str, bad: float) -> None:
    net, _ = case()
    net.get_parameter(name).data.view(-1)[0] = bad
    for scheme in (Half(), Half("bf16"), WeightOnly(method="rtn"), WeightOnly(method="palette")):
        with pytest.raises(InputError, match=f"tensor '{name}': it is NaN or infinite"):
            rf.quantize(net, None, scheme)
    skipping = WeightOnly(method="rtn", skip=[name.partition(".")[0]])
    assert rf.quantize(net, None, skipping).quantization.layers


def test_a_parametrized_weight_is_left_with_a_remedy() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    left = rf.quantize(net, None, WeightOnly(method="rtn")).quantization.left
    assert set(left) == {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    assert all("remove_parametrizations" in reason for reason in left.values())
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    assert not rf.quantize(net, None, WeightOnly(method="rtn")).quantization.left


@pytest.mark.parametrize(("dtype", "digits_kept"), [("fp16", 11), ("bf16", 8)])
def test_half_precision(dtype: str, digits_kept: int) -> None:
    net, _ = case()
    with torch.no_grad():
        net.head.weight[0, 0] = 3.4e38 if dtype == "bf16" else 1e5
    rounded = rf.quantize(net, None, Half(dtype))
    assert type(rounded) is Net
    assert set(rounded.quantization.left) == {"head.weight"}
    assert torch.equal(rounded.head.weight, net.head.weight)
    exact, found = net.stem.weight.detach().double(), rounded.stem.weight.detach().double()
    mantissa, exponent = torch.frexp(exact)
    expected = torch.ldexp((mantissa * 2**digits_kept).round() / 2**digits_kept, exponent)
    assert torch.equal(found, expected)
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_a_pruned_network_is_solved_like_any_other(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 16, 5),
    ).eval()  # fmt: skip
    x = torch.randn(32, 3, 8, 8)
    small = rf.repair(model, rf.prune(model, x[:2], rf.Budget(macs=0.5), heal=False), [x])
    solved = rf.quantize(small, [x], rf.WeightOnly(bits=3, method=method)).quantization.rounding
    assert set(solved) == {"0", "2", "5"}
    assert all(after <= before for before, after in solved.values())
    assert sum(after < before for before, after in solved.values()) >= 2


def test_layers_that_could_not_be_solved_are_warned_of(monkeypatch):
    model, x = nn.Sequential(nn.Linear(6, 4)).eval(), torch.randn(8, 6)

    def nothing(original, pruned, *given, **named):
        pruned.repaired = Repaired({}, {"": "the networks do not run side by side"}, 0)
        return pruned

    monkeypatch.setattr(weight_only_module, "repair", nothing)
    with pytest.warns(RuntimeWarning, match="no layer was solved: the networks do not run"):
        rf.quantize(model, [x], rf.WeightOnly(bits=4))


class Reader(nn.Module):
    """A classifier of sequences, called by keyword, in which padding does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.mix = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L), (B, L) -> (B, 3)."""
        counts = attention_mask[..., None].float()
        x = self.mix(self.table(input_ids)).relu() * counts
        out: Tensor = self.head(x.sum(1) / counts.sum(1))
        return out


def read(length: int) -> dict[str, Tensor]:
    mask = torch.ones(8, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.arange(8 * length).reshape(8, length) % 11, "attention_mask": mask}


@pytest.mark.parametrize("scheme", [WeightOnly(bits=8), rf.Int8(), rf.Int8(activations="dynamic")])
def test_texts_that_were_padded_batch_by_batch_calibrate(scheme: WeightOnly | rf.Int8) -> None:
    net = Reader().eval()
    small = rf.quantize(net, [read(6), read(9), read(5)], scheme)
    with torch.no_grad():
        torch.testing.assert_close(small(**read(9)), net(**read(9)), rtol=0.05, atol=0.02)


def test_examples_of_several_sizes_without_a_mask_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    data = [torch.ones(2, 1, 8, 8), torch.ones(2, 1, 9, 9)]
    message = r"quantize\(calibration\): .*\(1, 8, 8\) and \(1, 9, 9\).*Crop or pad"
    with pytest.raises(DataError, match=message):
        rf.quantize(net, data, WeightOnly())
