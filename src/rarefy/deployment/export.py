"""A network as a file for a runtime, proven to compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from rarefy.batches import evaluating, map_tensors
from rarefy.copies import ordinary
from rarefy.deployment.executorch_file import ExecuTorchFile
from rarefy.deployment.onnx_file import OnnxFile
from rarefy.deployment.program_file import ProgramFile
from rarefy.deployment.proof import Run, prove
from rarefy.deployment.tracing import WAYS, Traced, at_least_two, fake_quantize_shapes, quiet
from rarefy.errors import ExportError, InputError, OutputError
from rarefy.files import replacing
from rarefy.graph.stubs import plain_graph, stubs
from rarefy.types import Inputs, check_network


class Target(Protocol):
    """A form of file. An instance is a traced network in that form."""

    def __init__(
        self, model: nn.Module, source: nn.Module, traced: Traced, inputs: Inputs
    ) -> None: ...

    @staticmethod
    def require(check: bool) -> None:
        """Pass where all that is needed is installed."""

    @staticmethod
    def trace(model: nn.Module, inputs: Inputs, ways: tuple[bool, ...] = WAYS) -> Traced:
        """The program of a network; the batch is free in the ways to try, in this order."""

    def save(self, path: Path) -> None:
        """Write the file."""

    def open(self, path: Path) -> Run:
        """Load the file in the runtime that is to prove it."""


TARGETS: Mapping[str, type[Target]] = {
    ".onnx": OnnxFile,
    ".pt2": ProgramFile,
    ".pte": ExecuTorchFile,
}
"""Suffix of a file -> its form."""


def export(
    model: nn.Module, path: str | Path, example_inputs: Inputs, *, check: bool = True
) -> Path:
    """Write a network to a file for a runtime, and prove that the file computes the same.

    The suffix of the path says which form: ``.onnx``, proven in onnxruntime; ``.pt2``, the form of
    ``torch.export``, proven in PyTorch; or ``.pte``, the form of ExecuTorch for phones and small
    devices, proven in its runtime. The first dimension of the inputs is free where the network
    allows it.

    As ONNX, a network from :func:`rarefy.quantize` is written in integers: weights as int8, biases
    as int32, activations between QuantizeLinear and DequantizeLinear. Weights that were rounded
    alone (``WeightOnly``) become int8 or int4, with a DequantizeLinear.

    As ``.pt2``, both kinds of weights are stored as integers of 8 bits, or two of 4 bits to a byte,
    with their scales, and the program makes float weights of them at each call, bit for bit those
    of the network. It computes in float, as PyTorch does: activations are rounded to their grids,
    and no product is one of integers. Palettes, zeros and half precision are stored as floats. The
    examples are not stored. PyTorch reads the file with ``torch.export.load(path).module()``.

    As ``.pte``, XNNPACK gets all that it has kernels for, and ExecuTorch itself does the rest.
    Convolutions and linear layers of a network from ``quantize(..., Int8())`` compute with int8
    there; one whose result is not rounded, such as the last layer, rounds its inputs once more, on
    the range of each row or image as it comes. Layers that XNNPACK cannot compute so (depthwise
    ones of that kind, LSTMs) and weights that were rounded alone (``WeightOnly``) are floats, in
    the file as well; ``Int8(activations="dynamic")`` makes linear layers small. ExecuTorch plans
    memory ahead: a free batch goes from 1 to as many examples as were given, or to 2 where one was
    given.

    Args:
        model: any module, taken in eval mode; left as it is.
        path: the file to write; an older one is replaced when the new one is complete.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        check: compare the file's outputs with the network's, on the examples and, where the
            first dimension is free, on the first of them alone.

    Returns:
        The path.

    Raises:
        InputError: the suffix is none of these, or the model is no module.
        ExportError: an operator cannot be exported (the message names it and its module), or the
            file computes something else (the message has the figures); nothing is written.
        OutputError: the path cannot be written.
        MissingExtraError: for ONNX, onnx, onnxscript or (for the check) onnxruntime is not
            installed; for ``.pte``, executorch.

    Example:
        >>> export(nn.Linear(4, 2), "/tmp/net.pt2", torch.randn(8, 4)).name
        'net.pt2'
    """
    check_network(model, "export(model)")
    model = ordinary(model)
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise OutputError(
            f"export({str(path)!r})", "no file can be written there", "Check the path"
        )
    target = _target(path)
    target.require(check)
    inputs = map_tensors(torch.Tensor.contiguous, at_least_two(example_inputs))
    with evaluating(model), quiet(), fake_quantize_shapes():
        source = plain_graph(model, inputs) if stubs(model) else model
        traced, made = _made(target, model, source, inputs)
    try:
        with replacing(path) as draft:
            made.save(draft)
            if check:
                prove(model, lambda: made.open(draft), inputs, traced.free)
    except OSError as error:
        remedy = "Check the path, and the free space of its disk"
        raise OutputError(f"export({str(path)!r})", str(error), remedy) from error
    return path


def _made(
    target: type[Target], model: nn.Module, source: nn.Module, inputs: Inputs
) -> tuple[Traced, Target]:
    """The network in its form, with a free batch where that can be written."""
    traced = target.trace(source, inputs)
    try:
        return traced, target(model, source, traced, inputs)
    except ExportError:
        if not any(traced.free):
            raise
    traced = target.trace(source, inputs, (False,))
    return traced, target(model, source, traced, inputs)


def _target(path: Path) -> type[Target]:
    """The form that a suffix stands for.

    Raises:
        InputError: it stands for none.
    """
    found = TARGETS.get(path.suffix.lower())
    if found is None:
        raise InputError(
            f"export({str(path)!r})",
            f"the suffix {path.suffix!r} is that of no file that can be written",
            "Write .onnx for onnxruntime and OpenVINO, .pt2 for PyTorch (torch.export), or .pte "
            "for ExecuTorch",
        )
    return found
