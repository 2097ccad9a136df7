"""Runtimes that serve networks, one row each. Each is imported only when it is used.

No session changes what it is given. Threads do not spin while they wait, so that several sessions
in one process do not take the processor from each other; of PyTorch's own threads that holds where
``OMP_WAIT_POLICY=PASSIVE`` was set before it was loaded.
"""

from __future__ import annotations

import difflib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rarefy.batches import tensors
from rarefy.deployment.executorch_session import ExecuTorchSession
from rarefy.deployment.modules import CompiledSession, EagerSession, check_threads
from rarefy.errors import FormatError, InputError, MissingExtraError, first_line
from rarefy.process import quiet_setup
from rarefy.types import Inputs

Array = np.ndarray[Any, Any]


class Session(Protocol):
    """A network that is loaded in a runtime.

    Attributes:
        version: the runtime with its version.
    """

    version: str

    def feed(self, inputs: Inputs) -> Any:
        """The inputs as the runtime takes them; whatever takes time once is done."""

    def run(self, feed: Any) -> Any:
        """Run on what :meth:`feed` returned: the call that is timed."""

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """The outputs."""

    def logits(self, inputs: Inputs) -> Tensor:
        """The output that holds the logits."""

    def close(self) -> None:
        """Give back what the session holds."""


# --- modules that are loaded late ---------------------------------------------------------------


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


def load_openvino() -> ModuleType:
    """The module ``openvino``, without its telemetry.

    Its import alone reports itself over the network and writes to the home directory, unless the
    package ``openvino_telemetry`` is not there.

    Raises:
        MissingExtraError: it is not installed.
    """
    name = "openvino_telemetry"
    hidden = name not in sys.modules and "openvino" not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        with quiet_setup():
            import openvino
            import openvino.frontend
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    finally:
        if hidden:
            del sys.modules[name]
    return openvino  # type: ignore[no-any-return]


@cache
def openvino_core() -> Any:
    """OpenVINO's entrance, one for the process, which is never given back.

    On processors with AMX each has a stack of its own for signal handlers, and puts back the one
    before it when it goes: of two that do not go in turn, one puts back what is gone, and the next
    signal, such as Ctrl-C, ends the process.
    """
    return load_openvino().Core()


# --- files --------------------------------------------------------------------------------------


class FileSession(ABC):
    """An ONNX file in a runtime, on the CPU.

    Args:
        path: the file.
        threads: intra-op threads.

    Raises:
        MissingExtraError: the runtime is not installed.
        InputError: there is no such file, or ``threads`` is below 1.
        FormatError: the runtime cannot load the file.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    version: str

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        check_threads(threads)
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(str(path), "there is no such file", "Export the network first")
        self._open(threads)

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        """Run the network.

        Args:
            inputs: a tensor, a tuple in the order of the file's inputs, or a mapping by name.

        Returns:
            The outputs in the order of the file.

        Raises:
            InputError: the inputs are not those of the file.
        """
        return [torch.from_numpy(np.array(value)) for value in self.run(self.feed(inputs))]

    def logits(self, inputs: Inputs) -> Tensor:
        """The output with the name ``logits``, or the first."""
        found = self(inputs)
        return found[self.outputs.index("logits") if "logits" in self.outputs else 0]

    def feed(self, inputs: Inputs) -> dict[str, Array]:
        """The inputs as arrays, by name.

        Raises:
            InputError: their number or names are not those of the file.
        """
        found = tensors(inputs)
        if isinstance(inputs, Mapping) and set(inputs) == set(self.inputs):
            found = [inputs[name] for name in self.inputs]
        if len(found) != len(self.inputs):
            raise InputError(
                self._where,
                f"{len(found)} inputs were given, the file has {list(self.inputs)}",
                "Give a tensor, a tuple in this order or a mapping with these names",
            )
        arrays = (np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in found)
        return dict(zip(self.inputs, arrays, strict=True))

    @abstractmethod
    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """Run on what :meth:`feed` returned: the call that is timed.

        What it returns may be overwritten by the next call.

        Raises:
            InputError: shapes or dtypes are not those of the file.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the runtime holds; the session cannot be used afterwards."""

    @abstractmethod
    def _open(self, threads: int) -> None:
        """Load the file."""

    @property
    def _where(self) -> str:
        return f"{self.name}({self.path.name!r})"

    def _unreadable(self, error: Exception) -> FormatError:
        return FormatError(
            str(self.path),
            f"{self.name} cannot load it: {first_line(error)}",
            f"Export it again, or update {self.name}",
        )

    def _refused(self, reason: str) -> InputError:
        return InputError(
            self._where,
            f"{self.name} refuses the inputs: {reason}",
            "Give inputs of the shapes and dtypes that the file was exported with",
        )


class OnnxSession(FileSession):
    """An ONNX file in onnxruntime, on the CPU.

    Example:
        >>> OnnxSession("net.onnx")(torch.randn(1, 3, 32, 32))[0].shape  # doctest: +SKIP
        torch.Size([1, 10])
    """

    name = "onnxruntime"
    settings: ClassVar[Mapping[str, str]] = {}

    def _open(self, threads: int) -> None:
        self.version = f"onnxruntime {load_onnxruntime().__version__}"
        options = _options(threads)
        for key, value in self.settings.items():
            options.add_session_config_entry(key, value)
        self.session = self._loaded(options)
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self.outputs = tuple(value.name for value in self.session.get_outputs())

    def _loaded(self, options: Any) -> Any:
        providers = ["CPUExecutionProvider"]
        try:
            return load_onnxruntime().InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:
            raise self._unreadable(error) from error

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """Run on what :meth:`feed` returned: the call that is timed.

        Raises:
            InputError: shapes or dtypes are not those of the file.
        """
        try:
            return self.session.run(None, feed)  # type: ignore[no-any-return]
        except Exception as error:
            if "Invalid" not in type(error).__name__:
                raise
            raise self._refused(str(error).splitlines()[0]) from error

    def close(self) -> None:
        """Free what the runtime holds; the session cannot be used afterwards."""
        self.session = None


class ExactOnnxSession(OnnxSession):
    """As :class:`OnnxSession`, with all products that the file has in float computed in float.

    By itself onnxruntime rounds the inputs of a MatMul with int4 or int8 weights to int8, block by
    block. The file says nothing of that, so that a proof of the file leaves it out.
    """

    settings: ClassVar[Mapping[str, str]] = {"session.qdq_matmulnbits_accuracy_level": "1"}


def _options(threads: int) -> Any:
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


class OpenVinoSession(FileSession):
    """An ONNX file in OpenVINO, on the CPU, in the precision that the file states.

    OpenVINO would compute float32 in bfloat16 where the processor can, and reads inputs of a wrong
    shape as if they had the right one; neither happens here.

    Example:
        >>> OpenVinoSession("net.onnx")(torch.randn(1, 3, 32, 32))[0].shape  # doctest: +SKIP
        torch.Size([1, 10])
    """

    name = "openvino"

    def _open(self, threads: int) -> None:
        self._module = load_openvino()
        self.version = f"openvino {self._module.__version__.partition('-')[0]}"
        try:
            # The reader of this one format: others print what they think of the file.
            reader = self._module.frontend.FrontEndManager().load_by_framework("onnx")
            model = reader.convert(reader.load(str(self.path)))
            compiled = openvino_core().compile_model(model, "CPU", _properties(threads))
        except Exception as error:
            raise self._unreadable(error) from error
        self.inputs = tuple(port.get_any_name() for port in compiled.inputs)
        self.outputs = tuple(port.get_any_name() for port in compiled.outputs)
        self._ports = dict(zip(self.inputs, compiled.inputs, strict=True))
        self._request = compiled.create_infer_request()

    def feed(self, inputs: Inputs) -> dict[str, Array]:
        """The inputs as arrays, by name.

        Raises:
            InputError: their number, names, shapes or dtypes are not those of the file.
        """
        found = super().feed(inputs)
        for name, array in found.items():
            shape, kind = (
                self._ports[name].get_partial_shape(),
                self._ports[name].get_element_type().to_dtype(),
            )
            fits = shape.compatible(self._module.PartialShape(list(array.shape)))
            if not fits or array.dtype != kind:
                raise self._refused(
                    f"{name!r} is {array.dtype}{list(array.shape)} instead of {kind}{shape}"
                )
        return found

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """Run on what :meth:`feed` returned: the call that is timed.

        What it returns is overwritten by the next call.
        """
        for name, array in feed.items():
            self._request.set_tensor(name, self._module.Tensor(array, shared_memory=True))
        self._request.infer()
        return [tensor.data for tensor in self._request.output_tensors]

    def close(self) -> None:
        """Free what the runtime holds; the session cannot be used afterwards."""
        self._request, self._ports = None, {}


def _properties(threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
        "LOG_LEVEL": "LOG_NONE",
    }


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
        OnnxSession(path)._loaded(options)
        graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(node.op_type for node in graph.node)


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """A row of :data:`RUNTIMES`.

    Attributes:
        open: (what it serves, threads) -> a session.
        form: suffix of the files that it serves. A ``.pt2`` file is loaded as a network.
        widths: precision -> the number whose multiples are widths that it computes fast: the
            channels of one vector. In float32, 33 channels took 61 % longer than 32.
        layers: the runtime in which single layers are timed.
    """

    open: Callable[[Any, int], Session]
    form: Literal[".onnx", ".pt2", ".pte"]
    widths: Mapping[str, int]
    layers: str

    @property
    def serves(self) -> Literal["file", "module"]:
        """What is opened: a file, or a network in PyTorch."""
        return "module" if self.form == ".pt2" else "file"


FLOAT = {"float32": 16}
FAST = {**FLOAT, "int8": 32}

RUNTIMES: Mapping[str, Runtime] = {
    "onnxruntime": Runtime(OnnxSession, ".onnx", FAST, "onnxruntime"),
    "openvino": Runtime(OpenVinoSession, ".onnx", FAST, "openvino"),
    "eager": Runtime(EagerSession, ".pt2", FLOAT, "eager"),
    # The compiler calls the same kernels for the layers that are timed, and fuses what is between.
    "compile": Runtime(CompiledSession, ".pt2", FLOAT, "eager"),
    # A file takes seconds to write, too long for every single layer.
    "executorch": Runtime(ExecuTorchSession, ".pte", FAST, "eager"),
}
"""Name of a runtime -> how it serves networks."""


def runtime_named(name: str) -> Runtime:
    """A row of :data:`RUNTIMES`.

    Raises:
        InputError: there is no runtime of this name; the message has the nearest.
    """
    if name in RUNTIMES:
        return RUNTIMES[name]
    near = difflib.get_close_matches(str(name).lower(), RUNTIMES, 1)
    known = f"Use one of {', '.join(RUNTIMES)}"
    raise InputError(
        f"runtime={name!r}",
        "unknown runtime",
        f"Did you mean {near[0]!r}? {known}" if near else known,
    )
