"""Contractions: what is tied, what is frozen, and pruning equals masking."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from masking import check_masking, described, holders
from rarefy.graph.program import Node, Ref
from rarefy.graph.rules.contractions import with_argument
from rarefy.graph.trace import trace

torch.set_num_threads(1)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """``y`` and ``z`` (3, 8), parameters, a function of these, and a last layer."""

    def __init__(self, function, width: int, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.y, self.z, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(width, 2)
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(*shape)))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.function(self, self.y(x), self.z(x)))


X = numbers(3, 5)
Y, Z = "y.bias[0] y.weight[0]", "z.bias[0] z.weight[0]"

CARRIED = {
    "einsum": (
        lambda n, y, z: torch.einsum("bd,de->be", y, n.w),
        (6, {"w": (8, 6)}),
        {f"8: w[0] {Y}", "6: out.weight[1] w[1]"},
    ),
    "einsum of three": (
        lambda n, y, z: torch.einsum("bd,de,bd->be", y, n.w, z.sigmoid()),
        (6, {"w": (8, 6)}),
        {f"8: w[0] {Y} {Z}", "6: out.weight[1] w[1]"},
    ),
    "einsum without a result": (
        lambda n, y, z: torch.einsum("...i,ij", y.view(-1, 2, 4), n.w).flatten(1),
        (12, {"w": (4, 6)}),
        {f"4: w[0] {Y}", f"2: out.weight[1] {Y}", "6: out.weight[1] w[1]"},
    ),
    "einsum with an ellipsis": (
        lambda n, y, z: torch.einsum("...i, ...ij -> ...j", y.view(-1, 2, 4), n.w).flatten(1),
        (12, {"w": (2, 4, 6)}),
        {f"4: w[1] {Y}", f"2: out.weight[1] w[0] {Y}", "6: out.weight[1] w[2]"},
    ),
    "diagonal": (
        lambda n, y, z: y * torch.einsum("ii->i", n.w),
        (8, {"w": (8, 8)}),
        {f"8: out.weight[1] w[0] w[1] {Y}"},
    ),
    "trace": (
        lambda n, y, z: y * torch.einsum("ii", n.w),
        (8, {"w": (6, 6)}),
        {f"8: out.weight[1] {Y}", "6: w[0] w[1]"},
    ),
    "outer einsum": (
        lambda n, y, z: torch.einsum("bi,bj->bij", y, z).flatten(1),
        (64, {}),
        {f"8: out.weight[1] {Y}", f"8: out.weight[1] {Z}"},
    ),
    "matmul": (
        lambda n, y, z: torch.matmul(y, n.w),
        (6, {"w": (8, 6)}),
        {f"8: w[0] {Y}", "6: out.weight[1] w[1]"},
    ),
    "matmul with heads": (
        lambda n, y, z: (y.view(-1, 4, 1, 2) @ n.w).flatten(1),
        (12, {"w": (4, 2, 3)}),
        {f"4: out.weight[1] w[0] {Y}", f"2: w[1] {Y}", "3: out.weight[1] w[2]"},
    ),
    "low rank": (
        lambda n, y, z: F.linear(y, n.w + 0.5 * torch.matmul(n.a, n.b)),
        (6, {"w": (6, 8), "a": (6, 4), "b": (4, 8)}),
        {f"8: b[1] w[1] {Y}", "6: a[0] out.weight[1] w[0]", "4: a[1] b[0]"},
    ),
    "generated weights": (
        lambda n, y, z: torch.bmm((y @ n.h).view(-1, 6, 8), z[..., None]).squeeze(-1),
        (6, {"h": (8, 48)}),
        {f"8: h[0] {Y}", f"8: h[1] {Z}", "6: h[1] out.weight[1]"},
    ),
    "baddbmm": (
        lambda n, y, z: torch.baddbmm(n.b, y.view(-1, 2, 4), z.view(-1, 4, 2)).flatten(1),
        (4, {"b": (2, 1)}),
        {f"4: {Y} {Z}", f"2: b[0] out.weight[1] {Y}", f"2: out.weight[1] {Z}"},
    ),
    "addbmm": (
        lambda n, y, z: z @ torch.addbmm(n.b, n.p, n.q),
        (6, {"b": (8, 6), "p": (4, 8, 3), "q": (4, 3, 6)}),
        {f"8: b[0] p[1] {Z}", "6: b[1] out.weight[1] q[2]", "4: p[0] q[0]", "3: p[2] q[1]"},
    ),
    "addmm": (
        lambda n, y, z: torch.addmm(n.b, y, n.w),
        (6, {"b": (6,), "w": (8, 6)}),
        {f"8: w[0] {Y}", "6: b[0] out.weight[1] w[1]"},
    ),
    "addmv": (
        lambda n, y, z: y * torch.addmv(n.b, n.p, n.q),
        (8, {"b": (8,), "p": (8, 5), "q": (5,)}),
        {f"8: b[0] out.weight[1] p[0] {Y}", "5: p[1] q[0]"},
    ),
    "mv": (
        lambda n, y, z: y * torch.mv(n.p, n.q),
        (8, {"p": (8, 5), "q": (5,)}),
        {f"8: out.weight[1] p[0] {Y}", "5: p[1] q[0]"},
    ),
    "dot": (
        lambda n, y, z: y * torch.dot(n.q, n.p),
        (8, {"q": (6,), "p": (6,)}),
        {f"8: out.weight[1] {Y}", "6: p[0] q[0]"},
    ),
    "outer": (
        lambda n, y, z: y @ torch.outer(n.q, n.p),
        (6, {"q": (8,), "p": (6,)}),
        {f"8: q[0] {Y}", "6: out.weight[1] p[0]"},
    ),
    "addr": (
        lambda n, y, z: y @ torch.addr(n.w, n.a, n.b),
        (6, {"w": (8, 6), "a": (8,), "b": (6,)}),
        {f"8: a[0] w[0] {Y}", "6: b[0] out.weight[1] w[1]"},
    ),
    "inner": (
        lambda n, y, z: torch.inner(y, n.p),
        (6, {"p": (6, 8)}),
        {f"8: p[1] {Y}", "6: out.weight[1] p[0]"},
    ),
    "tensordot": (
        lambda n, y, z: torch.tensordot(y.view(-1, 2, 4), n.p, dims=([1, -1], [1, 0])),
        (6, {"p": (4, 2, 6)}),
        {f"4: p[0] {Y}", f"2: p[1] {Y}", "6: out.weight[1] p[2]"},
    ),
    "kron": (
        lambda n, y, z: y @ torch.kron(n.p, n.q),
        (6, {"p": (2, 3), "q": (4, 2)}),
        {f"4: q[0] {Y}", f"2: p[0] {Y}", "3: out.weight[1] p[1]", "2: out.weight[1] q[1]"},
    ),
    "bilinear": (
        lambda n, y, z: F.bilinear(y, z, n.w, n.b),
        (6, {"w": (6, 8, 8), "b": (6,)}),
        {f"8: w[1] {Y}", f"8: w[2] {Z}", "6: b[0] out.weight[1] w[0]"},
    ),
    "distances": (
        lambda n, y, z: torch.cdist(y, n.p),
        (6, {"p": (6, 8)}),
        {f"8: p[1] {Y}", "6: out.weight[1] p[0]"},
    ),
    "city block distances": (
        lambda n, y, z: torch.cdist(y, n.p, p=1),
        (6, {"p": (6, 8)}),
        {f"8: p[1] {Y}", "6: out.weight[1] p[0]"},
    ),
    "cosine similarity": (
        lambda n, y, z: F.cosine_similarity(y[:, None], n.p[None], dim=-1),
        (6, {"p": (6, 8)}),
        {f"8: p[1] {Y}", "6: out.weight[1] p[0]"},
    ),
    "chain": (
        lambda n, y, z: torch.linalg.multi_dot([y, n.p, n.q]),
        (6, {"p": (8, 5), "q": (5, 6)}),
        {f"8: p[0] {Y}", "5: p[1] q[0]", "6: out.weight[1] q[1]"},
    ),
    "products of rows": (
        lambda n, y, z: torch.linalg.vecdot(y.view(-1, 2, 4), z.view(-1, 2, 4), dim=1),
        (4, {}),
        {f"4: out.weight[1] {Y} {Z}", f"2: {Y} {Z}"},
    ),
    "a gate of a sum": (
        lambda n, y, z: (y * z.sigmoid()) @ n.w.exp(),
        (6, {"w": (8, 6)}),
        {f"8: w[0] {Y} {Z}", "6: out.weight[1] w[1]"},
    ),
    "spectrum of other entries": (
        lambda n, y, z: torch.view_as_real(torch.fft.rfft(y.view(-1, 4, 2))).flatten(1),
        (16, {}),
        {f"4: out.weight[1] {Y}"},
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_goes_together_and_equals_masking(name) -> None:
    function, (width, shapes), groups = CARRIED[name]
    network, _ = check_masking(Net(function, width, **shapes), X)
    assert described(network) == groups


FROZEN = {
    "products of sigmoids": lambda n, y, z: torch.einsum("bi,bi->b", y.sigmoid(), z.exp())[:, None],
    "sum of sigmoids": lambda n, y, z: torch.einsum("bi->b", y.sigmoid())[:, None],
    "distance from what is not zero": lambda n, y, z: torch.cdist(y.sigmoid(), n.w[:1]),
    "cosine with what is not zero": lambda n, y, z: F.cosine_similarity(y, z.exp())[:, None],
    "padded distance": lambda n, y, z: F.pairwise_distance(y, z, keepdim=True),
    "spectrum": lambda n, y, z: torch.fft.fft(y).abs().sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_summed_without_a_unit_freezes_it(name) -> None:
    network, _ = check_masking(Net(FROZEN[name], 1, w=(6, 8)), X)
    assert not holders(network, "y.weight", 0)
    assert any(f.path == "y.weight" and f.dim == 0 for f in network.frozen)


class WithInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 5), nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.einsum("bi,bi->b", self.first(x), x)[:, None])


def test_what_is_multiplied_with_the_input_keeps_its_size() -> None:
    network, _ = check_masking(WithInput(), X)
    assert not network.groups


def test_broadcast_factors_are_not_zero_along_what_they_repeat() -> None:
    """A row (1, 8) that vanishes says nothing about the 5 rows that it is multiplied with."""
    net = Net(lambda n, y, z: y * (n.row * n.column.sigmoid()).sum(0), 8, row=(1, 8), column=(5, 1))
    network, _ = check_masking(net, X)
    assert described(network) == {f"8: out.weight[1] row[1] {Y}"}


# --- convolutions ------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self, middle, channels: int, function=None, first: bool = True, **shapes) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3) if first else nn.Identity()
            self.out = nn.Conv2d(channels, 2, 1)
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(*shape)))
        self.middle, self.function = middle, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.middle(x) if self.function is None else self.function(self, x)
        return self.out(x)


IMAGES = numbers(2, 3, 9, 9)
FIRST, MIDDLE = "first.bias[0] first.weight[0]", "middle.bias[0] middle.weight[0]"
WIDE = {f"8: {FIRST} middle.weight[1]", f"6: {MIDDLE} out.weight[1]"}
CONVOLUTIONS = {
    "same": (lambda: nn.Conv2d(8, 6, 3, padding="same", dilation=2), 6, WIDE),
    "valid": (lambda: nn.Conv2d(8, 6, 3, padding="valid"), 6, WIDE),
    "strided, dilated": (lambda: nn.Conv2d(8, 6, 3, stride=2, dilation=2), 6, WIDE),
    "circular": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), 6, WIDE),
    "grouped": (
        lambda: nn.Conv2d(8, 12, 3, groups=4),
        12,
        {
            f"4: {FIRST} {MIDDLE} out.weight[1]",
            f"2: {FIRST} middle.weight[1]",
            f"3: {MIDDLE} out.weight[1]",
        },
    ),
    "grouped, same": (
        lambda: nn.Conv2d(8, 6, 3, groups=2, padding="same"),
        6,
        {
            f"2: {FIRST} {MIDDLE} out.weight[1]",
            f"4: {FIRST} middle.weight[1]",
            f"3: {MIDDLE} out.weight[1]",
        },
    ),
    "one filter a group": (
        lambda: nn.Conv2d(8, 4, 3, groups=4),
        4,
        {f"4: {FIRST} {MIDDLE} out.weight[1]", f"2: {FIRST} middle.weight[1]"},
    ),
    "depthwise": (
        lambda: nn.Conv2d(8, 16, 3, groups=8),
        16,
        {f"8: {FIRST} {MIDDLE} out.weight[1]"},
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1),
        6,
        {f"8: {FIRST} middle.weight[0]", "6: middle.bias[0] middle.weight[1] out.weight[1]"},
    ),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4, output_padding=1),
        12,
        {
            f"4: {FIRST} {MIDDLE} out.weight[1]",
            f"2: {FIRST} middle.weight[0]",
            "3: middle.bias[0] middle.weight[1] out.weight[1]",
        },
    ),
    "transposed, depthwise": (
        lambda: nn.ConvTranspose2d(8, 8, 3, groups=8),
        8,
        {f"8: {FIRST} {MIDDLE} out.weight[1]"},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_all_kinds_keep_the_class(name) -> None:
    make, channels, groups = CONVOLUTIONS[name]
    network, kinds = check_masking(ConvNet(make(), channels), IMAGES)
    assert described(network) == groups
    assert kinds == {"module"}


@pytest.mark.parametrize(
    ("layer", "dim"), [(nn.Conv2d, 0), (nn.ConvTranspose2d, 1)], ids=["forward", "transposed"]
)
def test_groups_of_fixed_channels_lose_the_same_filters_in_all(layer, dim) -> None:
    net = ConvNet(layer(3, 12, 3, groups=3), 12, first=False)
    network, kinds = check_masking(net, IMAGES)
    assert described(network) == {f"4: middle.bias[0] middle.weight[{dim}] out.weight[1]"}
    assert kinds == {"module"}


FUNCTIONS = {
    "convolution": (
        lambda n, x: torch.convolution(x, n.w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        6,
        {"w": (6, 8, 3, 3)},
        {f"8: {FIRST} w[1]", "6: out.weight[1] w[0]"},
    ),
    "transposed convolution": (
        lambda n, x: torch.convolution(x, n.w, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 4),
        12,
        {"w": (8, 3, 3, 3)},
        {f"4: {FIRST} out.weight[1] w[0]", f"2: {FIRST} w[0]", "3: out.weight[1] w[1]"},
    ),
    "computed weights": (
        lambda n, x: F.conv2d(x.relu(), n.w * n.w.square().add(1).rsqrt()),
        6,
        {"w": (6, 8, 3, 3)},
        {f"8: {FIRST} w[1]", "6: out.weight[1] w[0]"},
    ),
    "positive weights": (
        lambda n, x: F.conv2d(x.relu(), n.w.exp()),
        6,
        {"w": (6, 8, 3, 3)},
        {f"8: {FIRST} w[1]", "6: out.weight[1] w[0]"},
    ),
    "positive grouped weights": (
        lambda n, x: F.conv2d(x.relu(), n.w.exp(), groups=2),
        6,
        {"w": (6, 4, 3, 3)},
        {
            f"4: {FIRST} w[1]",
            f"2: {FIRST} out.weight[1] w[0]",
            "3: out.weight[1] w[0]",
        },
    ),
    "positive weights of what is not zero": (
        lambda n, x: F.conv2d(x.sigmoid(), n.w.exp()),
        6,
        {"w": (6, 8, 3, 3)},
        {"6: out.weight[1] w[0]"},
    ),
    "positive grouped weights of what is not zero": (
        lambda n, x: F.conv2d(x.sigmoid(), n.w.exp(), groups=2),
        6,
        {"w": (6, 4, 3, 3)},
        {f"2: {FIRST} out.weight[1] w[0]", "3: out.weight[1] w[0]"},
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_convolutions_with_weights_of_their_own(name) -> None:
    function, channels, shapes, groups = FUNCTIONS[name]
    network, _ = check_masking(ConvNet(None, channels, function, **shapes), IMAGES)
    assert described(network) == groups


# --- look-ups ----------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.table.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.table(indices)).relu())


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(11, 8, mode=mode), nn.Linear(8, 2)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(indices))


class OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(11, 8)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x @ self.table)


INDICES = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(0))


def test_an_embedding_shared_with_the_head_keeps_its_vocabulary() -> None:
    network, kinds = check_masking(Tied(), INDICES)
    assert described(network) == {
        "8: layer.bias[0] layer.weight[0] layer.weight[1] table.weight[1]"
    }
    assert kinds == {"module"}
    assert any(f.path == "table.weight" and f.dim == 0 for f in network.frozen)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings_shrink_in_width(mode) -> None:
    network, kinds = check_masking(Bags(mode), INDICES)
    assert described(network) == {"8: out.weight[1] table.weight[1]"}
    assert kinds == {"module"}


def test_rows_that_are_shortened_shrink_in_width() -> None:
    class Shortened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8, max_norm=1.5)
            self.out = nn.Linear(8, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(tokens).relu())

    network, kinds = check_masking(Shortened(), INDICES)
    assert described(network) == {"8: out.weight[1] table.weight[1]"}
    assert kinds == {"module"}


def test_a_one_hot_product_is_a_look_up() -> None:
    network, kinds = check_masking(OneHot(), F.one_hot(INDICES, 11).double())
    assert described(network) == {"8: out.weight[1] table[1]"}
    assert kinds == {"module"}


# --- spectra -----------------------------------------------------------------------------------


class FourierOperator(nn.Module):
    """A layer of a Fourier neural operator: complex weights on the low frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.skip, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
        self.weight = nn.Parameter(torch.randn(8, 6, 4, 4, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        spectrum = torch.fft.rfft2(x)
        low = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :4, :4], self.weight)
        pad = spectrum.shape[3] - 4, spectrum.shape[2] - 4
        whole = F.pad(low, (0, pad[0], 0, pad[1]))
        return self.out((torch.fft.irfft2(whole, s=x.shape[-2:]) + self.skip(x)).relu())


class GlobalFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.filter = nn.Parameter(torch.randn(8, 9, 5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        return self.out(torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))


class TokenMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(9, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.fft.fftn(self.first(x).flatten(1, 2), dim=1).real)


SPECTRAL = {
    FourierOperator: {
        "8: first.bias[0] first.weight[0] skip.weight[1] weight[0]",
        "6: out.weight[1] skip.bias[0] skip.weight[0] weight[1]",
    },
    GlobalFilter: {"8: filter[0] first.bias[0] first.weight[0] out.weight[1]"},
    TokenMixer: {"8: first.bias[0] first.weight[0] out.weight[1]"},
}


@pytest.mark.parametrize("kind", SPECTRAL)
def test_channels_go_whose_positions_are_transformed(kind) -> None:
    network, _ = check_masking(kind(), IMAGES)
    assert described(network) == SPECTRAL[kind]


# --- any equation ------------------------------------------------------------------------------


class Einsum(nn.Module):
    """An equation of an activation (batch first) and parameters, and a layer on its result."""

    def __init__(self, equation, sizes, shapes, functions, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(5, max(1, int(torch.tensor(sizes).prod())))
            self.given = nn.ParameterList([torch.randn(shape) for shape in shapes])
            self.out = nn.Linear(width, 2)
        self.equation, self.sizes, self.functions = equation, sizes, functions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands = [self.first(x).view(x.shape[0], *self.sizes), *self.given]
        applied = [f(v) for f, v in zip(self.functions, operands, strict=True)]
        product = torch.einsum(self.equation, *applied)
        return self.out(product.reshape(x.shape[0], -1))


SIZES = {"i": 2, "j": 3, "k": 4}
FUNCTION = st.sampled_from([torch.tanh, torch.relu, torch.sigmoid])


@st.composite
def equations(draw) -> Einsum:
    terms = draw(st.lists(st.text("ijk", max_size=3), min_size=1, max_size=3))
    known = sorted(set("".join(terms)))
    result = draw(st.permutations(known))[: draw(st.integers(0, len(known)))]
    functions = [draw(FUNCTION) for _ in terms]
    shapes = []
    for term in terms[1:]:
        alone = draw(st.sampled_from([*term, ""])) if term else ""
        shapes.append([1 if x == alone else SIZES[x] for x in term])
    sizes = [SIZES[x] for x in terms[0]]
    present = "".join(terms)
    width = 1
    for x in result:
        spans = [sizes[terms[0].index(x)]] if x in terms[0] else []
        spans += [s[t.index(x)] for t, s in zip(terms[1:], shapes, strict=True) if x in t]
        width *= max(spans)
    assert set(result) <= set(present)
    batch = draw(st.sampled_from(["b", "..."]))
    left = ",".join([batch + terms[0], *terms[1:]])
    return Einsum(f"{left}->{batch}{''.join(result)}", sizes, shapes, functions, width)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(equations())
def test_any_equation_equals_masking(net) -> None:
    check_masking(net, X, seeds=(0,))


# --- arguments ---------------------------------------------------------------------------------


def test_an_argument_is_replaced_in_its_place_or_by_name() -> None:
    node = Node("y", "aten.conv2d.default", (Ref("x"), Ref("w"), None, [1, 1], [0, 0], [1, 1], 4))
    assert with_argument(node, "groups", 2).argument("groups") == 2
    assert len(with_argument(node, "groups", 2).args) == 7
    short = Node("y", "aten.conv2d.default", (Ref("x"), Ref("w")))
    assert with_argument(short, "groups", 2).argument("groups") == 2


def test_an_operand_that_is_no_matrix_is_multiplied_by_hand() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(5, 8), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.inner(self.layer(x), self.scale).sum(1)

    network = trace(Scalar(), torch.randn(3, 5))
    assert not holders(network, "layer.weight", 0)


# --- kernels of one entry, kernels of all groups -------------------------------------------------


class Convolved(nn.Module):
    """A function of a convolution's 8 channels, and a convolution of ``width`` of these."""

    def __init__(self, function, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 2, 1)
            self.between = nn.Conv2d(32, 24, 1)
            self.shift = nn.Parameter(torch.randn(32))
            self.tokens, self.wide = nn.Conv1d(9, 9, 1), nn.Conv1d(9, 9, 3, padding=1)
        wavelet = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1.0]]
        self.register_buffer("wavelet", torch.tensor(wavelet).view(4, 1, 2, 2) / 2)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self, self.first(x)))


def filtered(net: Convolved, x: torch.Tensor, channels: int, bias=None) -> torch.Tensor:
    kernel = net.wavelet.repeat(channels, 1, 1, 1)
    return F.conv2d(x, kernel, bias, stride=2, groups=channels)


def restored(net: Convolved, x: torch.Tensor, channels: int) -> torch.Tensor:
    kernel = net.wavelet.repeat(channels, 1, 1, 1)
    return F.conv_transpose2d(x, kernel, stride=2, groups=channels)


def two_ways(net: Convolved, x: torch.Tensor) -> torch.Tensor:
    there = net.between(filtered(net, x, x.shape[1]))
    return restored(net, there, there.shape[1] // 4)


FILTERED = {
    "followed by channels": (lambda n, x: filtered(n, x, x.shape[1]), 32, {8}, {"module"}),
    "stated": (lambda n, x: filtered(n, x, 8), 32, {8}, {"graph"}),
    "shifted": (lambda n, x: filtered(n, x, x.shape[1], n.shift), 32, {8}, {"module"}),
    "there and back": (two_ways, 6, {8}, {"module"}),
    "there and back, stated": (
        lambda n, x: restored(n, n.between(filtered(n, x, 8)).relu(), 6),
        6,
        {8},
        {"graph"},
    ),
    "not zero on the way back": (
        lambda n, x: restored(n, filtered(n, x, 8).sigmoid(), 8),
        8,
        set(),
        set(),
    ),
}


@pytest.mark.parametrize(("function", "width", "sizes", "kinds"), FILTERED.values(), ids=FILTERED)
def test_a_kernel_that_all_channels_share_lets_them_go(function, width, sizes, kinds) -> None:
    network, found = check_masking(Convolved(function, width), numbers(2, 3, 6, 6))
    assert holders(network, "first.weight", 0) == sizes
    assert not holders(network, "wavelet", 0)
    assert found == kinds


def test_a_kernel_of_one_entry_leaves_positions_to_themselves_and_a_wide_one_mixes() -> None:
    def gated(net: Convolved, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2).transpose(1, 2)
        return (rows * net.tokens(rows)).transpose(1, 2).unflatten(2, (3, 3))

    def mixed(net: Convolved, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2).transpose(1, 2)
        return (rows * net.wide(rows)).transpose(1, 2).unflatten(2, (3, 3))

    x = numbers(2, 3, 3, 3)
    network, kinds = check_masking(Convolved(gated), x)
    assert (holders(network, "first.weight", 0), kinds) == ({8}, {"module"})
    assert not network.flow.over_survivors
    network = trace(Convolved(mixed).double(), x)
    assert (holders(network, "first.weight", 0), len(network.flow.over_survivors)) == ({8}, 1)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 1}, {"stride": 2, "output_padding": 1}], ids=str
)
def test_a_kernel_of_one_entry_that_strides_or_pads_freezes_positions(options) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = nn.ConvTranspose1d if "output_padding" in options else nn.Conv1d
            self.first, self.conv = nn.Linear(5, 8), kind(4, 4, 1, **options)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.first(x)).sum(-1)

    network, _ = check_masking(Strided(), numbers(2, 4, 5))
    assert not holders(network, "first.weight", 0)
