"""Which branches of a network can be bypassed, and why others cannot."""

import pytest
import torch
from torch import Tensor, nn

from rarefy.graph.blocks import find_blocks
from rarefy.graph.capture import capture
from rarefy.graph.count import count
from rarefy.graph.trace import trace
from residual_networks import KINDS, Residual, inputs

torch.set_num_threads(1)
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
            self.norm = nn.LayerNorm(6)
            self.scale = nn.Parameter(torch.full((6,), 0.5))
            self.register_buffer("calls", torch.zeros(6))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def found(body):
    model = Own(body)
    return find_blocks(capture(model, X).graph, dict(model.named_parameters()))


def names(body) -> list[str]:
    return [block.name for block in found(body).blocks]


def reasons(body) -> list[str]:
    depth = found(body)
    assert not depth.blocks
    return [joint.reason for joint in depth.joints]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_block_is_found_with_all_that_it_needs(kind) -> None:
    model = Residual((kind,))
    network = trace(model, inputs())
    (block,) = network.blocks
    kept = {"norm.weight", "norm.bias"} if kind == "PostNorm" else set()
    own = {f"blocks.0.{path}" for path, _ in model.blocks[0].named_parameters() if path not in kept}
    assert own <= set(block.tensors)
    assert block.params == sum(model.get_parameter(path).numel() for path in own)
    whole = count(model, inputs())
    rest = sum(n for path, n in whole.by_layer.items() if not path.startswith("blocks"))
    assert block.macs == whole.macs - rest
    assert block.macs_share == pytest.approx(block.macs / whole.macs)
    assert not network.joints
    assert block.name.startswith("blocks.0")


def test_two_branches_in_one_forward_are_two_blocks() -> None:
    def transformer(m, x):
        x = x + m.a(m.norm(x))
        return m.c(x + torch.relu(m.b(x)))

    assert names(transformer) == ["a", "b"]


def test_what_parallel_branches_share_stays() -> None:
    def parallel(m, x):
        h = m.norm(x)
        return x + m.a(h) + m.b(h)

    first, second = found(parallel).blocks
    assert (first.tensors, second.tensors) == (("a.weight", "a.bias"), ("b.weight", "b.bias"))


def test_a_sum_of_branches_is_one_block() -> None:
    (block,) = found(lambda m, x: x + (m.a(x) + m.b(x))).blocks
    assert set(block.tensors) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_a_block_within_a_block() -> None:
    def nested(m, x):
        y = m.a(x)
        return x + m.b(y + m.c(y))

    inner, outer = found(nested).blocks
    assert set(inner.nodes) < set(outer.nodes)
    assert inner.tensors == ("c.weight", "c.bias")


def test_scales_casts_and_dropout_on_the_way() -> None:
    def scaled(m, x):
        y = m.a(x).to(torch.float32)
        x = x.to(torch.float32)
        return x + nn.functional.dropout(0.5 * (m.scale * y), training=m.training)

    (block,) = found(scaled).blocks
    assert "scale" in block.tensors
    assert found(scaled).blocks[0].trunk == "x"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.a(x) + m.b(x), "its shortcut is no identity: linear in"),
        (lambda m, x: torch.relu(x) + m.b(x), "its shortcut is no identity: relu in forward"),
        (lambda m, x: torch.cat([x, m.a(x)], -1), "concatenated"),
        (lambda m, x: x * torch.sigmoid(m.a(x)), "multiplied"),
        (lambda m, x: x + m.a(x).mean(1, keepdim=True) * x[:, :1], ""),
        (lambda m, x: x[:, :1] + m.a(x), ""),
    ],
)
def test_what_is_no_block(body, reason) -> None:
    if not reason:
        depth = found(body)
        for block in depth.blocks:  # it may broadcast its branch, but never its trunk
            graph = capture(Own(body), X).graph
            assert graph.by_name[block.trunk].value == graph.by_name[block.add].value
        return
    assert reason in reasons(body)[0]


def test_the_shortcut_that_is_named_is_the_short_one() -> None:
    (reason,) = reasons(lambda m, x: m.c(torch.relu(m.b(x))) + m.a(x))
    assert reason.endswith("linear in a")


def test_a_trunk_that_is_subtracted_or_scaled_is_none() -> None:
    assert not found(lambda m, x: m.a(x) - x).blocks
    assert not found(lambda m, x: torch.add(m.a(x), x, alpha=2)).blocks
    assert len(found(lambda m, x: torch.add(x, m.a(x), alpha=2)).blocks) == 1


def test_a_branch_that_is_read_elsewhere_is_none() -> None:
    def read_twice(m, x):
        y = m.a(x)
        return m.b(x + y) * y

    assert not found(read_twice).blocks


def test_an_output_of_the_network_is_not_in_a_block() -> None:
    model = Own(lambda m, x: (x + m.b(h := m.a(x)), h))
    (block,) = trace(model, X).blocks
    assert block.tensors == ("b.weight", "b.bias")


def test_sums_that_save_nothing_are_none() -> None:
    assert names(lambda m, x: m.a(x + 0.1 * x**3)) == []
    assert names(lambda m, x: m.a(x + m.calls)) == []


def test_a_branch_that_changes_a_buffer_is_none() -> None:
    def counting(m, x):
        y = m.a(x)
        m.calls.add_(y.sum((0, 1)))
        return x + m.b(y)

    assert [block.tensors for block in found(counting).blocks] == [("b.weight", "b.bias")]


def test_scratch_that_a_branch_writes_into_goes_with_it() -> None:
    def scratch(m, x):
        y = torch.zeros_like(x)
        y[:, 1:] = m.a(x)[:, 1:]
        return m.c(x + m.b(y))

    (block,) = found(scratch).blocks
    assert set(block.tensors) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_shared_parameters_are_named() -> None:
    first, second = found(lambda m, x: (y := x + m.a(x)) + m.a(y)).blocks
    assert first.shared == second.shared == ("a.weight", "a.bias")
    assert first.params == 0
    assert first.name != second.name


def test_the_table_shows_blocks_and_why_others_are_none() -> None:
    model = Own(lambda m, x: m.c((y := x + m.a(x)) * torch.sigmoid(m.b(y))))
    text = str(trace(model, X))
    assert "block" in text
    assert "paths that cannot be bypassed" in text
    assert "multiplied" in text
    assert "33.3%" in text
