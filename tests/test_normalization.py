"""Normalization over units: groups are found, statistics are taken over what remains."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rarefy as rf
from rarefy.copies import copied
from rarefy.graph.trace import trace
from rarefy.pruning.narrow import operate
from rarefy.pruning.plan import Plan
from rarefy.pruning.structure.proof import prove
from rarefy.pruning.structure.surgery import rewrite

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)
SEQUENCE = torch.randn(3, 7, 5, generator=GENERATOR)
IMAGE = torch.randn(3, 3, 8, 8, generator=GENERATOR)


class Block(nn.Module):
    """A residual block of a transformer without its attention."""

    def __init__(self, norm, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            norm(width),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """An embedding, two blocks, a last norm, a head: one width of 16 throughout."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, 16), norm(16), nn.Linear(16, 4)
        self.blocks = nn.Sequential(Block(norm, 16, 24), Block(norm, 16, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


class Weighted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))


class HandWrittenRMS(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class HandWrittenLayerNorm(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        center = x.mean(-1, keepdim=True)
        spread = (x - center).pow(2).mean(-1, keepdim=True)
        return self.weight * (x - center) / torch.sqrt(spread + 1e-6) + self.bias


class UnitLength(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.weight * 4 + self.bias


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class HandWrittenLayerNorm2d(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        center = x.mean(1, keepdim=True)
        x = (x - center) / ((x - center).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GlobalResponseNorm(Weighted):
    """Of ConvNeXt V2: the norm over space, its mean over channels."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(p=2, dim=(1, 2), keepdim=True)
        response = length / (length.mean(dim=-1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias, self.weight, x * response)


class ConvNeXt(nn.Module):
    def __init__(self, width: int, response: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.response = GlobalResponseNorm(2 * width) if response else nn.Identity()
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(self.response(F.gelu(self.up(y))))
        return x + y.permute(0, 3, 1, 2)


def convnext(response: bool, norm=LayerNorm2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2),
        norm(8),
        ConvNeXt(8, response),
        norm(8),
        nn.Conv2d(8, 12, 2, 2),
        ConvNeXt(12, response),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 4),
    )


class UNet(nn.Module):
    """A decoder that reads the encoder's features, normalized in groups of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.second, self.norm2 = nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16)
        self.up, self.norm3 = nn.ConvTranspose2d(16, 8, 2, 2), nn.GroupNorm(4, 16)
        self.third, self.out = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.first(x)))
        y = self.up(F.silu(self.norm2(self.second(x))))
        return self.out(F.silu(self.third(F.silu(self.norm3(torch.cat([y, x], 1))))))


def images(norm, other=None) -> nn.Module:
    """Two convolutions with a norm after each, and a head that keeps two dimensions."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        (other or norm)(8),
        nn.SiLU(),
        nn.Flatten(2),
        nn.Conv1d(8, 3, 1),
    )


def weighted(parametrize) -> nn.Module:
    return nn.Sequential(
        parametrize(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        parametrize(nn.Conv2d(8, 6, 3)),
        nn.ReLU(),
        nn.Flatten(2),
        parametrize(nn.Conv1d(6, 3, 1)),
    )


class Standardized(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        center = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        kernel = (self.weight - center) / (spread + 1e-5).sqrt()
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)


class StandardizedByBatchNorm(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        kernel = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)


def standardized(kind) -> nn.Module:
    return nn.Sequential(
        kind(3, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), kind(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )


def groups(number: int, affine: bool = True):
    return lambda width: nn.GroupNorm(number, width, affine=affine)


WIDTH = [16, 24, 24]
NETWORKS = {
    "layer norm": (lambda: Residual(nn.LayerNorm), WIDTH),
    "layer norm without weights": (
        lambda: Residual(lambda n: nn.LayerNorm(n, elementwise_affine=False)),
        WIDTH,
    ),
    "layer norm without bias": (lambda: Residual(lambda n: nn.LayerNorm(n, bias=False)), WIDTH),
    "RMS norm": (lambda: Residual(nn.RMSNorm), WIDTH),
    "RMS norm written by hand": (lambda: Residual(HandWrittenRMS), WIDTH),
    "layer norm written by hand": (lambda: Residual(HandWrittenLayerNorm), WIDTH),
    "unit length": (lambda: Residual(UnitLength), WIDTH),
    "ConvNeXt": (lambda: convnext(False), [8, 12, 16, 24]),
    "ConvNeXt V2": (lambda: convnext(True), [8, 12, 16, 24]),
    "ConvNeXt by hand": (lambda: convnext(True, HandWrittenLayerNorm2d), [8, 12, 16, 24]),
    "layer norm of images": (
        lambda: images(lambda n: nn.LayerNorm((n, 6, 6)), LayerNorm2d),
        [8, 8],
    ),
    "one group": (lambda: images(groups(1), groups(1, False)), [8, 8]),
    "two groups": (lambda: images(groups(2), groups(2, False)), [2, 2, 4, 4]),
    "four groups": (lambda: images(groups(4), groups(4, False)), [2, 2, 4, 4]),
    "as many groups as channels": (lambda: images(groups(8), groups(8, False)), [8, 8]),
    "instance norm": (
        lambda: images(lambda n: nn.InstanceNorm2d(n, affine=True), nn.InstanceNorm2d),
        [8, 8],
    ),
    "instance norm with statistics": (
        lambda: images(lambda n: nn.InstanceNorm2d(n, track_running_stats=True)),
        [8, 8],
    ),
    "batch norm": (
        lambda: images(nn.BatchNorm2d, lambda n: nn.BatchNorm2d(n, affine=False)),
        [8, 8],
    ),
    "batch norm without statistics": (
        lambda: images(
            lambda n: nn.BatchNorm2d(n, track_running_stats=False),
            lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False),
        ),
        [8, 8],
    ),
    "weight norm": (lambda: weighted(parametrizations.weight_norm), [6, 8]),
    "weight norm of a whole": (
        lambda: weighted(lambda m: parametrizations.weight_norm(m, dim=None)),
        [6, 8],
    ),
    "weight norm of inputs": (
        lambda: weighted(lambda m: parametrizations.weight_norm(m, dim=1)),
        [6, 8],
    ),
    "spectral norm": (lambda: weighted(parametrizations.spectral_norm), [6, 8]),
    "standardized weights": (lambda: standardized(Standardized), [6, 8]),
    "weights standardized by batch norm": (lambda: standardized(StandardizedByBatchNorm), [6, 8]),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETWORKS[name][0]().eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return net, SEQUENCE if isinstance(net, Residual) else IMAGE


def some(network, seed: int) -> Plan:
    """A part of every group, of another size and choice for each seed."""
    random = np.random.default_rng(seed)
    removed = np.zeros(network.coupling.units, bool)
    for group in network.groups:
        count = random.integers(1, max(2, len(group) // 2 + 1))
        removed[random.choice(group.units, count, replace=False)] = True
    return Plan.of(network, removed)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rewritten_graph_equals_masking(name) -> None:
    net, x = made(name)
    network = trace(net, x)
    assert not network.unknown
    assert sorted(len(group) for group in network.groups) == NETWORKS[name][1]
    for seed in range(3):
        plan = some(network, seed)
        assert prove(net, x, network, plan, lambda m, p: rewrite(m, network, p)) < 1e-7


@pytest.mark.parametrize("name", NETWORKS)
def test_the_class_is_kept_and_equals_the_graph(name) -> None:
    net, x = made(name)
    small = rf.prune(net, x, rf.Budget(sparsity=0.5), criterion="random")
    assert small.pruned.kind == "module", small.pruned.reason
    assert small.pruned.error < 1e-3
    with torch.no_grad():
        found = small(x)
        again = copy.deepcopy(small)(x)
    assert torch.equal(found, again)
    parameters = dict(net.named_parameters())
    kept = small.pruned.kept
    assert any(len(i) < parameters[p].shape[d] for (p, d), i in kept.items() if p in parameters)


@pytest.mark.parametrize("kind", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
def test_weights_that_hooks_compute_have_their_new_shape_at_once(kind) -> None:
    net = weighted(kind).eval()
    network = trace(net, IMAGE)
    assert sorted(len(group) for group in network.groups) == [6, 8]
    small = rf.prune(net, IMAGE, rf.Budget(sparsity=0.5), criterion="random")
    assert small.pruned.kind == "module"
    left = small[2].in_channels
    assert left < 8
    assert small[0].out_channels == left
    assert small[0].weight.shape == (left, 3, 3, 3)
    assert torch.equal(small(IMAGE), copied(small)(IMAGE))


def numpy_layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    center = x.mean(-1, keepdims=True)
    spread = ((x - center) ** 2).mean(-1, keepdims=True)
    return weight * (x - center) / np.sqrt(spread + 1e-5) + bias


def test_a_smaller_layer_norm_is_that_of_the_survivors_in_numpy() -> None:
    """The whole network by hand, from the entries that the result says it kept."""
    net, x = made("layer norm")
    small = rf.prune(net, x, rf.Budget(sparsity=0.4), criterion="random")
    state = {key: value.double().numpy() for key, value in net.state_dict().items()}
    for (path, dim), kept in small.pruned.kept.items():
        state[path] = state[path].take(kept, dim)

    def linear(path: str, x: np.ndarray) -> np.ndarray:
        return x @ state[f"{path}.weight"].T + state[f"{path}.bias"]

    def norm(path: str, x: np.ndarray) -> np.ndarray:
        return numpy_layer_norm(x, state[f"{path}.weight"], state[f"{path}.bias"])

    hidden = linear("embed", x.double().numpy())
    assert hidden.shape[-1] < 16
    for block in ("blocks.0", "blocks.1"):
        inner = torch.from_numpy(linear(f"{block}.up", norm(f"{block}.norm", hidden)))
        hidden = hidden + linear(f"{block}.down", F.gelu(inner).numpy())
    expected = linear("head", norm("norm", hidden).mean(1))
    with torch.no_grad():
        found = small.double()(x.double()).numpy()
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max() + 1e-12


def test_attributes_of_norms_follow() -> None:
    net, x = made("layer norm without weights")
    small = rf.prune(net, x, rf.Budget(sparsity=0.5), criterion="random")
    left = small.embed.out_features
    assert left < 16
    assert {m.normalized_shape for m in small.modules() if isinstance(m, nn.LayerNorm)} == {(left,)}
    net, x = made("two groups")
    network = trace(net, x)
    units = [u for group in network.groups if len(group) == 2 for u in group.units[:1]]
    plan = Plan.of(network, np.isin(np.arange(network.coupling.units), units))
    small = operate(net, x, network, plan)
    assert small.pruned.kind == "module"
    norms = [m for m in small.modules() if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in norms] == [(1, 4), (1, 4)]


@pytest.mark.parametrize(
    "name", ["layer norm", "layer norm without weights", "two groups", "ConvNeXt V2"]
)
def test_a_saved_result_loads_into_the_class(name, tmp_path) -> None:
    net, x = made(name)
    small = rf.prune(net, x, rf.Budget(sparsity=0.5), criterion="random")
    path = rf.save(small, tmp_path / "small.safetensors")
    again = rf.load(path, net)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


class Grouped(nn.Module):
    """A product of units and a vector, normalized in groups."""

    def __init__(self, groups: int, size: int) -> None:
        super().__init__()
        width = groups * size
        self.up, self.norm = nn.Conv1d(2, width, 1), nn.GroupNorm(groups, width)
        self.out = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.up(x)))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_whole_groups_and_positions_of_all_groups_go(groups, size, seed) -> None:
    """The survivors form a grid, and are normalized group by group, in NumPy too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, x = Grouped(groups, size).double().eval(), torch.randn(2, 2, 3, dtype=torch.float64)
        nn.init.normal_(net.norm.weight)
        nn.init.normal_(net.norm.bias)
    if groups * size == 1:
        return
    network = trace(net, x)
    random = np.random.default_rng(seed)
    removed = random.random(network.coupling.units) < 0.4
    plan = Plan.of(network, removed)
    gone = plan.gone[network.flow.labels["p_up_weight"][0]].reshape(groups, size)
    if gone.all():
        return
    rows, columns = ~gone.all(1), ~gone.all(0)
    assert (gone == ~np.outer(rows, columns)).all()

    kept = np.flatnonzero(~gone.ravel())
    value = net.up(x).detach().numpy()[:, kept].reshape(2, rows.sum(), columns.sum(), 3)
    center = value.mean((2, 3), keepdims=True)
    value = (value - center) / np.sqrt(value.var((2, 3), keepdims=True) + net.norm.eps)
    value = value.reshape(2, -1, 3) * net.norm.weight.detach().numpy()[kept, None]
    value = torch.from_numpy(value + net.norm.bias.detach().numpy()[kept, None])
    expected = F.conv1d(value, net.out.weight[:, kept], net.out.bias)
    assert torch.allclose(rewrite(net, network, plan)(x), expected, rtol=1e-9, atol=1e-12)


def test_a_norm_of_what_cannot_change_freezes_its_weights() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.groups = nn.LayerNorm(5), nn.GroupNorm(7, 7)
            self.up, self.out = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.up(self.groups(self.norm(x))))

    network = trace(Norm().eval(), SEQUENCE)
    assert [len(group) for group in network.groups] == [6]
    frozen = {f.path for f in network.frozen if f.entries == f.size}
    assert {"norm.weight", "norm.bias", "groups.weight", "groups.bias"} <= frozen
