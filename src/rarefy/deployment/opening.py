"""What a user wants to serve -> a session in any runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from rarefy.deployment.export import export
from rarefy.deployment.runtimes import Session, runtime_named
from rarefy.errors import InputError
from rarefy.types import Inputs

Served = str | Path | nn.Module
"""An ONNX file, or a network."""


@contextmanager
def opened(
    what: Served, example_inputs: Inputs, runtime: str, threads: int = 1
) -> Iterator[tuple[Session, Path | None]]:
    """A session, closed afterwards, and the file that it serves, if any.

    A network is exported to a temporary file for the runtimes that serve files.

    Args:
        what: an ONNX file or a network.
        example_inputs: what a network is exported with.
        runtime: a key of :data:`~rarefy.deployment.runtimes.RUNTIMES`.
        threads: intra-op threads.

    Raises:
        InputError: unknown runtime, no such file, or a file for a runtime that serves networks.
        FormatError: the runtime cannot load the file.
        ExportError: the network cannot be exported.
        MissingExtraError: the runtime is not installed.
    """
    row = runtime_named(runtime)
    with TemporaryDirectory(prefix="rarefy-") as folder:
        path: Path | None = None
        if isinstance(what, str | Path):
            path = Path(what)
            if row.serves == "module":
                raise InputError(
                    f"runtime={runtime!r}",
                    f"it runs networks in PyTorch, and {path.name!r} is a file",
                    "Give the nn.Module, or use 'onnxruntime' or 'openvino'",
                )
        elif not isinstance(what, nn.Module):
            raise InputError(
                f"a {type(what).__name__} in {runtime}",
                "it is neither the path of a file nor a network",
                "Give an nn.Module, or the path of an ONNX file",
            )
        elif row.serves == "file":
            path = export(what, Path(folder) / f"{type(what).__name__}.onnx", example_inputs)
        session = row.open(path or what, threads)
        try:
            yield session, path
        finally:
            session.close()
