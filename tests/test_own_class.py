"""BatchNorms folded on the user's own class: the same function, nothing left of them to store."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy as rf
from rarefy.errors import InputError
from rarefy.graph.capture import capture, graph_model
from rarefy.graph.model import GraphModel
from rarefy.graph.stubs import Stub
from rarefy.quantization.own_class import fold_modules
from rarefy.schemes import WeightOnly

X = torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(0))
SCHEME = WeightOnly(bits=8, method="rtn", fold=True)
UNKNOWN_WAY = "the layer before it keeps its weight or its bias in a way of its own"
NOT_ALONE = "no convolution or linear layer right before it takes it up alone"


def lively(net: nn.Module) -> nn.Module:
    """The network in eval mode, its norms with statistics and weights that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in module.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def folds(net: nn.Module, x: Tensor = X) -> tuple[nn.Module, dict[str, str]]:
    """The folded network, which computes the same, and the norms that stay."""
    net = lively(net)
    before = copy.deepcopy(net.state_dict())
    result, left = fold_modules(net, x)
    assert type(result) is type(net)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(result(x), net(x), rtol=1e-4, atol=1e-4)
    return result, dict(left)


class Residual(nn.Module):
    """A block with two norms, one of them without weights, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(y))).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Pair(nn.Module):
    """Two calls of convolutions and norms, shared or apart."""

    def __init__(self, convs: list[nn.Module], norms: list[nn.Module]) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return x


def conv(bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, bias=bias)


def tied(bias: bool) -> list[nn.Module]:
    """Two modules of which the tensors are the same."""
    first, second = conv(bias), conv(bias)
    second.weight, second.bias = first.weight, first.bias
    return [first, second]


def test_each_norm_goes_into_the_layer_before_it_and_leaves_a_stub():
    result, left = folds(Residual())
    assert not left
    assert norms(result) == 0
    assert isinstance(result.bn1, Stub)
    assert result.bn1.num_features == 4
    assert result.conv1.bias.shape == (4,)
    assert {name.partition(".")[0] for name in result.state_dict()} == {"conv1", "conv2", "head"}


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda c, n: Pair([c, c], [n, n]), {}),
        (lambda c, n: Pair([c, conv()], [n, n]), {}),
        (lambda c, n: Pair(tied(bias=True), [n, n]), {}),
        (lambda c, n: Pair([c, c], [n, nn.BatchNorm2d(4)]), {"norms.0", "norms.1"}),
        (lambda c, n: Pair(tied(bias=False), [n, n]), {"norms.0", "norms.1"}),
    ],
    ids=["both shared", "one norm", "tied tensors", "one conv", "tied weights, biases apart"],
)
def test_shared_layers_and_norms_go_together_or_stay(make, left):
    result, kept = folds(make(conv(), nn.BatchNorm2d(4)))
    assert kept == dict.fromkeys(left, NOT_ALONE)
    assert (norms(result) == 0) == (not left)
    if left:
        assert all(layer.bias is None for layer in result.convs)


class Functional(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(F.conv2d(x, self.conv.weight))
        return out


class NoBias(nn.Conv2d):
    """Has no use for a bias."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, None, self.stride, self.padding)


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (Functional, "norm"),
        (lambda: nn.Sequential(NoBias(4, 4, 3, bias=False), nn.BatchNorm2d(4)), "1"),
    ],
    ids=["called from outside", "ignores its bias"],
)
def test_a_layer_whose_forward_reads_no_bias_is_left_as_it_is(make, norm):
    result, left = folds(make())
    assert left == {norm: UNKNOWN_WAY}
    assert all(name.endswith("weight") or name.startswith(norm) for name in result.state_dict())


class Elsewhere(nn.Module):
    """Its norm's weight also scales something else; or its norm normalizes something else, too."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.again = conv(), nn.BatchNorm2d(4), again

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y + (self.norm(x) if self.again else x * self.norm.weight[:, None, None])


@pytest.mark.parametrize(
    ("again", "reason"), [(False, "its tensors are read elsewhere, too"), (True, NOT_ALONE)]
)
def test_a_norm_that_is_used_elsewhere_is_left_alone(again, reason):
    result, left = folds(Elsewhere(again))
    assert left == {"norm": reason}
    assert norms(result) == 1
    assert result.conv.bias is None


def test_a_norm_whose_module_also_activates_is_left_with_the_reason():
    timm = pytest.importorskip("timm.layers")
    result, left = folds(nn.Sequential(conv(), timm.BatchNormAct2d(4), conv(), nn.BatchNorm2d(4)))
    assert left == {"1": "its module does more than to normalize"}
    assert norms(result) == 1


class AsksForDtype(Functional):
    """Asks its norm for more than to normalize."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x.to(self.norm.weight.dtype)))
        return out


def test_a_forward_that_reads_attributes_of_a_norm_is_refused():
    with pytest.raises(
        InputError, match=r"'Stub' object has no attribute 'weight'.*Leave fold out"
    ):
        fold_modules(AsksForDtype(), X)


def test_a_norm_that_is_not_finite_is_named():
    net = Residual().eval()
    net.bn1.running_mean[1] = float("nan")
    with pytest.raises(InputError, match=r"'bn1'.*NaN"):
        fold_modules(net, X)


def test_a_captured_graph_loses_its_norms_and_stays_a_graph():
    net = lively(Residual())
    graph = graph_model(net, capture(net, X))
    result = rf.quantize(graph, [X], SCHEME)
    assert isinstance(result, GraphModel)
    assert not any("batch_norm" in node.op for node in result.graph.nodes)
    assert result.quantization.left == {}
    with torch.no_grad():
        torch.testing.assert_close(result(X), net(X), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["rtn", "gptq", "palette"])
def test_a_folded_network_comes_back_from_its_file_on_the_users_class(tmp_path, method):
    net = lively(Residual())
    small = rf.quantize(net, [X], WeightOnly(bits=8, method=method, fold=True))
    path = rf.save(small, tmp_path / "m.safetensors")
    loaded = rf.load(path, Residual())
    assert type(loaded) is Residual
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert not any(name.startswith("bn") for name in loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(X), small(X))
        torch.testing.assert_close(loaded(X), net(X), rtol=0.05, atol=0.05)
    again = rf.save(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_zeros_stay_zero():
    net = lively(Residual())
    with torch.no_grad():
        net.conv1.weight[net.conv1.weight.abs() < 0.05] = 0
    zero = net.conv1.weight == 0
    small = rf.quantize(net, [X], WeightOnly(bits=4, fold=True))
    assert 0 < int(zero.sum()) < zero.numel()
    assert bool((small.conv1.weight[zero] == 0).all())


def test_a_folded_network_trains_and_new_biases_follow_what_was_frozen():
    net = lively(Residual())
    net.conv1.weight.requires_grad_(False)
    result, _ = fold_modules(net, X)
    assert not result.conv1.bias.requires_grad
    assert result.conv2.bias.requires_grad
    with torch.no_grad():
        result.head.weight.mul_(0.5)
    student = rf.distill(net, result, [X], epochs=1, lr=0.05, loss=rf.losses.KD())
    assert torch.equal(student.conv1.bias, result.conv1.bias)
    assert not torch.equal(student.conv2.bias, result.conv2.bias)


def test_training_flags_stay_as_they_were():
    net = lively(Residual()).train()
    net.bn1.eval()
    flags = [module.training for module in net.modules()]
    fold_modules(net, X)
    assert [module.training for module in net.modules()] == flags


def test_without_an_example_folding_is_refused():
    with pytest.raises(InputError, match=r"fold=True.*calibration data"):
        rf.quantize(Residual(), None, SCHEME)
