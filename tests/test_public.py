"""The public face is a list; every name on it is typed and documented."""

import inspect
import types
import typing

import pytest

import rarefy

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
