"""A network as a program of ATen operators, by ``torch.export``, with a free batch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from rarefy.batches import arguments, doubled, is_single, tensors
from rarefy.deployment.refusals import untraceable
from rarefy.graph.lengths import free_lengths
from rarefy.graph.model import GraphModel
from rarefy.types import Inputs


@dataclass(frozen=True)
class Traced:
    """An exported program.

    Attributes:
        program: what ``torch.export`` made.
        free: for each tensor of the inputs, whether its first dimension is free.
        names: names of the inputs.
    """

    program: ExportedProgram
    free: tuple[bool, ...]
    names: tuple[str, ...]


def at_least_two(inputs: Inputs) -> Inputs:
    """Inputs of two examples or more, since a dimension of 1 would be taken for a constant."""
    alone = all(is_single(t) for t in tensors(inputs) if t.ndim)
    return doubled(inputs) if alone else inputs


WAYS = (True, False)
"""Whether the batch is free: preferably, and where it cannot be."""


def trace(model: nn.Module, inputs: Inputs, ways: tuple[bool, ...] = WAYS) -> Traced:
    """The program of a network, of any batch size where its forward allows that.

    Args:
        model: the network, in eval mode.
        inputs: the examples.
        ways: whether the batch is free; the first that can be traced is taken.

    Raises:
        ExportError: ``torch.export`` cannot follow the forward; the module is named.
    """
    errors: list[Exception] = []
    for dynamic in ways:
        try:
            program = _program(model, inputs, dynamic)
        except Exception as error:  # noqa: BLE001 - export runs the user's code: anything may arise
            errors.append(error)
            continue
        given = set(program.graph_signature.user_inputs)
        nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in given]
        values = [n.meta["val"] for n in nodes if isinstance(n.meta["val"], Tensor)]
        free = tuple(v.ndim > 0 and _is_free(v.shape[0]) for v in values)
        return Traced(program, free, _input_names(model, inputs, [n.name for n in nodes]))
    raise untraceable(model, errors[-1]) from errors[-1]


def trace_flat(model: nn.Module, inputs: Inputs, ways: tuple[bool, ...] = WAYS) -> Traced:
    """As :func:`trace`; a captured network takes its inputs one by one, in their order.

    The forward of such a network has no named arguments, for whose sizes ONNX could have names.
    """
    if not isinstance(model, GraphModel):
        return trace(model, inputs, ways)
    leaves, _ = pytree.tree_flatten(arguments(inputs))
    _, spec = pytree.tree_flatten((tuple(leaves), {}))
    flat = model.with_graph(replace(model.graph, in_spec=pytree.treespec_dumps(spec)))
    traced = trace(flat, tuple(leaves), ways)
    if isinstance(inputs, Mapping) and len(inputs) == len(traced.names):
        return replace(traced, names=tuple(inputs))
    return traced


def _program(model: nn.Module, inputs: Inputs, dynamic: bool) -> ExportedProgram:
    def batch(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim else None

    args, kwargs = arguments(inputs)
    shapes: Any = None
    if dynamic:
        positional, named = pytree.tree_map(batch, args), pytree.tree_map(batch, kwargs)
        shapes = named or positional
        if isinstance(model, GraphModel):  # its forward takes (*args, **kwargs)
            shapes = {"kwargs": named} if named else {"args": positional}
    with free_lengths(model):
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _is_free(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _input_names(model: nn.Module, inputs: Inputs, placeholders: list[str]) -> tuple[str, ...]:
    if isinstance(inputs, Mapping) and len(inputs) == len(placeholders):
        return tuple(inputs)
    if isinstance(model, GraphModel):
        return tuple(node.name for node in model.graph.nodes if node.op == "input")
    return tuple(placeholders)


@contextlib.contextmanager
def fake_quantize_shapes() -> Iterator[None]:
    """Teach PyTorch the shape of its fake quantization, without which no batch can be free."""
    names = (
        "fake_quantize_per_tensor_affine_cachemask",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    )
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
                library.impl(
                    name,
                    lambda x, *_: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)),
                    "Meta",
                )
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Contain the exporter's prints, log messages and warnings."""
    names = ("torch", "torch.export", "torch.onnx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
