"""Files of networks whose weights lie on grids: small, exact, and read with care."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy as rf
from forging import rewritten, state
from rarefy.errors import FormatError
from rarefy.grid import Grid, grids, put_grids
from rarefy.schemes import WeightOnly
from rarefy.storage.contents import inspect
from rarefy.storage.format import load, load_tensor, save


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(160, 33))
    return net.to(dtype).eval()


def rounded(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return rf.quantize(network(dtype), None, WeightOnly(method="rtn", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (4, 7), (4, None), (5, 32), (8, 1000)])
def test_a_loaded_network_is_the_same_to_the_bit(tmp_path, dtype, symmetric, bits, group) -> None:
    net = rounded(dtype, bits=bits, group=group, symmetric=symmetric)
    path = save(net, tmp_path / "a")
    loaded = load(path, network(dtype))
    assert state(loaded) == state(net)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(loaded(x), net(x))
    weights = [e for e in inspect(path).tensors if e.path in ("0.weight", "3.weight")]
    assert all(e.encoding.startswith("int4+" if bits <= 4 else "int8+") for e in weights)
    assert sum(e.bits_per_weight <= (4 if bits <= 4 else 8) for e in weights) == 2
    assert save(loaded, tmp_path / "b").read_bytes() == path.read_bytes()
    assert torch.equal(load_tensor(path, "3.weight"), net[3].weight)
    assert grids(loaded).keys() == grids(net).keys()


def test_four_bits_take_an_eighth(tmp_path: Path) -> None:
    layer = nn.Linear(512, 512, bias=False)
    whole = 4 * layer.weight.numel()
    for group, bits in ((None, 4.2), (32, 4.7)):
        net = rf.quantize(layer, None, WeightOnly(method="rtn", group=group))
        size = save(net, tmp_path / "small").stat().st_size
        assert whole / size > 32 / bits
        numbers = inspect(tmp_path / "small").tensors[-1]
        assert (numbers.path, numbers.dtype) == ("weight.scale", "float16")


def test_weights_that_left_their_grid_are_stored_as_they_are(tmp_path: Path) -> None:
    net = rounded()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1e-3
        net[3].weight[0, 0] = -0.0
    path = save(net, tmp_path / "a")
    assert state(load(path, network())) == state(net)
    assert not any("int4" in entry.encoding for entry in inspect(path).tensors)
    assert not grids(load(path, network()))


def test_grids_of_the_instance_that_is_given_are_not_taken(tmp_path: Path) -> None:
    path = save(network(), tmp_path / "a")
    assert not grids(load(path, rounded()))


def test_a_path_that_the_network_has_already_is_left_to_it(tmp_path: Path) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(3, 2))
    put_grids(net, {"weight": Grid(torch.ones(3), torch.tensor(0), 0, -7, 7)})
    fits = save(net, tmp_path / "a")
    assert inspect(fits).tensors[0].encoding.startswith("int4")
    tied = copy.deepcopy(net)
    tied.also = tied.weight
    again = load(save(tied, tmp_path / "b"), tied)
    assert again.also is again.weight


def test_graphs_keep_grids_of_their_own_too(tmp_path: Path) -> None:
    from rarefy.graph.stubs import plain_graph

    x = torch.randn(4, 3, 6, 6)
    net = rf.quantize(plain_graph(network(), x), None, WeightOnly(method="rtn", group=16))
    path = save(net, tmp_path / "a")
    loaded = load(path)
    assert torch.equal(loaded(x), net(x))
    assert grids(loaded).keys() == {"0.weight", "3.weight"}
    assert "int4" in inspect(path).tensors[0].encoding


def position(index: dict[str, Any], path: str) -> int:
    return int(index["tensors"]["path"].index(path))


def column(path: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        index["tensors"][name][position(index, path)] = value

    return change


def grid(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["grids"]["3.weight"].update(values)


ATTACKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no group": grid(group=0),
    "negative group": grid(group=-32),
    "fraction of a group": grid(group=32.5),
    "other group": grid(group=31),
    "group of one": grid(group=1),
    "group beyond the weight": grid(group=2**31 - 1),
    "group without blocks": grid(group=None),
    "axis beyond the weight": grid(axis=2),
    "other axis": grid(axis=1),
    "scale of the network": grid(scale="3.bias"),
    "scale of the other": grid(scale="0.weight.scale"),
    "scale is quantized": grid(scale="0.weight"),
    "scale is the zero point": grid(scale="3.weight.zero_point"),
    "zero point is the scale": grid(zero_point="3.weight.scale"),
    "zero point of nothing": grid(zero_point="nothing"),
    "range too narrow": grid(high=3),
    "range of 16 bits": grid(high=2**15),
    "upside down": grid(low=15, high=0),
    "more keys": grid(code="x"),
    "numbers of no grid": lambda i: i["grids"].pop("3.weight"),
    "a bias as numbers": column("3.bias", "flags", "n"),
    "a weight as numbers": column("3.weight", "flags", "n"),
    "numbers as a parameter": column("3.weight.scale", "flags", "pn"),
    "numbers of the network": column("3.weight.scale", "flags", ""),
    "numbers of integers": column("3.weight.scale", "dtype", "int16"),
    "other shape": column("3.weight.scale", "shape", [5, 33]),
    "shape with nothing": column("3.weight.scale", "shape", [33, 0]),
    "shared numbers": lambda i: i.update(aliases={"other": "3.weight.scale"}),
    "integers with a grid": column("3.weight", "dtype", "int32"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_impossible_grids_are_refused(tmp_path: Path, attack: str) -> None:
    intact = save(rounded(group=32, symmetric=False), tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(rewritten(intact, ATTACKS[attack]))
    with pytest.raises(FormatError):
        load(tmp_path / "b", network())


def test_huge_groups_need_no_memory(tmp_path: Path) -> None:
    """A group of 2^31 - 1 neighbors would ask for 500 GB, if scales were repeated as it says."""
    net = rf.quantize(nn.Linear(64, 64), None, WeightOnly(method="rtn", group=2**31 - 1))
    path = save(net, tmp_path / "a")
    assert torch.equal(load(path, nn.Linear(64, 64)).weight, net.weight)
