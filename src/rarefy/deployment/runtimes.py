"""Runtimes that serve exported files. Each is imported only when it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.batches import tensors
from rarefy.errors import FormatError, InputError, MissingExtraError
from rarefy.types import Inputs

WIDTHS: Mapping[str, int] = {"onnxruntime": 16}
"""Name of a runtime -> the number whose multiples are widths that it computes fast in float32: the
channels of one vector. 33 channels took 61 % longer than 32; in int8, multiples of 32 are fast."""


def load_onnx() -> ModuleType:
    """The module ``onnx``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "onnx") from error
    return onnx


def load_onnxruntime() -> ModuleType:
    """The module ``onnxruntime``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    return onnxruntime  # type: ignore[no-any-return]


class OnnxSession:
    """An ONNX file in onnxruntime, on the CPU.

    Threads do not spin while they wait, so that several sessions in one process do not take the
    processor from each other.

    Args:
        path: the file.
        threads: intra-op threads.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        InputError: there is no such file, or ``threads`` is below 1.
        FormatError: onnxruntime cannot load the file.

    Example:
        >>> OnnxSession("net.onnx")(torch.randn(1, 3, 32, 32))[0].shape  # doctest: +SKIP
        torch.Size([1, 10])
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path = Path(path)
        self.session = _session(self.path, _options(threads))
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self.outputs = tuple(value.name for value in self.session.get_outputs())

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Run the network.

        Args:
            inputs: a tensor, a tuple in the order of the file's inputs, or a mapping by name.

        Returns:
            The outputs in the order of the file.

        Raises:
            InputError: the inputs are not those of the file.
        """
        return [torch.from_numpy(value) for value in self.run(self.feed(inputs))]

    def feed(self, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs as onnxruntime takes them, by name.

        Raises:
            InputError: their number or names are not those of the file.
        """
        if isinstance(inputs, Mapping) and set(inputs) == set(self.inputs):
            return {name: inputs[name].detach().cpu().numpy() for name in self.inputs}
        found = tensors(inputs)
        if len(found) != len(self.inputs):
            raise InputError(
                f"OnnxSession({self.path.name!r})",
                f"{len(found)} inputs were given, the file has {list(self.inputs)}",
                "Give a tensor, a tuple in this order or a mapping with these names",
            )
        return {
            name: tensor.detach().cpu().numpy()
            for name, tensor in zip(self.inputs, found, strict=True)
        }

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run on what :meth:`feed` returned: the call that is timed.

        Raises:
            InputError: shapes or dtypes are not those of the file.
        """
        try:
            return self.session.run(None, feed)  # type: ignore[no-any-return]
        except Exception as error:
            if "Invalid" not in type(error).__name__:
                raise
            raise InputError(
                f"OnnxSession({self.path.name!r})",
                f"onnxruntime refuses the inputs: {str(error).splitlines()[0]}",
                "Give inputs of the shapes and dtypes that the file was exported with",
            ) from error


def _options(threads: int) -> Any:
    if threads < 1:
        raise InputError(f"threads={threads!r}", "at least one is needed", "Write threads=1")
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _session(path: Path, options: Any) -> Any:
    if not path.is_file():
        raise InputError(str(path), "there is no such file", "Export the network first")
    try:
        return load_onnxruntime().InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        if isinstance(error, MissingExtraError):
            raise
        raise FormatError(
            str(path),
            f"onnxruntime cannot load it: {str(error).splitlines()[0][:300]}",
            "Export it again, or update onnxruntime",
        ) from error


def optimized_ops(path: str | Path) -> Counter[str]:
    """How often each operator occurs in the graph that onnxruntime really runs.

    Args:
        path: an ONNX file.

    Returns:
        Operator type to count, after all fusions: ``QLinearConv`` is a convolution in int8,
        ``Conv`` one in float.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        FormatError: onnxruntime cannot load the file.
    """
    onnx = load_onnx()
    with TemporaryDirectory() as folder:
        options = _options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _session(Path(path), options)
        graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(node.op_type for node in graph.node)
