"""Every rule carries labels exactly: removing any unit equals masking it."""

import pytest
import torch
import torch.nn.functional as F

from carrying import Net, X, check_carried
from rarefy.graph.declarations import schema
from rarefy.graph.ops import RULES, find
from rarefy.graph.program import Node, Ref
from rarefy.graph.rules import ZEROS
from rarefy.graph.rules.elementwise import POLES
from rarefy.graph.trace import trace

torch.set_num_threads(1)

CARRIED = {
    "add": (lambda n, y, z: y + z, 8),
    "add a row": (lambda n, y, z: y + n.table[0], 8),
    "multiply": (lambda n, y, z: y * z.sigmoid(), 8),
    "clamp": (lambda n, y, z: y.clamp(-1, 1), 8),
    "where": (lambda n, y, z: torch.where(y > 0, y, z), 8),
    "pointwise of three": (lambda n, y, z: torch.addcmul(y, z, z, value=0.3), 8),
    "concatenate": (lambda n, y, z: torch.cat([y, z], 1), 16),
    "concatenate with the input": (lambda n, y, z: torch.cat([y, torch.ones_like(z[:, :1])], 1), 9),
    "stack and flatten": (lambda n, y, z: torch.stack([y, z], 2).flatten(1), 16),
    "stack before": (lambda n, y, z: torch.stack([y, z], 1).flatten(1), 16),
    "split": (lambda n, y, z: y.split([3, 5], 1)[0] + z.split([5, 3], 1)[1], 3),
    "chunk": (lambda n, y, z: y.chunk(2, 1)[0] * z.chunk(2, 1)[1], 4),
    "unbind": (lambda n, y, z: sum(y.view(3, 2, 4).unbind(1)), 4),
    "slice": (lambda n, y, z: y[:, 1:6], 5),
    "one entry": (lambda n, y, z: y * z[:, 2:3], 8),
    "select": (lambda n, y, z: y * z[:, 2].unsqueeze(1), 8),
    "glu": (lambda n, y, z: F.glu(y, 1), 4),
    "transpose": (lambda n, y, z: y.t().transpose(0, 1), 8),
    "permute": (lambda n, y, z: y.view(3, 2, 4).permute(0, 2, 1).flatten(1), 8),
    "movedim": (lambda n, y, z: y.view(3, 2, 4).movedim(1, -1).flatten(1), 8),
    "mT": (lambda n, y, z: y.view(3, 2, 4).mT.flatten(1), 8),
    "swapaxes": (lambda n, y, z: y.view(3, 2, 4).swapaxes(1, 2).flatten(1), 8),
    "squeeze": (lambda n, y, z: y.unsqueeze(1).unsqueeze(-1).squeeze(), 8),
    "expand": (lambda n, y, z: y.unsqueeze(1).expand(3, 4, 8).mean(1), 8),
    "repeat": (lambda n, y, z: y.repeat(1, 3), 24),
    "outer product": (lambda n, y, z: (y.unsqueeze(1) * z.unsqueeze(2)).flatten(1), 64),
    "matrix product": (lambda n, y, z: y @ n.table, 8),
    "product over units": (lambda n, y, z: (y.unsqueeze(1) @ z.unsqueeze(2)).flatten(1), 1),
    "batched product": (lambda n, y, z: torch.bmm(y.view(3, 2, 4), z.view(3, 4, 2)).flatten(1), 4),
    "sum over units": (lambda n, y, z: y.sum(1, keepdim=True), 1),
    "sum over half": (lambda n, y, z: y.view(3, 2, 4).sum(2), 2),
    "mean over others": (lambda n, y, z: y.view(3, 8, 1).repeat(1, 1, 2).mean(2), 8),
    "softmax over others": (lambda n, y, z: y.view(3, 8, 1).repeat(1, 1, 2).softmax(2)[..., 0], 8),
    "norm over others": (lambda n, y, z: y.view(3, 8, 1).repeat(1, 1, 2).norm(dim=2), 8),
    "padding": (lambda n, y, z: F.pad(y, (1, 2)), 11),
    "like": (lambda n, y, z: torch.cat([y, torch.ones_like(z)], 1), 16),
    "type_as": (lambda n, y, z: y.type_as(z).to(y.dtype), 8),
    "images": (
        lambda n, y, z: F.max_pool2d(
            F.interpolate(y.view(3, 8, 1, 1).repeat(1, 1, 2, 2), scale_factor=2), 4
        ).flatten(1),
        8,
    ),
    "pixel shuffle": (lambda n, y, z: F.pixel_shuffle(y.view(3, 8, 1, 1), 2).flatten(1), 8),
    "pixel unshuffle": (
        lambda n, y, z: F.pixel_unshuffle(y.view(3, 8, 1, 1).repeat(1, 1, 2, 2), 2).flatten(1),
        32,
    ),
    "mean over units": (lambda n, y, z: y.mean(1, keepdim=True), 1),
    "maximum over units": (lambda n, y, z: y.amax(1, keepdim=True), 1),
    "softmax": (lambda n, y, z: y.softmax(1), 8),
    "cumulative sum": (lambda n, y, z: y.cumsum(1), 8),
    "norm": (lambda n, y, z: y / (y.norm(dim=1, keepdim=True) + 1), 8),
    "layer norm": (lambda n, y, z: F.layer_norm(y, (8,)), 8),
    "group norm": (lambda n, y, z: F.group_norm(y, 2), 8),
    "normalize": (lambda n, y, z: F.normalize(y), 8),
    "flip": (lambda n, y, z: y.flip(1), 8),
    "roll": (lambda n, y, z: y.roll(1, 1), 8),
    "every second": (lambda n, y, z: y[:, ::2], 4),
    "index": (lambda n, y, z: y[:, [3, 1]], 2),
    "negative padding": (lambda n, y, z: F.pad(y, (-1, -1)), 6),
    "prelu": (lambda n, y, z: F.prelu(y, n.table[0]), 8),
    "attention": (
        lambda n, y, z: (
            F.scaled_dot_product_attention(
                *[v.view(3, 2, 1, 4).repeat(1, 1, 2, 1) for v in (y, z, y * z)]
            )
            .transpose(1, 2)
            .flatten(2)
            .mean(1)
        ),
        8,
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_removing_equals_masking(name) -> None:
    check_carried(Net(*CARRIED[name]))


FROZEN = {
    "sum of sigmoids": (lambda n, y, z: y.sigmoid().sum(1, keepdim=True), 1),
    "product of sigmoids": (
        lambda n, y, z: (y.sigmoid().unsqueeze(1) @ z.exp().unsqueeze(2)).flatten(1),
        1,
    ),
    "roll of all": (lambda n, y, z: y.roll(1), 8),
    "sort": (lambda n, y, z: y.sort(1)[0], 8),
    "ratio": (lambda n, y, z: n.table[0] / y, 8),
    "logarithm": (lambda n, y, z: y.square().log(), 8),
    "reflection": (lambda n, y, z: torch.ops.aten.reflection_pad1d(y, [1, 2]), 11),
    "bits": (lambda n, y, z: y.view(torch.int32).to(y.dtype), 8),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_meets_along_the_units_freezes_them(name) -> None:
    network = trace(Net(*FROZEN[name]), X)
    assert not any(m.path == "y.weight" and m.dim == 0 for g in network.groups for m in g.members)
    assert any(f.path == "y.weight" and f.dim == 0 and f.entries == 8 for f in network.frozen)


def test_arguments_are_found_by_name_place_or_default() -> None:
    node = Node("y", "aten.cat.default", ([Ref("a")],), {"dim": 2})
    assert node.argument("dim") == 2
    assert Node("y", "aten.cat.default", ([Ref("a")], 1)).argument("dim") == 1
    assert Node("y", "aten.cat.default", ([Ref("a")],)).argument("dim") == 0
    assert Node("y", "aten.cat.default", ([Ref("a")],)).argument("other") is None


def test_the_kind_is_that_of_all_overloads() -> None:
    kinds = [Node("y", op).kind for op in ("aten.add_.Tensor", "operator.add", "output")]
    assert kinds == ["add_", "add", "output"]


@pytest.mark.parametrize("table", [RULES, ZEROS, POLES], ids=["rules", "zeros", "poles"])
def test_every_row_names_an_operator(table) -> None:
    library = {"transformers", "grouped_mm_fallback"}  # registered where that is imported
    names = {op.removeprefix("aten.").split(".")[0] for op in table}
    names -= {"operator", "getitem"} | library
    missing = {
        n for n in names if not hasattr(torch.ops.aten, n) and not hasattr(torch.ops.aten, f"{n}_")
    }
    assert not missing


def test_operators_are_found_by_tag_in_place_or_not_at_all() -> None:
    assert find("aten.add_.Tensor") is find("aten.mul.Tensor") is find("aten.exp.default")
    assert find("aten.dropout_.default") is find("aten.dropout.default")
    assert find("operator.mul") is find("torch.sym_float")
    assert find("aten.renorm.default") is find("torchvision.nms.default")
    assert schema("aten.renorm.default") is not None
