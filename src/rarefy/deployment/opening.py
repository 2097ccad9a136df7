"""What a user wants to serve -> a session in any runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from rarefy.deployment.export import export
from rarefy.deployment.program_file import load_program
from rarefy.deployment.runtimes import RUNTIMES, Session, runtime_named
from rarefy.errors import InputError
from rarefy.types import Inputs

Served = str | Path | nn.Module
"""A file of ONNX, of ``torch.export`` (``.pt2``) or of ExecuTorch (``.pte``), or a network."""

FORMS = {
    ".onnx": "an ONNX file",
    ".pt2": "a program of torch.export",
    ".pte": "a program of ExecuTorch",
}
"""Suffix -> what such a file is; any other stands for the first."""


@contextmanager
def opened(
    what: Served, example_inputs: Inputs, runtime: str, threads: int = 1
) -> Iterator[tuple[Session, Path | None]]:
    """A session, closed afterwards, and the file that it serves, if any; see :func:`prepared`."""
    with (
        prepared(what, example_inputs, runtime, threads) as (anew, path),
        closing(anew()) as session,
    ):
        yield session, path


@contextmanager
def prepared(
    what: Served, example_inputs: Inputs, runtime: str, threads: int = 1
) -> Iterator[tuple[Callable[[], Session], Path | None]]:
    """What opens a session, as often as it is called, and the file that it serves, if any.

    A network is exported to a temporary file for the runtimes that serve files. A ``.pt2`` file is
    loaded as a network for those of PyTorch.

    Args:
        what: a file or a network.
        example_inputs: what a network is exported with.
        runtime: a key of :data:`~rarefy.deployment.runtimes.RUNTIMES`.
        threads: intra-op threads.

    Raises:
        InputError: unknown runtime, no such file, or a file of a form that is another runtime's.
        FormatError: the runtime cannot load the file.
        ExportError: the network cannot be exported.
        MissingExtraError: the runtime is not installed.
    """
    row = runtime_named(runtime)
    with TemporaryDirectory(prefix="rarefy-") as folder:
        path: Path | None = None
        served: Path | nn.Module
        if isinstance(what, str | Path):
            path = Path(what)
            check_form(path, runtime)
            served = load_program(path) if row.serves == "module" else path
        elif not isinstance(what, nn.Module):
            raise InputError(
                f"a {type(what).__name__} in {runtime}",
                "it is neither the path of a file nor a network",
                "Give an nn.Module, or the path of an ONNX, .pt2 or .pte file",
            )
        elif row.serves == "file":
            path = Path(folder) / f"{type(what).__name__}{row.form}"
            export(what, path, example_inputs)
            served = path
        else:
            served = what
        yield partial(row.open, served, threads), path


def check_form(path: Path, runtime: str) -> None:
    """Pass where a file is of the form that a runtime serves.

    Raises:
        InputError: unknown runtime, or it serves files of another form.
    """
    own = runtime_named(runtime).form
    given = form_of(path)
    if own == given:
        return
    others = [repr(name) for name, row in RUNTIMES.items() if row.form == given]
    raise InputError(
        f"runtime={runtime!r}",
        f"it runs a network or {FORMS[own]}, and {path.name!r} is taken for {FORMS[given]}",
        f"Use {' or '.join(others)}",
    )


def form_of(path: Path) -> str:
    """The suffix in :data:`FORMS` that stands for a file's form."""
    suffix = path.suffix.lower()
    return suffix if suffix in FORMS else ".onnx"
