"""Origins of sizes: attributes, extents and numbers, paired with the nodes of the graph."""

import math

import pytest
import torch
from torch import Tensor, nn

from rarefy.graph.capture import capture
from rarefy.pruning.prune import prune
from rarefy.pruning.structure.expressions import Apply, Attribute, Equation, Extent, Number, leaves
from rarefy.pruning.structure.provenance import equations
from rarefy.pruning.structure.sized import Sized
from rarefy.types import Budget


class Attention(nn.Module):
    """Heads by attribute; two attributes are 3, and only one of them is the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.parts, self.head_size = 3, 3, 4
        self.qkv = nn.Linear(6, 36)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, self.parts, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * self.head_size**-0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, -1))


def stated(model: nn.Module, x: Tensor) -> tuple[Equation, ...]:
    return equations(model, capture(model, x).graph, x)


def attributes(found: tuple[Equation, ...]) -> dict[str, set[object]]:
    """Attribute name -> what it is equal to, directly."""
    equal: dict[str, set[object]] = {}
    for equation in found:
        if isinstance(equation.left, Attribute):
            equal.setdefault(equation.left.name, set()).add(equation.right)
    return equal


def test_equal_numbers_are_told_apart_by_their_origin() -> None:
    found = attributes(stated(Attention(), torch.randn(2, 5, 6)))
    assert {r.dim for r in found["parts"] if isinstance(r, Extent)} == {2}
    assert {r.dim for r in found["heads"] if isinstance(r, Extent)} == {3}


def test_a_size_used_as_a_number_must_stay() -> None:
    (equation,) = [e for e in stated(Attention(), torch.randn(2, 5, 6)) if e.yields]
    assert equation == Equation(Attribute("", "head_size", None, 4), Number(4), yields=True)


def test_the_model_is_left_as_it_was() -> None:
    model = Attention().train()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    stated(model, torch.randn(2, 5, 6))
    assert model.training
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        for key, value in vars(module).items():
            assert type(value) is type(before[name][key])
    assert type(model.heads) is int
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_numbers_that_a_forward_stores_become_plain_again() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.last = 4, (0, 0)
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            self.last = (x.shape[1], self.width)
            return x.view(-1, self.width)

    model = Remembers()
    graph = capture(model, torch.randn(2, 3)).graph
    assert equations(model, graph, torch.randn(2, 3))
    assert [type(n) for n in model.last] == [int, int]


def test_arithmetic_keeps_value_and_origin() -> None:
    width = Sized.of(12, Attribute("block", "width", None, 12))
    for value, expected in (
        (width * 2, 24),
        (2 * width, 24),
        (width // 5, 2),
        (25 // width, 2),
        (width + 1, 13),
        (1 + width, 13),
        (20 - width, 8),
        (width - 20, -8),
        (width % 5, 2),
    ):
        assert isinstance(value, Sized)
        assert int(value) == expected
        assert any(isinstance(x, Attribute) for x in leaves(value.origin))
    assert (width * 2).origin == Apply("mul", width.origin, Number(2))
    assert (25 // width).origin == Apply("floordiv", Number(25), width.origin)
    assert [0] * width == [0] * 12
    assert math.sqrt(width) == math.sqrt(12)
    assert hash(width) == hash(12)
    assert width == 12
    assert width != 13
    assert {12: "a"}[width] == "a"


def test_equalities_that_the_code_tests_are_noted() -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 4
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            if x.shape[-1] != self.width:
                raise ValueError
            return x

    found = stated(Checks(), torch.randn(2, 3))
    assert any(
        isinstance(e.left, Extent) and e.right == Attribute("", "width", None, 4) for e in found
    )


@pytest.mark.parametrize(
    ("forward", "literal"),
    [
        (lambda s, x: s.layer(x).view(-1, 8), True),
        (lambda s, x: s.layer(x).view(x.shape[0], -1), False),
        (lambda s, x: s.layer(x).unflatten(1, (2, 4)).flatten(1), True),
        (lambda s, x: torch.cat(s.layer(x).split(4, 1)), True),
        (lambda s, x: torch.cat(s.layer(x).chunk(2, 1)), False),
        (lambda s, x: s.layer(x)[:, :4], True),
        (lambda s, x: s.layer(x)[:, : x.shape[1] + 1], True),
        (lambda s, x: s.layer(x) + torch.zeros(8), True),
        (lambda s, x: s.layer(x).narrow(1, 0, 3), True),
    ],
)
def test_numbers_in_the_code_are_literals(forward, literal) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    found = stated(Net(), torch.randn(2, 3))
    batch = Number(2)
    assert any(e.literal for e in found if batch not in (e.left, e.right)) == literal


def test_torch_attention_is_looked_into() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            mixed: Tensor = self.attention(x, x, x)[0]
            return mixed

    found = stated(Net(), torch.randn(3, 5, 3))
    names = {
        leaf.name
        for e in found
        for side in (e.left, e.right)
        for leaf in leaves(side)
        if isinstance(leaf, Attribute)
    }
    assert {"num_heads", "embed_dim"} <= names


def test_a_forward_that_needs_plain_numbers_gives_no_equations() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 4
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            if type(self.width) is not int:
                raise TypeError("a plain number, please")
            return self.layer(x).view(-1, self.width)

    model = Picky()
    assert stated(model, torch.randn(2, 3)) == ()
    assert type(model.width) is int


def test_modules_called_several_times_are_paired_in_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), Halves()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.second(self.first(x)))

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = 2

        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], self.parts, -1).flatten(1)

    model = Twice()
    found = attributes(stated(model, torch.randn(4, 6)))
    assert len({r.node for r in found["parts"] if isinstance(r, Extent)}) == 2


class Grouped(nn.Module):
    """Query heads share keys and values; where there is a mask, these are repeated by an attribute,
    and while the network is exported, there always is one."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.shared = 4, 3
        self.q, self.k, self.v = nn.Linear(6, 24), nn.Linear(6, 8), nn.Linear(6, 8)
        self.out = nn.Linear(24, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shape = (*x.shape[:-1], -1, self.size)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        shared = mask is None and not torch.compiler.is_exporting()
        if not shared:
            k, v = (self.repeated(part) for part in (k, v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=shared)
        return self.out(found.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        x = x[:, :, None].expand(batch, heads, self.shared, length, size)
        return x.reshape(batch, heads * self.shared, length, size)


def test_a_forward_is_read_as_it_is_called_and_as_it_is_exported() -> None:
    flags = torch.compiler.is_compiling(), torch.compiler.is_exporting()
    assert {"size", "shared"} <= attributes(stated(Grouped(), torch.randn(2, 5, 6))).keys()
    assert (torch.compiler.is_compiling(), torch.compiler.is_exporting()) == flags


@pytest.mark.parametrize("sparsity", [0.34, 0.5])
def test_attributes_follow_that_only_another_way_through_the_forward_reads(sparsity) -> None:
    torch.manual_seed(0)
    model, x = Grouped().eval(), torch.randn(2, 5, 6)
    small = prune(model, x, Budget(sparsity=sparsity, scope="local"))
    assert small.pruned.kind == "module"
    assert small.q.out_features < 24
    everything = torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(small(x, everything), small(x))
