"""The error tree: every error says where, what and the remedy."""

import inspect
import pickle
from typing import Any

import pytest
import torch

from rarefy import errors
from rarefy.errors import MissingExtraError, RarefyError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_in_the_tree_and_in_its_drawing(kind: type) -> None:
    assert issubclass(kind, RarefyError)
    assert kind.__name__ in str(errors.__doc__)
    assert kind.__doc__


def test_an_error_reads_as_sentences() -> None:
    error = RarefyError("here", "it is wrong.", "Do this.")
    assert str(error) == "here: it is wrong. Do this."
    assert (error.where, error.what, error.remedy) == ("here", "it is wrong.", "Do this.")


def test_errors_fit_the_builtin_tree() -> None:
    assert issubclass(errors.BudgetError, ValueError)
    assert issubclass(errors.DataError, errors.InputError)
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize("kind", [c for c in CLASSES if c is not MissingExtraError])
def test_errors_survive_pickling(kind: type) -> None:
    again = pickle.loads(pickle.dumps(kind("a", "b", "c")))
    assert type(again) is kind
    assert str(again) == "a: b. c."


def test_a_missing_extra_says_how_to_install_it() -> None:
    assert "pip install 'rarefy[onnx]'" in str(MissingExtraError("onnxruntime", "onnx"))


def test_a_warning_is_of_the_line_that_called_from_outside() -> None:
    inner: dict[str, Any] = {"__name__": "rarefy.inner", "warn": errors.warn}
    exec("def one(): warn('said')\ndef two(): one()", inner)
    for call in (inner["one"], torch.no_grad()(inner["two"])):
        with pytest.warns(RuntimeWarning, match="said") as warned:
            call()
        assert warned[0].filename == __file__


def test_names_are_shortened_to_the_first_of_them() -> None:
    assert errors.shortened(["a", "b", "c"], 3) == "a, b, c"
    assert errors.shortened(["a", "b", "c"], 1) == "a and 2 more"
