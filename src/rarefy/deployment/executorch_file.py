"""A network as a ``.pte`` file, a program of ExecuTorch for phones and small devices."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rarefy.deployment.executorch_session import (
    SUFFIX,
    ExecuTorchSession,
    contained,
    load_executorch,
)
from rarefy.deployment.proof import Run
from rarefy.deployment.refusals import unrunnable, unwritable
from rarefy.deployment.tracing import WAYS, Traced, quiet, trace
from rarefy.deployment.xnnpack import integers
from rarefy.errors import FormatError, InputError
from rarefy.types import Inputs


class ExecuTorchFile:
    """A traced network in the form of ExecuTorch, with XNNPACK for all that it computes.

    Args:
        model: the network, in eval mode.
        source: what was traced: the network, or its graph.
        traced: its program, which is changed in place.
        inputs: the examples.

    Raises:
        ExportError: ExecuTorch has no operator or no kernel for a call of the network.
    """

    def __init__(self, model: nn.Module, source: nn.Module, traced: Traced, inputs: Inputs) -> None:
        self.source = source
        exir = load_executorch("executorch.exir")
        found = load_executorch("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        load_executorch("executorch.kernels.quantized")
        integers(traced.program)
        try:
            with quiet(), contained():
                self.edge = exir.to_edge_transform_and_lower(
                    traced.program,
                    partitioner=[found.XnnpackPartitioner()],
                    compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
                )
                self.lowered = self.edge.to_executorch()
        except Exception as error:
            raise unwritable(source, traced.program, error, SUFFIX) from error

    @staticmethod
    def require(check: bool) -> None:
        """Pass where all that is needed is installed.

        Raises:
            MissingExtraError: something is not.
        """
        load_executorch()

    @staticmethod
    def trace(model: nn.Module, inputs: Inputs, ways: tuple[bool, ...] = WAYS) -> Traced:
        """The program of a network; the batch is free in the ways to try, in this order."""
        return trace(model, inputs, ways)

    def save(self, path: Path) -> None:
        """Write the file."""
        with path.open("wb") as file:
            self.lowered.write_to_file(file)

    def open(self, path: Path) -> Run:
        """The file in ExecuTorch.

        Raises:
            ExportError: it cannot load the file, or (when called) run it.
        """
        try:
            session = ExecuTorchSession(path, threads=None)
        except FormatError as error:
            raise unrunnable(self.source, error.what, self._origins()) from error

        def run(inputs: Inputs) -> list[Tensor]:
            try:
                return session(inputs)
            except InputError as error:
                raise unrunnable(self.source, error.what, self._origins()) from error

        return run

    def _origins(self) -> dict[str, tuple[str, str]]:
        """What the runtime calls an operator -> the operator, and the path of its module."""
        found: dict[str, tuple[str, str]] = {}
        for node in self.lowered.exported_program().graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            path = [("", ""), *stack.values()][-1][0]
            found.setdefault(str(node.target).partition(".")[2], (str(node.target), path))
        return found
