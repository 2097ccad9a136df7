"""Networks that PyTorch itself runs: operator by operator, or compiled."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import arguments, logits, map_tensors, tensors
from rarefy.copies import copied
from rarefy.errors import InputError, first_line
from rarefy.types import Inputs, is_count


def check_threads(threads: int) -> None:
    """Refuse a number of threads that is none.

    Raises:
        InputError: it is no whole number, or below 1.
    """
    if not is_count(threads):
        raise InputError(f"threads={threads!r}", "at least one is needed", "Write threads=1")


class EagerSession:
    """A copy of a network in PyTorch, operator by operator.

    PyTorch's number of threads is the process's. It is set while the session is open.

    Args:
        model: the network, which is left as it is.
        threads: intra-op threads.

    Raises:
        InputError: ``threads`` is below 1.
    """

    name = "eager"

    def __init__(self, model: nn.Module, threads: int = 1) -> None:
        check_threads(threads)
        self.model = copied(model).eval()
        self.version = f"PyTorch {torch.__version__}, {self.name}"
        self._before: int | None = torch.get_num_threads()
        torch.set_num_threads(threads)

    def feed(self, inputs: Inputs) -> Any:
        """The inputs as arguments, after a first call with them.

        Raises:
            InputError: the network does not run on them.
        """
        found = arguments(map_tensors(lambda t: t.detach().contiguous().clone(), inputs))
        try:
            self.run(found)
        except Exception as error:
            raise InputError(
                f"{type(self.model).__name__} in {self.name}",
                f"it does not run on the inputs: {first_line(error)}",
                "Give inputs as the network's forward takes them",
            ) from error
        return found

    def run(self, feed: Any) -> Any:
        """Run on what :meth:`feed` returned: the call that is timed."""
        args, kwargs = feed
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """The tensors among the outputs."""
        return tensors(pytree.tree_leaves(self.run(self.feed(inputs))))

    def logits(self, inputs: Inputs) -> Tensor:
        """The logits, see :func:`rarefy.batches.logits`."""
        return logits(self.run(self.feed(inputs)))

    def close(self) -> None:
        """Give PyTorch back its number of threads."""
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None


class CompiledSession(EagerSession):
    """A copy of a network in PyTorch, compiled by ``torch.compile`` for the shapes it meets.

    Its options are the defaults: weights are not frozen, so that BatchNorm is not folded.
    Compiled code is kept in PyTorch's own cache folder, as every use of ``torch.compile`` does.

    Args:
        model: the network, which is left as it is.
        threads: intra-op threads.

    Raises:
        InputError: ``threads`` is below 1.
    """

    name = "compile"

    def __init__(self, model: nn.Module, threads: int = 1) -> None:
        super().__init__(model, threads)
        self._compiled: Callable[..., Any] = torch.compile(_own(_forward), dynamic=False)

    def feed(self, inputs: Inputs) -> Any:
        """The inputs as arguments, after the network was compiled for them.

        Raises:
            InputError: the network does not run on them, or there is no C++ compiler.
        """
        try:
            with _silent():
                return super().feed(inputs)
        except InputError as error:
            if not any(type(cause).__name__ in NO_COMPILER for cause in _causes(error)):
                raise
            raise InputError(
                "runtime='compile'",
                "torch.compile finds no C++ compiler that works",
                "Install one, such as g++, or choose another runtime",
            ) from error

    def run(self, feed: Any) -> Any:
        """Run on what :meth:`feed` returned: the call that is timed."""
        with torch.no_grad():
            return self._compiled(self.model, *feed)


NO_COMPILER = ("InvalidCxxCompiler", "CppCompileError")
"""Names of the errors by which PyTorch says that it cannot compile C++."""


def _forward(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: PyTorch keeps what it compiled with the code, and
    compiles no more after a few networks."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the compiler's remarks on its own settings and on hardware that is not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
