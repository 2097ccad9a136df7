"""The learned part between features of two shapes."""

import pytest
import torch

from loss_cases import pair
from rarefy.distillation.losses.projectors import Projector, counted, projector, resized
from rarefy.errors import InputError

SHAPES = [
    ((2, 5), (2, 7)),
    ((2, 4, 5), (2, 4, 7)),
    ((2, 5, 4, 4), (2, 7, 4, 4)),
    ((2, 5, 8, 8), (2, 7, 4, 4)),
    ((2, 5, 2, 3), (2, 7, 4, 5)),
    ((2, 5, 8, 2), (2, 7, 4, 4)),
    ((2, 5, 8, 8), (2, 5, 4, 4)),
]


@pytest.mark.parametrize(("student", "teacher"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projectors_lead_to_the_teachers_shape(student, teacher, dtype) -> None:
    s, t = pair(student, teacher=teacher, dtype=dtype)
    s.requires_grad_()
    made = projector("X", s, t)
    assert made is not None
    found, wanted = made(s, t.requires_grad_())
    assert found.shape == teacher
    assert not wanted.requires_grad
    found.sum().backward()
    assert s.grad is not None
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(p.dtype == kept and p.grad is not None for p in made.parameters())


def test_a_projector_maps_channels_alone() -> None:
    """Every position is mapped by the same matrix, whatever the layout."""
    for shape, wide, dim in [((2, 3, 5), (2, 3, 7), -1), ((2, 5, 3), (2, 7, 3), 1)]:
        student, teacher = pair(shape, teacher=wide)
        made = projector("X", student, teacher, dim)
        weight, bias = made.parameters()
        wanted = torch.einsum("blc,kc->blk", student.movedim(dim, -1), weight) + bias
        assert torch.allclose(made(student, teacher)[0].movedim(dim, -1), wanted)
    student, teacher = pair((2, 4, 4, 5), teacher=(2, 4, 4, 7))
    assert projector("X", student, teacher, -1)(student, teacher)[0].shape == (2, 4, 4, 7)


def test_nothing_to_bridge() -> None:
    student, teacher = pair((2, 5, 4, 4))
    assert projector("X", student, teacher) is None


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 5), (2, 4, 5)), ((2, 5, 4), (2, 6, 4)), ((2, 4, 5), (2, 5, 4, 4))],
)
def test_what_no_projector_bridges(student, teacher) -> None:
    with pytest.raises(InputError, match="no projector"):
        projector("X", torch.zeros(student), torch.zeros(teacher))


def test_what_is_no_feature() -> None:
    for bad in (torch.zeros(5), torch.zeros(1, 1, 1, 1, 1)):
        with pytest.raises(InputError, match="dimensions"):
            projector("X", bad, bad)
    with pytest.raises(InputError, match="int64"):
        projector("X", torch.zeros(2, 2).long(), torch.zeros(2, 2))
    with pytest.raises(InputError, match="tuple"):
        projector("X", (torch.zeros(2),), torch.zeros(2, 2))
    for dim in (0, 5, -4):
        with pytest.raises(InputError, match=f"dim={dim}"):
            projector("X", torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), dim)


def test_sizes_of_maps() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert resized(maps, (4, 4)) is maps
    assert resized(maps, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resized(torch.full((1, 1, 2, 2), 3.0), (5, 3)).flatten().tolist() == pytest.approx(
        [3.0] * 15
    )


def test_positions_that_do_not_count_become_0() -> None:
    feature = torch.ones(1, 2, 3).half()
    feature[0, 1] = torch.nan
    found = counted("X", feature, torch.tensor([[1, 0]]))
    assert found.dtype == torch.float32
    assert found.tolist() == [[[1, 1, 1], [0, 0, 0]]]


def test_a_projector_is_plain_data() -> None:
    made = projector("X", torch.zeros(2, 3), torch.zeros(2, 4))
    assert isinstance(made, Projector)
    assert {k: tuple(v.shape) for k, v in made.state_dict().items()} == {
        "layers.weight": (4, 3),
        "layers.bias": (4,),
    }
