"""Pairing of features: evenly by layer, by size of maps, and pure."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rarefy.copies import fingerprint
from rarefy.distillation.pairing import Output, _evenly, outputs, pairs, stages
from rarefy.errors import InputError
from rarefy.graph.capture import capture, graph_model

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(outside, outside, 1))
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inside == outside
        self.down = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out * self.gate(out).sigmoid()
        out += self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, depth: int = 1, width: int = 4, strides=(1, 2, 2)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        layers, inside = [], width
        for stage, stride in enumerate(strides):
            outside = width * 2**stage
            blocks = [Block(inside if i == 0 else outside, outside, stride if i == 0 else 1)
                      for i in range(depth)]  # fmt: skip
            layers.append(nn.Sequential(*blocks))
            inside = outside
        self.layers, self.pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inside, 5)

    def forward(self, x):
        return self.fc(self.pool(self.layers(self.stem(x))).flatten(1))


class Text(nn.Module):
    def __init__(self, layers: int, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
        self.encoder = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.encoder:
            x = layer(x)
        return self.head(x)


IMAGES = torch.randn(2, 3, 16, 16)
IDS = torch.zeros(2, 5, dtype=torch.long)


def named(found):
    return [(pair.student, pair.teacher) for pair in found]


def test_stages_of_convolutional_networks() -> None:
    found = pairs(ResNet(1, 4), ResNet(3, 8), IMAGES)
    # The container gives the very tensor of its last stage, and is done after it.
    assert named(found) == [
        ("layers.0", "layers.0"), ("layers.1", "layers.1"), ("layers", "layers"),
    ]  # fmt: skip
    assert found[1].student_shape == (2, 8, 8, 8)
    assert found[1].teacher_shape == (2, 16, 8, 8)


def test_stages_of_equal_size_are_paired_where_the_numbers_differ() -> None:
    found = pairs(ResNet(1, 4, (1, 2)), ResNet(1, 4, (1, 2, 2)), IMAGES)
    assert named(found) == [("layers.0", "layers.0"), ("layers", "layers.1")]
    assert all(p.student_shape[2:] == p.teacher_shape[2:] for p in found)


def test_stages_of_other_sizes_go_together_by_position() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    teacher = nn.Sequential(nn.Conv2d(3, 4, 4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2, 2))
    assert named(pairs(student, teacher, torch.randn(1, 3, 9, 9))) == [("0", "0"), ("1", "2")]


def test_layers_of_transformers_go_together_evenly() -> None:
    assert named(pairs(Text(2), Text(6), IDS)) == [("encoder.0", "encoder.2"),
                                                   ("encoder.1", "encoder.5")]  # fmt: skip
    assert named(pairs(Text(1), Text(4), IDS)) == [("encoder.0", "encoder.3")]
    assert named(pairs(Text(4), Text(2), IDS)) == [("encoder.1", "encoder.0"),
                                                   ("encoder.3", "encoder.1")]  # fmt: skip


@given(st.integers(1, 40), st.integers(1, 40))
def test_even_pairs_rise_and_end_together(n, m) -> None:
    sides = [[Output(str(i), (1,), None, True) for i in range(count)] for count in (n, m)]
    found = [(int(p.student), int(p.teacher)) for p in _evenly(*sides)]
    assert len(found) == min(n, m)
    assert found[-1] == (n - 1, m - 1)
    for before, after in itertools.pairwise(found):
        assert before[0] < after[0]
        assert before[1] < after[1]
    if m % n == 0:  # TinyBERT's uniform map: layer i of the student and layer i m / n
        assert [t + 1 for _, t in found] == [(s + 1) * m // n for s, _ in found]


def test_networks_are_left_as_they_were() -> None:
    student, teacher = ResNet().train(), ResNet(2).train()
    kept = fingerprint(student), fingerprint(teacher)
    state = torch.get_rng_state()
    pairs(student, teacher, IMAGES)
    assert (fingerprint(student), fingerprint(teacher)) == kept
    assert all(m.training for net in (student, teacher) for m in net.modules())
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_pairs_with_a_network() -> None:
    net = ResNet().eval()
    graph = graph_model(net, capture(net, IMAGES))
    found = pairs(graph, ResNet(2), IMAGES)
    assert [p.teacher for p in found] == ["layers.0", "layers.1", "layers"]
    assert [p.student_shape for p in found] == [o.shape for o in stages(outputs(net, IMAGES))]


def test_what_is_overwritten_or_shared_is_no_feature() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 3, 3), act, nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True), act)
    assert [o.path for o in outputs(net, IMAGES)] == ["0", "3"]


def test_networks_of_other_kinds() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="Name the features"):
        pairs(flat, ResNet(), IMAGES)
