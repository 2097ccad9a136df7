"""MACs against PyTorch's own counter, which counts two operations for each."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rarefy.graph.capture import capture, graph_model
from rarefy.graph.count import COSTS, count
from rarefy.graph.program import Node, Ref

torch.set_num_threads(1)


def reference(model: nn.Module, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() / 2 / inputs[0].shape[0]


X = torch.randn(3, 4, 9, 8)
NETWORKS = {
    "conv": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, bias=False),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
    "transposed grouped": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "linear": nn.Linear(8, 5),
    "norm and activation": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_counted_as_pytorch_counts_them(name) -> None:
    assert count(NETWORKS[name], X).macs == reference(NETWORKS[name], X)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank) -> None:
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[rank]
    x = torch.randn(2, 3, *[5] * rank)
    assert count(kind(3, 4, 3), x).macs == reference(kind(3, 4, 3), x)


class Products(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.flatten(2)
        b = torch.bmm(a, a.transpose(1, 2))
        heads = a.unflatten(1, (2, 2))
        return b @ a + nn.functional.scaled_dot_product_attention(heads, heads, heads).flatten(1, 2)


def test_products_are_counted() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert count(Products(), X).macs == reference(Products(), X)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_whole_networks(name) -> None:
    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(1, 3, 64, 64)
    cost = count(model, x)
    assert cost.macs == reference(model, x)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert sum(cost.by_layer.values()) == cost.macs
    assert not cost.uncounted


def test_the_batch_does_not_matter_and_a_graph_counts_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(252, 3))
    costs = {count(net, x).macs for x in (X, X[:1], X[:2])}
    costs.add(count(graph_model(net, capture(net, X)), X).macs)
    assert len(costs) == 1


def test_shared_parameters_count_once_and_their_macs_each_time() -> None:
    layer = nn.Linear(8, 8)
    cost = count(nn.Sequential(layer, layer), torch.randn(2, 8))
    assert cost.params == 72
    assert cost.macs == 128


class Apply(nn.Module):
    """A function of the input and of parameters of the shapes given."""

    def __init__(self, function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.held = nn.ParameterList([torch.randn(shape) for shape in shapes])
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.held)


ROWS = torch.randn(3, 8)
PRODUCTS = {
    "matmul": (lambda x, w: x @ w, [(8, 5)]),
    "broadcast matmul": (lambda x, w: x.view(3, 2, 1, 1, 4) @ w, [(5, 4, 6)]),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), [(8, 5), (5,)]),
    "baddbmm": (
        lambda x, w, b: torch.baddbmm(b, x.view(3, 2, 4), w),
        [(3, 4, 5), (3, 2, 5)],
    ),
    "inner": (lambda x, w: torch.inner(x, w), [(5, 8)]),
    "tensordot": (lambda x, w: torch.tensordot(x.view(3, 2, 4), w, ([1, 2], [1, 0])), [(4, 2, 5)]),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), [(8, 5)]),
    "einsum of three": (lambda x, w, v: torch.einsum("bi,ij,jk->bk", x, w, v), [(8, 6), (6, 5)]),
    "einsum of one": (lambda x: torch.einsum("bi->b", x), []),
    "einsum of entries": (lambda x, w: torch.einsum("bi,i->bi", x, w), [(8,)]),
    "einsum, outer": (lambda x, w: torch.einsum("bi,j->bij", x, w), [(5,)]),
    "outer": (lambda x, w: x + torch.outer(x[:, 0], w), [(8,)]),
    "chain": (lambda x, w, v: torch.linalg.multi_dot([x, w, v]), [(8, 6), (6, 5)]),
    "convolution": (
        lambda x, w: torch.convolution(x.view(3, 2, 4), w, None, [1], [0], [1], False, [0], 1),
        [(5, 2, 3)],
    ),
    "transposed convolution": (
        lambda x, w: torch.convolution(x.view(3, 2, 4), w, None, [2], [0], [1], True, [0], 1),
        [(2, 5, 3)],
    ),
    "convolution by name": (
        lambda x, w: torch.conv1d(x.view(3, 2, 4), w, padding="same"),
        [(5, 2, 3)],
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_all_kinds_are_counted_as_pytorch_counts_them(name) -> None:
    function, shapes = PRODUCTS[name]
    net = Apply(function, *shapes)
    cost = count(net, ROWS)
    assert cost.macs == reference(net, ROWS)
    assert not cost.uncounted


FORMULAS = {
    "bilinear": (nn.Bilinear(8, 8, 5), (ROWS, ROWS), 8 * 8 * 5 + 8 * 5),
    "bilinear of unequal sides": (nn.Bilinear(8, 2, 5), (ROWS, ROWS[:, :2]), 8 * 2 * 5 + 2 * 5),
    "distances": (Apply(torch.cdist, (5, 8)), (ROWS,), 5 * 8),
    "cosine similarity": (
        Apply(torch.cosine_similarity, (3, 8)),
        (ROWS,),
        8,
    ),
    "dot": (Apply(lambda x, a, b: x * torch.dot(a, b), (9,), (9,)), (ROWS,), 9 // 3),
    "matmul of vectors": (Apply(lambda x, w: x @ w, (8,)), (ROWS,), 8),
    "linear with a vector": (Apply(nn.functional.linear, (8,)), (ROWS,), 8),
    "mv": (Apply(torch.mv, (8,)), (ROWS,), 8),
    "addmv": (Apply(lambda x, w, b: torch.addmv(b, x, w), (8,), (1,)), (ROWS,), 8),
    "addbmm": (
        Apply(lambda x, w, b: torch.addbmm(b, x.view(3, 2, 4), w), (3, 4, 5), (2, 5)),
        (ROWS,),
        2 * 4 * 5,
    ),
    "grouped queries": (
        Apply(
            lambda x: torch.nn.functional.scaled_dot_product_attention(
                x.view(3, 4, 1, 2),
                x[:, :4].view(3, 2, 1, 2),
                x[:, :4].view(3, 2, 1, 2),
                enable_gqa=True,
            )
        ),
        (ROWS,),
        4 * 2 + 4 * 2,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_what_pytorch_does_not_count_is_counted_by_formula(name) -> None:
    net, inputs, macs = FORMULAS[name]
    cost = count(net, inputs)
    assert cost.macs == macs
    assert not cost.uncounted


STEPS = torch.randn(2, 5, 4)
RECURRENT = {
    "lstm": (nn.LSTM(4, 3, batch_first=True), 4 * 3 * (4 + 3)),
    "gru": (nn.GRU(4, 3, batch_first=True), 3 * 3 * (4 + 3)),
    "rnn": (nn.RNN(4, 3, batch_first=True), 3 * (4 + 3)),
    "stacked": (nn.LSTM(4, 3, 2, batch_first=True), 4 * 3 * (4 + 3) + 4 * 3 * (3 + 3)),
    "both ways": (
        nn.GRU(4, 3, 2, batch_first=True, bidirectional=True),
        2 * 3 * 3 * (4 + 3) + 2 * 3 * 3 * (6 + 3),
    ),
    "projected": (
        nn.LSTM(4, 3, batch_first=True, proj_size=2, bias=False),
        4 * 3 * (4 + 2) + 3 * 2,
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_apply_every_matrix_once_a_step(name) -> None:
    net, macs = RECURRENT[name]
    cost = count(net, STEPS)
    assert cost.macs == macs * STEPS.shape[1]
    assert not cost.uncounted


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_recurrent_cells(cell, gates) -> None:
    assert count(cell(8, 3), ROWS).macs == gates * 3 * (8 + 3)


def test_what_is_not_counted_is_named() -> None:
    cost = count(Apply(lambda x: torch.fft.rfft(x).abs() + torch.fft.rfft(2 * x).abs()), ROWS)
    assert cost.uncounted == {"fft_rfft": 2}
    assert cost.macs == 0


def test_operators_of_other_libraries_are_not_counted_silently() -> None:
    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            offset = x.new_zeros(x.shape[0], 18, 7, 6)
            return torchvision.ops.deform_conv2d(x, offset, self.weight)

    assert count(Deformable(), X).uncounted == {"deform_conv2d": 1}


def test_a_grouped_product_counts_each_row_once() -> None:
    def node(*shapes: tuple[int, ...]) -> tuple[Node, dict[str, tuple[int, ...]]]:
        return Node("y", "aten._grouped_mm.default", (Ref("a"), Ref("b"))), dict(
            zip("aby", shapes, strict=True)
        )

    for shapes, macs in (
        (((7, 4), (3, 4, 5), (7, 5)), 7 * 4 * 5),
        (((3, 2, 4), (3, 4, 5), (3, 2, 5)), 3 * 2 * 4 * 5),
        (((4, 7), (7, 5), (3, 4, 5)), 4 * 7 * 5),
    ):
        call, known = node(*shapes)
        assert COSTS["_grouped_mm"](call, known.__getitem__) == macs
