"""The public face is a list; every name on it is typed and documented."""

import inspect
import types
import typing

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import InputError
from rarefy.schedules import Constant

PUBLIC = """
Budget GradualPruning GradualUnits Half Int8 Limit Movement Sensitivity SoftLabels Stages Target
WeightOnly compress criteria distill errors evaluate export hold inspect load load_tensor losses
measure metrics pairs patterns prune quantize regularize repair rewind save sensitivity soft_labels
student taps teachers trace train write_soft_labels
""".split()

CALLABLES = [n for n in PUBLIC if not isinstance(getattr(rarefy, n), types.ModuleType)]


def test_the_list_is_what_it_was() -> None:
    assert sorted(rarefy.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_documented(name) -> None:
    assert len(inspect.getdoc(getattr(rarefy, name)) or "") > 30


@pytest.mark.parametrize("name", CALLABLES)
def test_every_name_is_typed(name) -> None:
    value = getattr(rarefy, name)
    if inspect.isclass(value):
        assert typing.get_type_hints(value)
        return
    signature = inspect.signature(value)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())


def test_the_package_says_that_it_is_typed() -> None:
    from pathlib import Path

    assert (Path(rarefy.__file__).parent / "py.typed").exists()


X = torch.zeros(2, 4)
BATCHES = [(X, torch.zeros(2, dtype=torch.long))]
NET = nn.Linear(4, 2)

TAKES_A_NETWORK = {
    "prune": lambda given: rarefy.prune(given, X, rarefy.Budget(macs=0.5)),
    "sparse": lambda given: rarefy.prune(given, X, rarefy.Budget(sparsity=0.5), structure="weight"),
    "repair": lambda given: rarefy.repair(given, NET, [X]),
    "quantize": lambda given: rarefy.quantize(given, [X]),
    "train": lambda given: rarefy.train(given, BATCHES),
    "distill": lambda given: rarefy.distill(NET, given, BATCHES),
    "peer": lambda given: rarefy.distill(rarefy.teachers.Peer(given), NET, BATCHES, epochs=1),
    "student": lambda given: rarefy.student(given, X, width=0.5),
    "evaluate": lambda given: rarefy.evaluate(given, BATCHES),
    "sensitivity": lambda given: rarefy.sensitivity(given, BATCHES, rarefy.evaluate),
    "trace": lambda given: rarefy.trace(given, X),
    "save": lambda given: rarefy.save(given, "never.safetensors"),
    "export": lambda given: rarefy.export(given, "never.onnx", X),
    "hold": rarefy.hold,
    "rewind": lambda given: rarefy.rewind(given, NET.state_dict()),
    "Movement": rarefy.Movement,
    "GradualUnits": lambda given: rarefy.GradualUnits(given, X, Constant(0.5)),
    "GradualPruning": lambda given: rarefy.GradualPruning(Constant(0.5))(given),
    "L1": lambda given: rarefy.regularize.L1(1e-4)(given),
}


def test_a_file_is_loaded_into_a_network(tmp_path) -> None:
    file = rarefy.save(NET, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=r"load\(model\): a type was given"):
        rarefy.load(file, nn.Linear)


@pytest.mark.parametrize("name", TAKES_A_NETWORK)
@pytest.mark.parametrize(
    "given", ["net.pt", NET.state_dict(), nn.Linear], ids=["path", "state", "class"]
)
def test_what_is_no_network_is_refused(name, given) -> None:
    with pytest.raises(InputError, match=f"a {type(given).__name__} was given. Give an nn.Module"):
        TAKES_A_NETWORK[name](given)


def _labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.linspace(-1, 1, 32).view(8, 4), torch.arange(8) % 2)]


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()


QUIET = {"epochs": 1, "progress": False}

RETURNS_A_NETWORK = {
    "train": lambda net, data: rarefy.train(net, data, **QUIET),
    "distill": lambda net, data: rarefy.distill(net, net, data, label_weight=0.5, **QUIET),
    "student": lambda net, data: rarefy.student(net, data[0][0], width=0.5),
    "int8": rarefy.quantize,
    "half": lambda net, data: rarefy.quantize(net, None, rarefy.Half()),
    "rewind": lambda net, data: rarefy.rewind(net, _net().state_dict()),
}


@pytest.mark.parametrize(
    ("made_in_it", "called_in_it"), [(True, False), (False, True), (True,) * 2]
)
@pytest.mark.parametrize("name", RETURNS_A_NETWORK)
def test_inference_mode_changes_no_call(name, made_in_it, called_in_it) -> None:
    call = RETURNS_A_NETWORK[name]
    wanted = call(_net(), _labelled()).state_dict()
    with torch.inference_mode(made_in_it):
        net, data = _net(), _labelled()
    with torch.inference_mode(called_in_it):
        found = call(net, data)
    assert not any(t.is_inference() for t in [*found.parameters(), *found.buffers()])
    for path, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[path])


def test_networks_made_in_inference_mode_are_exported(tmp_path) -> None:
    with torch.inference_mode():
        net = _net()
    assert rarefy.export(net, tmp_path / "net.pt2", _labelled()[0][0]).stat().st_size
