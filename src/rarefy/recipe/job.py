"""From a :class:`Recipe` to the network and data that it names; nothing else imports them."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from rarefy.batches import batches, check_rereadable, seeded, take
from rarefy.errors import DataError, RarefyError, RecipeError
from rarefy.recipe.options import Recipe, is_file
from rarefy.types import Data, Inputs

_SPLITS = ("train", "val", "test")

_EXAMPLES = 8
"""Examples of the first training batch that stand for all inputs."""


@dataclass(frozen=True)
class Job:
    """What a recipe stands for, imported and checked.

    Attributes:
        model: the network.
        train, val, test: batches, each iterable more than once.
        example_inputs: what the network is called with: a few examples.
    """

    model: nn.Module
    train: Data
    val: Data
    test: Data
    example_inputs: Inputs


def resolve(recipe: Recipe) -> Job:
    """Import the one module that the recipe names and call the functions that it names.

    The calls run under the recipe's seed; the global random state is restored after them. While
    they run, the folder of a source file is the last place where Python looks for modules, so
    that the file can import its neighbors.

    Raises:
        RecipeError: the module cannot be imported, or a function is missing, raises or returns
            something else than it should. The error of the user's code is its ``__cause__``.
        DataError: the data are empty, unlabelled, or can be read only once.
    """
    source = _Source(recipe.path.name, recipe.path.parent, recipe.source)
    with source.importable(), seeded(recipe.seed):
        make_model = source.function("model", recipe.model)
        make_data = source.function("data", recipe.data)
        named = recipe.example_inputs
        make_inputs = None if named is None else source.function("example_inputs", named)
        model = make_model()
        if not isinstance(model, nn.Module):
            raise make_model.returned(model, "Return a torch.nn.Module: the network itself")
        splits = _splits(make_data)
        first = {name: _first_batch(make_data, name, data) for name, data in splits.items()}
        for name in _SPLITS if recipe.stages.train else ("val", "test"):
            if first[name][1] is None:
                what = f"the batches of {name!r} have no targets"
                raise DataError(
                    make_data.place, what, "Make it a list or DataLoader of (inputs, targets)"
                )
        inputs = take(first["train"][0], _EXAMPLES) if make_inputs is None else make_inputs()
        if make_inputs is not None and not isinstance(inputs, Tensor | tuple | Mapping):
            raise make_inputs.returned(inputs, "Return a tensor, a tuple or a mapping")
    return Job(model, splits["train"], splits["val"], splits["test"], inputs)


def teacher_and_data(job: str, seed: int = 0) -> tuple[nn.Module, Data]:
    """What the function returns that is named as ``file.py:function``: a network and its data.

    It is imported and called like those of a recipe, from the current folder.

    Raises:
        RecipeError: the name has another form, the file cannot be imported, or the function is
            missing, raises or returns something else.
    """
    file, colon, name = job.rpartition(":")
    where = f"--job {job}"
    if not colon or not file or not name.isidentifier():
        what = "a file and a function of it are needed"
        raise RecipeError(where, what, "Write for example --job my_network.py:teacher_and_data")
    source = _Source("--job", Path(), file)
    with source.importable(), seeded(seed):
        make = source.function("function", name)
        made = make()
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise make.returned(made, "Return (teacher, data): a torch.nn.Module and its batches")
    return made


@dataclass(frozen=True)
class _Function:
    """A function of the user's module, with its place for messages."""

    place: str
    function: Callable[[], Any]

    def __call__(self) -> Any:
        with self.guarded("raised"):
            return self.function()

    @contextmanager
    def guarded(self, verb: str) -> Iterator[None]:
        """Errors of the user's code become one that names the function."""
        try:
            yield
        except RarefyError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{verb} {type(error).__name__}: {error}"
            remedy = "Call the function by itself, without arguments, to find the cause"
            raise RecipeError(self.place, what, remedy) from error

    def returned(self, value: object, remedy: str) -> RecipeError:
        """The error for a return value of the wrong type."""
        return RecipeError(self.place, f"returned a {type(value).__name__}", remedy)


class _Source:
    """The module that a recipe, or an option of a command, names.

    Args:
        name: of what names it, for messages.
        folder: where a source file is looked for.
        source: a file, or the dotted name of a module.
    """

    def __init__(self, name: str, folder: Path, source: str) -> None:
        self.name, self.source = name, source
        self.file = folder / source if is_file(source) else None
        self.place = f"{name}: source: {source}"
        self.module: ModuleType | None = None

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Let a source file import the files beside it, after everything that is installed."""
        folder = str(self.file.parent) if self.file else None
        if folder is None or folder in sys.path:
            yield
            return
        sys.path.append(folder)
        try:
            yield
        finally:
            if folder in sys.path:
                sys.path.remove(folder)

    def function(self, key: str, name: str) -> _Function:
        """A function of the module, which is imported for the first; it is not called yet."""
        self.module = self.module or self._load()
        place = f"{self.name}: {key}: {name}() in {self.source}"
        found = vars(self.module).get(name)
        if callable(found):
            return _Function(place, found)
        what = "there is no such function" if found is None else "this is not a function"
        own = [n for n, v in vars(self.module).items() if callable(v) and not n.startswith("_")]
        close = difflib.get_close_matches(name, own, n=1)
        remedy = f"Did you mean {close[0]}" if close else f"Define {name}() in {self.source}"
        raise RecipeError(place, what, remedy)

    def _load(self) -> ModuleType:
        if self.file is not None and not self.file.is_file():
            what = f"there is no file {self.file}"
            raise RecipeError(
                self.place,
                what,
                "Give its path relative to the recipe, or to the current folder in a command",
            )
        try:
            if self.file is None:
                return importlib.import_module(self.source)
            return _import_file(self.file)
        except (Exception, SystemExit) as error:
            what = f"cannot be imported: {type(error).__name__}: {error}"
            remedy = "Import it by itself in Python to find the cause"
            raise RecipeError(self.place, what, remedy) from error


def _import_file(file: Path) -> ModuleType:
    """Import one file under a private name, so that it neither shadows nor meets another module."""
    name = "_rarefy_source_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickled classes look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _splits(make_data: _Function) -> dict[str, Data]:
    """The three data sets by name, from a mapping or a tuple of three."""
    made = make_data()
    remedy = "Return {'train': ..., 'val': ..., 'test': ...} or a tuple (train, val, test)"
    if isinstance(made, Mapping):
        missing = [name for name in _SPLITS if name not in made]
        if missing:
            what = f"the mapping lacks {' and '.join(map(repr, missing))}"
            raise DataError(make_data.place, what, remedy)
        return {name: made[name] for name in _SPLITS}
    if isinstance(made, tuple | list) and len(made) == len(_SPLITS):
        return dict(zip(_SPLITS, made, strict=True))
    length = f" of {len(made)}" if isinstance(made, tuple | list) else ""
    raise DataError(make_data.place, f"returned a {type(made).__name__}{length}", remedy)


def _first_batch(make_data: _Function, name: str, data: Data) -> tuple[Inputs, Tensor | None]:
    place = f"{make_data.place}, {name!r}"
    check_rereadable(data, place)
    with make_data.guarded(f"reading {name!r} raised"):
        try:
            return next(batches(data, place))
        except DataError as error:
            raise DataError(place, error.what, error.remedy) from error
