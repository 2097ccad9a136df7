"""From a YAML file to a :class:`Recipe`: safely, and with every problem named with its line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeAlias, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rarefy.errors import RecipeError
from rarefy.recipe.options import IN_A_FILE, Recipe

_MAX_BYTES = 64 * 1024
_MAX_DEPTH = 8
_MAX_SHOWN = 20

Place: TypeAlias = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without tags that construct objects, and with ``1e-3`` read as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+|\d[\d_]*\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _Problems:
    """Everything found wrong with one file, each with its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Place, int] = {(): 1}
        self.found: list[tuple[int, str]] = []

    def add(self, place: Place, what: str, line: int | None = None) -> None:
        """Note a problem at a place, or at the nearest place around it that has a line."""
        if line is None:
            known = next(place[:n] for n in range(len(place), -1, -1) if place[:n] in self.lines)
            line = self.lines[known]
        name = ".".join(_shown(part) for part in place)
        self.found.append((line, f"{name}: {what}" if name else what))

    def raise_any(self, cause: Exception | None = None) -> None:
        """Raise one error with all problems, in the order of the file, if there are any."""
        if not self.found:
            return
        name = self.path.name
        texts = [f"{name}:{line}: {what}" for line, what in sorted(self.found)]
        hidden = len(texts) - _MAX_SHOWN
        if hidden > 0:
            texts = [*texts[:_MAX_SHOWN], f"and {hidden} more"]
        count = "1 problem" if len(self.found) == 1 else f"{len(self.found)} problems"
        remedy = "Correct the recipe and start again; nothing has been run"
        what = f"{count}\n  " + "\n  ".join(texts)
        raise RecipeError(str(self.path), what, remedy) from cause


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; nothing that it names is imported or run.

    Args:
        path: a YAML file of at most 64 KiB.

    Returns:
        The recipe, with defaults filled in.

    Raises:
        RecipeError: the file cannot be read or is not a valid recipe. The message lists every
            problem with its line, e.g. ``recipe.yaml:7: stages.prune.mcas: unknown key; did you
            mean 'macs'?``

    Example:
        >>> load_recipe("recipe.yaml").stages.prune.budget()  # doctest: +SKIP
        Budget(macs=0.5, ...)
    """
    path = Path(path)
    text = _read(path)
    problems = _Problems(path)
    values = _parse(text, problems)
    problems.raise_any()
    try:
        recipe = Recipe.model_validate(values, context=IN_A_FILE)
    except ValidationError as error:
        for detail in error.errors():
            problems.add(tuple(detail["loc"]), _explain(detail))
        problems.raise_any(error)
        raise
    recipe._path = path.absolute()
    return recipe


def _read(path: Path) -> str:
    if not path.is_file():
        what = "this is not a file" if path.exists() else "there is no such file"
        raise RecipeError(str(path), what, "Give the path of a recipe, such as recipe.yaml")
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) <= _MAX_BYTES:
            return raw.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read: {error}", "Check its permissions") from error
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), "is not UTF-8 text", "Save it as UTF-8") from error
    what = f"is larger than {_MAX_BYTES // 1024} KiB, which no recipe is"
    raise RecipeError(str(path), what, "Check that this is the file that you meant")


def _parse(text: str, problems: _Problems) -> Any:
    """The plain values of a YAML text; what is refused goes to ``problems``."""
    try:
        _refuse_tricks(text, problems)
        if problems.found:
            return None
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problems.add((), f"not valid YAML: {error.problem}", mark.line + 1 if mark else None)
        return None
    except yaml.YAMLError as error:
        problems.add((), f"not valid YAML: {str(error).splitlines()[0]}")
        return None
    if isinstance(node, yaml.MappingNode):
        return _plain(node, (), problems)
    found = "empty" if node is None else "not a mapping"
    problems.add((), f"the recipe is {found}; it needs the keys source, model and data")
    return None


def _refuse_tricks(text: str, problems: _Problems) -> None:
    """Refuse tags, anchors and deep nesting on the stream of events, before anything is built.

    An alias can make a few lines stand for billions of values; a tag can name a type. A recipe
    needs neither.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            problems.add((), f"nested more than {_MAX_DEPTH} deep", line)
            return
        if getattr(event, "anchor", None) is not None:
            problems.add((), "anchors and aliases (& and *) are not allowed", line)
        tag = getattr(event, "tag", None)
        if tag is not None:
            problems.add((), f"the tag {_shown(tag)} is not allowed", line)


def _plain(node: yaml.Node, place: Place, problems: _Problems) -> Any:
    """A node as dict, tuple or scalar; notes the line of every place."""
    problems.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place, problems)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_plain(item, (*place, i), problems) for i, item in enumerate(node.value))
    constructor = yaml.constructor.SafeConstructor()
    try:
        return constructor.construct_object(node)
    except (ValueError, OverflowError, yaml.YAMLError):
        problems.add(place, f"cannot read the value {_shown(node.value)}")
        return None


def _mapping(node: yaml.MappingNode, place: Place, problems: _Problems) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(place, "a key must be a word", line)
            continue
        key = key_node.value
        inner = (*place, key)
        if key in values:
            problems.add(inner, f"given twice, first on line {problems.lines[inner]}", line)
            continue
        problems.lines[inner] = line
        values[key] = _plain(value_node, inner, problems)
    return values


_RULES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "tuple_type": "must be a list, such as [a, b]",
    "model_type": "must be a mapping of options",
    "finite_number": "must be finite",
    "string_too_short": "must not be empty",
    "greater_than": "must be above {gt:.15g}",
    "greater_than_equal": "must be at least {ge:.15g}",
    "less_than": "must be below {lt:.15g}",
    "less_than_equal": "must be at most {le:.15g}",
}


def _explain(detail: ErrorDetails) -> str:
    """One of pydantic's findings in the words of a recipe's reader."""
    place, kind, context = tuple(detail["loc"]), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind == "missing":
        return "is missing"
    given = f", not {_shown(detail['input'])}"
    if kind == "value_error":
        text = str(context["error"])
        return text if isinstance(detail["input"], dict | None) else f"{text} (given: {given[6:]})"
    return _RULES.get(kind, detail["msg"]).format(**context) + given


def _unknown_key(place: Place) -> str:
    known = list(_model_at(place[:-1]).model_fields)
    close = difflib.get_close_matches(str(place[-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
    return f"unknown key; {hint}"


def _model_at(place: Place) -> type[BaseModel]:
    """The model that describes the mapping at a place of the recipe."""
    model: type[BaseModel] = Recipe
    for key in place:
        kind = model.model_fields[str(key)].annotation
        options = [kind, *get_args(kind)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return model


def _shown(value: object) -> str:
    """A value as a message shows it: short, on one line, nothing unprintable."""
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
