"""What a user wants to serve -> a session in any runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from rarefy.deployment.export import export
from rarefy.deployment.program_file import SUFFIX, load_program
from rarefy.deployment.runtimes import RUNTIMES, Session, runtime_named
from rarefy.errors import InputError
from rarefy.types import Inputs

Served = str | Path | nn.Module
"""An ONNX file, a ``.pt2`` file of ``torch.export``, or a network."""


@contextmanager
def opened(
    what: Served, example_inputs: Inputs, runtime: str, threads: int = 1
) -> Iterator[tuple[Session, Path | None]]:
    """A session, closed afterwards, and the file that it serves, if any.

    A network is exported to a temporary file for the runtimes that serve ONNX files. A ``.pt2``
    file is loaded as a network for those of PyTorch.

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
                "Give an nn.Module, or the path of an ONNX or .pt2 file",
            )
        elif row.serves == "file":
            path = export(what, Path(folder) / f"{type(what).__name__}.onnx", example_inputs)
            served = path
        else:
            served = what
        session = row.open(served, threads)
        try:
            yield session, path
        finally:
            session.close()


def check_form(path: Path, runtime: str) -> None:
    """Pass where a file is of the form that a runtime serves.

    Raises:
        InputError: unknown runtime, or it serves files of the other form.
    """
    in_pytorch = runtime_named(runtime).serves == "module"
    if in_pytorch == (path.suffix.lower() == SUFFIX):
        return
    what = f"it runs ONNX files, and {path.name!r} is a program of torch.export"
    if in_pytorch:
        what = f"it runs networks and {SUFFIX} files in PyTorch, and {path.name!r} is neither"
    others = [n for n, row in RUNTIMES.items() if (row.serves == "module") != in_pytorch]
    raise InputError(f"runtime={runtime!r}", what, f"Use {' or '.join(map(repr, others))}")
