"""Squares of single samples' gradients against autograd, sample by sample, layer by layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.errors import InputError
from rarefy.graph.trace import trace
from rarefy.pruning.running.taps import Watched
from rarefy.pruning.scoring import samples, squaring
from rarefy.pruning.scoring.gather import gather

torch.set_num_threads(1)
SIZE = 5
Y = torch.arange(SIZE) % 3


def one_by_one(net: nn.Module, x: Tensor, y: Tensor = Y) -> dict[str, Tensor]:
    """The mean of the squares, of as many backward passes as there are samples."""
    found = {path: torch.zeros_like(p) for path, p in net.named_parameters()}
    for n in range(len(x)):
        net.zero_grad()
        F.cross_entropy(net(x[n : n + 1].clone()), y[n : n + 1]).backward()
        for path, parameter in net.named_parameters():
            if parameter.grad is not None:
                found[path] += parameter.grad.square() / len(x)
    net.zero_grad()
    return found


def together(net: nn.Module, x: Tensor, y: Tensor = Y) -> dict[str, Tensor]:
    """The same as it is gathered; a second run of the network would mean one by one."""
    network, runs, forward = trace(net, x[:2]), [], Watched.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "forward", lambda *a, **k: runs.append(0) or forward(*a, **k))
        found = gather(net, network, frozenset({"squares"}), [(x, y)]).squares
    assert len(runs) <= 3  # twice to see that the trace suits these inputs
    return dict(found)


def check(net: nn.Module, x: Tensor, y: Tensor = Y) -> None:
    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(0.5, 2)
    found, wanted = together(net, x.double(), y), one_by_one(net, x.double(), y)
    assert found.keys() >= wanted.keys()
    for path, squares in wanted.items():
        torch.testing.assert_close(found[path], squares, msg=path)
    assert any(bool(s.any()) for s in wanted.values())


class Pooled(nn.Module):
    """Layers, the mean over places, three classes."""

    def __init__(self, channels: int, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(2).mean(2))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


IMAGES = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, (3, 1), dilation=2, padding=(2, 0)),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1),
    "transposed and grouped": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
    "norm": lambda: nn.BatchNorm2d(4),
    "norm without scale": lambda: nn.BatchNorm2d(4, affine=False),
    "layer norm": lambda: nn.LayerNorm([4, 7, 7]),
    "group norm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("first", [True, False])
def test_layers_on_images(kind, first) -> None:
    layer = IMAGES[kind]()
    before = [] if first else [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    x = torch.randn(SIZE, 4, 7, 7)
    channels = layer(torch.randn(2, 4, 7, 7)).shape[1]
    check(Pooled(channels, *before, layer, nn.ReLU(inplace=True)), x)


@pytest.mark.parametrize(
    ("layer", "places"),
    [
        (nn.Conv1d(4, 6, 3, stride=2), (9,)),
        (nn.ConvTranspose1d(4, 6, 3), (9,)),
        (nn.Conv3d(4, 6, 2), (3, 4, 5)),
        (nn.ConvTranspose3d(4, 6, 2), (3, 4, 5)),
        (nn.BatchNorm1d(4), (9,)),
        (nn.BatchNorm3d(4), (3, 4, 5)),
    ],
)
def test_layers_on_sequences_and_volumes(layer, places) -> None:
    channels = layer.eval()(torch.randn(1, 4, *places)).shape[1]
    check(Pooled(channels, layer, nn.Tanh()), torch.randn(SIZE, 4, *places))


class Frames(nn.Module):
    """Every frame of a film is an example of the convolution, and of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x.flatten(0, 1))).relu().mean((2, 3))
        return self.head(y.view(-1, 3, 4)).mean(1)


class Twice(nn.Module):
    """A layer that is used twice, a weight that is two layers', a bias that is added again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.first(x).tanh()).tanh()
        return self.head(self.again(self.again(x).tanh()) + self.again.bias)


class Turned(nn.Module):
    """Weights that are not read as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.head.weight / self.head.weight.norm(dim=1, keepdim=True)
        return F.linear((x @ self.weight * self.scale).tanh(), weight, self.head.bias)


class Texts(nn.Module):
    """A transformer's layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.long()))[:, 0])


class Tokens(nn.Module):
    """Tokens, some of which repeat, one of which is padding, places, and a table that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 6, padding_idx=2), nn.Embedding(9, 6)
        self.tied, self.head = nn.Embedding(3, 6), nn.Linear(6, 3, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.long()
        places = torch.arange(x.shape[1], device=x.device)
        y = self.tokens(x) * self.tied(x % 3) + self.places(places)
        return self.head(y.tanh().mean(1))


class Constant(nn.Module):
    """A layer of what is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("start", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.key(x) * self.query(self.start))


class Last(nn.Module):
    """Channels that lie last in memory, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool, self.head = nn.LayerNorm(4), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(x).permute(0, 3, 1, 2)).flatten(1))


class Overwritten(nn.Module):
    """What a layer needs on the way back is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        y[:, 0] = 0
        return self.head(y)


def test_networks_without_a_way_back_are_refused() -> None:
    net, x = Overwritten(), torch.randn(SIZE, 6)
    with pytest.raises(InputError, match="no gradient by the network's weights: RuntimeError"):
        gather(net, trace(net, x), frozenset({"squares"}), [(x, Y)])


class Placed(nn.Module):
    """Parameters that are added, so that one tensor is the gradient of both."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = (nn.Parameter(torch.randn(1, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.token + self.place).tanh())


def test_gradients_that_share_memory_one_by_one(monkeypatch) -> None:
    monkeypatch.setattr(samples.Together, "squares", None)
    net, x = Placed().double(), torch.randn(SIZE, 6).double()
    found = gather(net, trace(net, x), frozenset({"squares"}), [(x, Y)]).squares
    for path, squares in one_by_one(net, x).items():
        torch.testing.assert_close(found[path], squares, msg=path)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Placed, (6,)),
        (Last, (5, 5, 4)),
        (Frames, (3, 2, 5, 5)),
        (Twice, (6,)),
        (Turned, (6,)),
        (Constant, (6,)),
    ],
)
def test_other_uses_of_parameters(make, shape) -> None:
    check(make(), torch.randn(SIZE, *shape))


def test_a_label_at_each_position() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(SIZE, 4, 6).double(), torch.randint(3, (SIZE, 4))
    y[2, 1] = -100
    found = gather(net, trace(net, x), frozenset({"squares"}), [(x, y)]).squares
    wanted = {path: torch.zeros_like(p) for path, p in net.named_parameters()}
    for n in range(SIZE):
        net.zero_grad()
        F.cross_entropy(net(x[n]), y[n]).backward()
        for path, parameter in net.named_parameters():
            wanted[path] += parameter.grad.square() / SIZE
    for path, squares in wanted.items():
        torch.testing.assert_close(found[path], squares, msg=path)


def test_a_transformer_on_tokens() -> None:
    check(Texts(), torch.randint(11, (SIZE, 4)))


def test_tables_of_which_samples_read_rows_several_times() -> None:
    check(Tokens(), torch.randint(4, (SIZE, 8)))


@given(part=st.integers(1, 2000), size=st.integers(2, 7))
@settings(max_examples=15, deadline=None)
def test_parts_of_any_size_give_the_same(part, size) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.ReLU(), nn.Linear(27, 3)).double()
    x, y = torch.randn(size, 2, 5, 5).double(), torch.arange(size) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squaring, "PART", part)
        patch.setattr(samples, "OWN", part)
        found = gather(net, trace(net, x), frozenset({"squares"}), [(x, y)]).squares
    for path, squares in one_by_one(net, x, y).items():
        torch.testing.assert_close(found[path], squares, msg=path)


def test_unlabelled_positions_and_samples_count_for_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(SIZE, 4).double(), Y.clone()
    y[1] = -100
    found = gather(net, trace(net, x), frozenset({"squares"}), [(x, y)]).squares
    known = [n for n in range(SIZE) if n != 1]
    for path, squares in one_by_one(net, x[known], y[known]).items():
        torch.testing.assert_close(found[path] * SIZE, squares * len(known), msg=path)


def test_nothing_that_is_watched_stays_on_the_network() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    network = trace(net, torch.zeros(2, 4))
    kept = {path: tensor.clone() for path, tensor in net.state_dict().items()}
    gather(net, network, frozenset({"squares"}), [(torch.randn(SIZE, 4), Y)])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(kept[path], tensor) for path, tensor in net.state_dict().items())
