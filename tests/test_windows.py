"""Windows along units: local response normalization and its like, over the units that remain."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rarefy as rf
from rarefy.graph.count import count
from rarefy.graph.rules.windows import Window

torch.set_num_threads(1)


# --- where units keep their places -----------------------------------------------------------


@given(st.integers(1, 7), st.integers(0, 3), st.integers(0, 4), st.integers(0, 4), st.data())
def test_every_unit_keeps_a_place_among_those_that_remain(size, padding, before, after, data):
    units = np.arange(1, 9)
    window = Window(size, 1, 1, padding)
    found = window.slid_over(np.concatenate([np.zeros(before, int), units, np.zeros(after, int)]))
    length = before + 8 + after + 2 * padding - size + 1
    if found is None:  # windows of other units than those that are there, or fewer
        assert not 8 <= length <= before + 8 + after
        return
    assert len(found) == length
    kept = [int(u) for u in found if u]
    assert kept == list(units)
    gone = data.draw(st.sets(st.sampled_from(kept), max_size=7))
    assert len(found) - len(gone) == before + 8 - len(gone) + after + 2 * padding - size + 1


@pytest.mark.parametrize("size", [3, 4])
def test_padding_beside_fixed_entries_leaves_units_in_the_middle(size) -> None:
    atoms = np.array([0, 0, 0, 0, 5, 6, 0, 0, 0])
    found = Window(size, 1, 1, 0).slid_over(atoms)
    first = size // 2
    assert found is not None
    assert (found == atoms[first : first + len(atoms) - size + 1]).all()


@pytest.mark.parametrize("window", [Window(3, 2, 1, 1), Window(3, 1, 2, 2), Window(1, 1, 1, 1)])
def test_other_windows_have_no_middle(window) -> None:
    assert window.slid_over(np.arange(1, 9)) is None


# --- local response normalization ------------------------------------------------------------


def response(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """``x / (k + alpha / size * sum of squares of neighbors) ** beta``, channel by channel."""
    channels = []
    for c in range(x.shape[1]):
        near = x[:, max(c - size // 2, 0) : c + (size - 1) // 2 + 1]
        channels.append(x[:, c] / (k + alpha / size * near.square().sum(1)) ** beta)
    return torch.stack(channels, 1)


class Normalized(nn.Module):
    """A convolution, local response normalization, another convolution."""

    def __init__(self, rank: int, norm: nn.Module) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.first, self.norm, self.last = conv(3, 12, 1), norm, conv(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).relu()))


@pytest.mark.parametrize(("rank", "size"), [(1, 2), (1, 5), (2, 3), (2, 4), (3, 2), (3, 5)])
def test_pruned_is_the_response_among_survivors(rank, size) -> None:
    torch.manual_seed(0)
    net = Normalized(rank, nn.LocalResponseNorm(size, 0.7, 0.6, 1.5))
    x = torch.randn(3, 3, *(4, 3, 2)[:rank])
    small = rf.prune(net, x, rf.Budget(sparsity=0.4), criterion="random")
    assert small.pruned.kind == "module"
    kept = small.pruned.kept["first.weight", 0]
    assert 4 < len(kept) < 12
    with torch.no_grad():
        expected = net.last.weight[:, kept].flatten(1) @ response(
            net.first(x).relu()[:, kept], size, 0.7, 0.6, 1.5
        ).flatten(2) + net.last.bias.unsqueeze(-1)
        torch.testing.assert_close(small(x).flatten(2), expected, rtol=1e-5, atol=1e-5)


class ByHand(nn.Module):
    """The layer as GoogLeNet's and AlexNet's ports have it: a pooling with padding of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.average = nn.AvgPool3d((size, 1, 1), 1, ((size - 1) // 2, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        around = self.average(x.pow(2).unsqueeze(1)).squeeze(1)
        return x / around.mul(0.5).add(1.0).pow(0.75)


class Convolved(nn.Module):
    """The sum of squares as a convolution along the channels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(1, 1, size, 1, 1) / size)

    def forward(self, x: Tensor) -> Tensor:
        around = F.conv3d(x.square().unsqueeze(1), self.ones, padding=(2, 0, 0))
        return x * (1 + 0.5 * around.squeeze(1)) ** -0.75


@pytest.mark.parametrize("layer", [ByHand, Convolved])
def test_the_layer_written_by_hand(layer) -> None:
    torch.manual_seed(0)
    net, x = Normalized(2, layer(5)), torch.randn(3, 3, 4, 5)
    small = rf.prune(net, x, rf.Budget(sparsity=0.4), criterion="random")
    assert small.pruned.kind == "module"
    kept = small.pruned.kept["first.weight", 0]
    with torch.no_grad():
        expected = net.last.weight[:, kept].flatten(1) @ response(
            net.first(x).relu()[:, kept], 5, 0.5, 0.75, 1
        ).flatten(2) + net.last.bias.unsqueeze(-1)
        torch.testing.assert_close(small(x).flatten(2), expected, rtol=1e-5, atol=1e-5)


def test_a_response_without_an_offset_stays() -> None:
    net = Normalized(2, nn.LocalResponseNorm(3, k=0.0))
    frozen = {(f.path, f.dim): f for f in rf.trace(net, torch.randn(2, 3, 4, 4)).frozen}
    assert "infinite" in frozen["first.weight", 0].reason


class AlexNet(nn.Module):
    """The network of 2012 in small: two groups, responses, overlapping pooling."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), norm, nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 24, 5, padding=2, groups=2), nn.ReLU(), norm, nn.MaxPool2d(3, 2),
            nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Dropout(), nn.Linear(32 * 9, 40), nn.ReLU(), nn.Linear(40, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


@pytest.fixture(scope="module")
def alexnet() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = AlexNet(), torch.randn(3, 3, 32, 32)
    return net, rf.prune(net, x, rf.Budget(macs=0.5)), x


def test_an_old_network_keeps_its_class_and_loses_half(alexnet) -> None:
    net, small, x = alexnet
    assert small.pruned.kind == "module"
    assert small.pruned.error < 1e-7
    assert count(small, x).macs <= 0.5 * count(net, x).macs
    assert not any("pooled over" in f.reason for f in small.pruned.frozen)
    assert small.features[0].out_channels < 16


def test_an_old_network_trains_and_comes_back_from_its_file(alexnet, tmp_path) -> None:
    _, small, x = alexnet
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    small.eval()
    rf.save(small, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", AlexNet())
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


@pytest.mark.slow
def test_an_old_network_is_exported(alexnet, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    _, small, x = alexnet
    rf.export(small, tmp_path / "small.onnx", x)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, small(x).numpy(), rtol=1e-4, atol=1e-5)


# --- efficient channel attention -------------------------------------------------------------


class Weighed(nn.Module):
    """Channels weighed by a convolution along them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.along = nn.Conv1d(1, 1, 5, padding="same", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        weights = self.along(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return self.last(x * weights.transpose(1, 2).unsqueeze(-1))


def test_channels_are_weighed_by_neighbors_that_remain() -> None:
    torch.manual_seed(0)
    net, x = Weighed(), torch.randn(3, 3, 6, 6)
    small = rf.prune(net, x, rf.Budget(sparsity=0.4), criterion="random")
    assert small.pruned.kind == "module"
    kept = small.pruned.kept["first.weight", 0]
    with torch.no_grad():
        maps = net.first(x).relu()[:, kept]
        padded = F.pad(maps.mean((2, 3)), (2, 2))
        kernel = net.along.weight.ravel()
        weights = torch.stack([padded[:, i : i + 5] @ kernel for i in range(len(kept))], 1)
        expected = net.last.weight[:, kept, 0, 0] @ (
            maps * weights.sigmoid()[:, :, None, None]
        ).flatten(2) + net.last.bias.unsqueeze(-1)
        torch.testing.assert_close(small(x).flatten(2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "along", [nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3, 2, 1), nn.ConvTranspose1d(1, 1, 3, 1, 1)]
)
def test_a_kernel_without_a_middle_holds_its_units(along) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.along = nn.Linear(3, 12), along
            self.last = nn.Linear(along(torch.zeros(1, 1, 12)).shape[-1], 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.along(self.first(x).unsqueeze(1)).squeeze(1))

    frozen = {(f.path, f.dim): f for f in rf.trace(Net(), torch.randn(4, 3)).frozen}
    assert frozen["first.weight", 0].entries == 12
    assert "slides along" in frozen["first.weight", 0].reason
