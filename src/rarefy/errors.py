"""The error tree. Every error says where it arose, what is wrong, and what to do about it.

RarefyError
├── InputError (also a ValueError)   an argument, a batch or a model that cannot be used
│   ├── DataError                    a data set or loader: empty, wrong shapes, NaN
│   ├── BudgetError                  a budget that cannot be reached
│   └── RecipeError                  a recipe file
├── CaptureError                     the network cannot be turned into a graph
├── ProofError                       a structural change that is not equal to masking
├── TrainingError                    a loss or weight became NaN or infinite
├── FormatError                      a file that is damaged, hostile or of another kind
├── ExportError                      the network cannot be exported, or its export differs
├── OutputError                      a place that cannot be written, or must not be overwritten
└── MissingExtraError (also an ImportError)   an optional dependency is not installed
"""

import sys
import warnings


def warn(message: str) -> None:
    """Warn of what was done in the line of the user's that asked for it."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


_INNER = ("rarefy", "torch", "contextlib")
"""Packages whose lines are not the user's."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with its type; a long one without its middle."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= 300 else f"{text[:170]} ... {text[-125:]}"


def shortened(names: list[str], most: int) -> str:
    """The first names, and how many more there are."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


class RarefyError(Exception):
    """Base of all errors that rarefy raises on purpose.

    Args:
        where: the call, file, layer or argument concerned, e.g. ``"prune(budget=...)"``.
        what: what is wrong, with the offending values.
        remedy: what the reader can do about it.
    """

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)
        self.where = where
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what.rstrip('.')}. {self.remedy.rstrip('.')}."


class InputError(RarefyError, ValueError):
    """An argument, a batch or a model that cannot be used."""


class DataError(InputError):
    """Data that cannot be used: empty, of the wrong shape, not finite."""


class BudgetError(InputError):
    """A budget that cannot be reached; the message says what can."""


class RecipeError(InputError):
    """A recipe that is not valid; the message says which key, in which file."""


class CaptureError(RarefyError):
    """The network cannot be turned into a graph of ATen operators."""


class ProofError(RarefyError):
    """A structural change whose result differs from masking."""


class TrainingError(RarefyError):
    """Training diverged: a loss or a weight is no longer finite."""


class FormatError(RarefyError):
    """A file that is damaged, hostile, or not what it was taken for."""


class ExportError(RarefyError):
    """The network cannot be exported, or its export computes something else."""


class OutputError(RarefyError):
    """A place that cannot be written, or that holds something that must not be overwritten."""


class MissingExtraError(RarefyError, ImportError):
    """An optional dependency that is not installed.

    Args:
        module: the module that is missing, e.g. ``"onnxruntime"``.
        extra: the extra of rarefy that installs it, e.g. ``"onnx"``.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"import {module}",
            f"{module} is not installed",
            f"Install it with: pip install 'rarefy[{extra}]'",
        )
