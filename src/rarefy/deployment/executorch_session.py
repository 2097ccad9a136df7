"""Programs of ExecuTorch in its own runtime for Python."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from rarefy.batches import tensors
from rarefy.deployment.modules import check_threads
from rarefy.errors import FormatError, InputError, MissingExtraError, first_line
from rarefy.process import quiet_setup
from rarefy.types import Inputs

SUFFIX = ".pte"

_SCALARS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = dict(enumerate((*_SCALARS, torch.float16, torch.float32, torch.float64)))
DTYPES |= {11: torch.bool, 15: torch.bfloat16}
"""PyTorch's own number of a dtype, which the file has -> the dtype."""


@contextlib.contextmanager
def contained() -> Iterator[Callable[[], str]]:
    """Keep back what is printed, by Python or below it; what this yields reads it."""
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as file,
        contextlib.ExitStack() as at,
    ):

        def read() -> str:
            file.flush()
            file.seek(0)
            return file.read()

        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        for number in (1, 2):
            with contextlib.suppress(OSError):  # a process may have closed it
                own = os.dup(number)
                at.callback(os.close, own)
                at.callback(os.dup2, own, number)
                os.dup2(file.fileno(), number)
        at.enter_context(contextlib.redirect_stdout(file))
        at.enter_context(contextlib.redirect_stderr(file))
        yield read


def load_executorch(name: str = "executorch.runtime") -> Any:
    """A module of ``executorch``. Imports of it change environment, filters and logging: put back.

    Raises:
        MissingExtraError: it is not installed.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with quiet_setup(), contained():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("executorch", "executorch") from error
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


class ExecuTorchSession:
    """A ``.pte`` file in ExecuTorch's runtime, on the CPU. Open only files that you trust.

    The file has no names: a mapping of inputs is taken in its order.

    ExecuTorch has one pool of threads for the whole process. It is made anew where it has another
    size, for as long as the session is open; programs that are loaded already would not survive
    that, so that it is refused where there are any.

    Args:
        path: the file.
        threads: threads of the pool; None leaves it as it is.

    Raises:
        MissingExtraError: executorch is not installed.
        InputError: there is no such file, ``threads`` is below 1, or programs that are loaded need
            another number.
        FormatError: the runtime cannot load the file.
    """

    name = "executorch"

    def __init__(self, path: str | Path, threads: int | None = 1) -> None:
        if threads is not None:
            check_threads(threads)
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(str(path), "there is no such file", "Export the network first")
        runtime = load_executorch().Runtime.get()
        self.version = f"executorch {version('executorch')}"
        self._before = None if threads is None else _resized(threads)
        with contained() as said:
            try:
                self._method = runtime.load_program(self.path).load_method("forward")
            except (RuntimeError, KeyError) as error:
                raise FormatError(
                    str(self.path),
                    f"executorch cannot load it: {_reason(error, said)}",
                    "Export it again, or update executorch",
                ) from error

    @property
    def declared(self) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Sizes of each input, the largest where they are free, and its dtype."""
        meta = self._method.metadata
        found = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        return [(tuple(t.sizes()), DTYPES.get(t.dtype())) for t in found]

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The inputs in their order, after a first call with them.

        Raises:
            InputError: the runtime refuses them.
        """
        given = tuple(tensor.detach().cpu().contiguous() for tensor in tensors(inputs))
        with contained() as said:
            try:
                self.run(given)
            except RuntimeError as error:
                raise InputError(
                    f"{self.name}({self.path.name!r})",
                    f"executorch refuses the inputs: {_reason(error, said)}",
                    "Give inputs of the shapes and dtypes that the file was exported with, and not "
                    "more examples",
                ) from error
        return given

    def run(self, feed: Any) -> Any:
        """Run on what :meth:`feed` returned: the call that is timed."""
        return self._method.execute(feed)

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """The tensors among the outputs."""
        return tensors(list(self.run(self.feed(inputs))))

    def logits(self, inputs: Inputs) -> Tensor:
        """The first output: the file has no names."""
        return self(inputs)[0]

    def close(self) -> None:
        """Free what the runtime holds; the session cannot be used afterwards."""
        self._method = None
        if self._before is not None:
            with contextlib.suppress(InputError):  # others are open, on the same pool
                _resized(self._before)
            self._before = None


def _resized(threads: int) -> int | None:
    """Give the pool a number of threads; returns the one before where it had another.

    Raises:
        InputError: programs are loaded that hold the pool as it is.
    """
    pool = load_executorch("executorch.extension.pybindings.portable_lib")
    with contained():
        before: int = pool._threadpool_get_thread_count()
    if before == threads:
        return None
    gc.collect()
    kind = load_executorch().Method
    if any(type(found) is kind for found in gc.get_objects()):
        raise InputError(
            f"threads={threads}",
            f"programs of executorch that this process has loaded need its pool of {before}",
            f"Delete them first, or write threads={before}",
        )
    with contained():
        pool._unsafe_reset_threadpool(threads)
    return before


def _reason(error: Exception, said: Callable[[], str]) -> str:
    """What the runtime printed first, with the operator that it names, or else the error."""
    lines = [line.strip() for line in said().splitlines() if line.startswith("[")]
    told = [line.partition("] ")[2] for line in lines if "cpuinfo" not in line]
    failed = [line for line in told[1:] if " in operator " in line]
    return "; ".join([*told[:1], *failed[:1]]) or first_line(error)
