"""Model and example inputs -> :class:`~rarefy.graph.program.Graph`, through ``torch.export``."""

from __future__ import annotations

import dataclasses
import inspect
import io
import linecache
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from rarefy.batches import (
    arguments,
    call,
    doubled,
    evaluating,
    is_single,
    map_tensors,
    seeded,
    tensors,
    unchanged,
)
from rarefy.errors import CaptureError, InputError, first_line
from rarefy.graph.convert import constants, convert, read_once
from rarefy.graph.declarations import is_known
from rarefy.graph.lengths import free_lengths
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Graph, Node, Spec
from rarefy.types import Inputs


@dataclass(frozen=True)
class Capture:
    """A graph with the constants that it reads but that the model does not own.

    Attributes:
        graph: the computation in eval mode, with a dynamic batch where the network allows it. It
            holds what ``forward`` computes for nothing, too; ``graph.live`` does not.
        constants: tensors made inside ``forward`` (``torch.tensor([...])``), by path.
    """

    graph: Graph
    constants: Mapping[str, Tensor]


def capture(model: nn.Module, example_inputs: Inputs, *, training: bool = False) -> Capture:
    """Capture what ``model`` computes on inputs like ``example_inputs``, in eval mode.

    Nothing is computed: sizes and dtypes alone go through the network, which may be on the meta
    device. The model is left as it was: training flags, buffers, attributes and gradients. Inputs
    of batch size 1 are doubled first, since a dimension of size 1 would be taken for a constant.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        training: capture training mode instead, with the decisions that it makes on these inputs.

    Raises:
        InputError: the inputs are of no known form or empty, or the network does not run on them.
        CaptureError: ``torch.export`` cannot follow the network; the message names the line.
    """
    if isinstance(model, GraphModel):
        return Capture(model.graph, {})
    _check_model(model)
    _check_inputs(example_inputs)
    with ExitStack() as stack:
        for context in (
            unchanged(model, values=training),
            _functions_forget(model),
            plain_attention(model),
            free_lengths(model),
            _quiet(),
            seeded(0),
            evaluating(model, training=training),
        ):
            stack.enter_context(context)
        program = (_decided if training else _program)(model, example_inputs)
    graph = convert(program)
    if any(_mixes_dtypes(graph, node) for node in graph.calls):
        check_runs(model, example_inputs)
    return Capture(read_once(graph, model), constants(program))


def graph_model(model: nn.Module, captured: Capture) -> GraphModel:
    """The captured network as a module that shares its tensors with ``model``.

    Raises:
        CaptureError: the graph holds an operator that PyTorch does not find by its name.
    """
    graph = captured.graph.live
    for node in graph.calls:
        if not is_known(node.op):
            raise CaptureError(
                f"graph of {type(model).__name__}",
                f"it calls {node.op}, which is no registered operator"
                + (f" (at {node.source})" if node.source else ""),
                "Take that call out of the network, or compress the parts around it",
            )
    paths = graph.tensor_paths
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(captured.constants) | dict(model.named_buffers(remove_duplicate=False))
    return GraphModel(
        graph,
        {path: tensor for path, tensor in parameters.items() if path in paths},
        {path: tensor for path, tensor in buffers.items() if path in paths},
    )


# --- what can be captured ----------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    """Refuse what is no plain module, with the way to one."""
    try:
        with evaluating(model):
            pass
    except NotImplementedError as error:
        raise InputError(
            type(model).__name__,
            "it cannot be set to eval mode",
            "Give the network as it was before torch.export",
        ) from error
    for path, module in model.named_modules():
        where = f"{type(model).__name__}{'.' if path else ''}{path}"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                where,
                "it is a TorchScript module, whose Python code is gone",
                "Give the network as it was before torch.jit.script or torch.jit.trace",
            )
        if "_orig_mod" in module._modules:
            raise InputError(
                where,
                "it was made by torch.compile",
                "Give the network as it was before (its attribute _orig_mod), and compile the "
                "result",
            )
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise InputError(
                f"parameter {path}",
                "it is lazy: its shape is not known yet",
                "Run the network once on an example, or load a checkpoint into it",
            )


def _check_inputs(inputs: Inputs) -> None:
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise InputError(
            "example_inputs",
            f"they are a {type(inputs).__name__}",
            "Give a tensor, a tuple of arguments or a mapping of keyword arguments",
        )
    if any(tensor.ndim and not len(tensor) for tensor in tensors(inputs)):
        raise InputError("example_inputs", "they hold no example", "Give at least one example")


def check_runs(model: nn.Module, inputs: Inputs, *, training: bool = False) -> Any:
    """Run the network as it is, in eval mode or in training mode, and return its outputs.

    Raises:
        InputError: it does not run; the message tells its own error and line.
    """
    try:
        with unchanged(model), seeded(0), evaluating(model, training=training):
            return call(model, map_tensors(torch.clone, inputs))
    except Exception as error:
        given = ", ".join(map(_described, tensors(inputs))) or "no tensor"
        raise InputError(
            "example_inputs",
            f"{type(model).__name__} does not run on them ({given}): "
            f"{first_line(error)}{_user_line(error)}",
            "Give inputs of the shapes, dtypes and device that its forward takes",
        ) from error


_CONTRACTIONS = frozenset("linear matmul mm bmm addmm baddbmm conv1d conv2d conv3d einsum".split())


def _mixes_dtypes(graph: Graph, node: Node) -> bool:
    """Whether a contraction has operands of two dtypes, which only real tensors refuse."""
    values = [graph.by_name[name].value for name in node.inputs]
    dtypes = {value.dtype for value in values if isinstance(value, Spec)}
    return node.kind in _CONTRACTIONS and len(dtypes) > 1


def _described(tensor: Tensor) -> str:
    place = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{place}"


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """``nn.TransformerEncoder`` and the like as the operators that they consist of.

    Their fast path is one operator that nobody can look into, and they look into the values of
    their mask for a hint that changes no result.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    hooks = [
        module.register_forward_pre_hook(partial(_without_hint, hint=hint), with_kwargs=True)
        for module in model.modules()
        for kind, hint in _HINTS.items()
        if isinstance(module, kind)
    ]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for hook in hooks:
            hook.remove()


_HINTS = {nn.TransformerEncoder: "is_causal", nn.TransformerDecoder: "tgt_is_causal"}


def _without_hint(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hint: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.arguments[hint] = bool(bound.arguments.get(hint))
    return bound.args, bound.kwargs


@contextmanager
def _functions_forget(model: nn.Module) -> Iterator[None]:
    """Functions with ``lru_cache`` forget what they computed of tensors that hold no values."""
    classes = {type(module) for module in model.modules()}
    spaces: list[Mapping[str, Any]] = [vars(kind) for kind in classes]
    modules = {sys.modules.get(kind.__module__) for kind in classes}
    spaces += [vars(module) for module in modules if module is not None]
    found = [f for space in spaces for f in space.values() if isinstance(f, _Cached)]
    misses = [f.cache_info().misses for f in found]
    try:
        yield
    finally:
        for function, before in zip(found, misses, strict=True):
            if function.cache_info().misses > before:
                function.cache_clear()


_Cached = type(lru_cache(lambda: None))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and log lines of torch; what else is written to stderr passes on success."""
    level, written = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(written):
            warnings.simplefilter("ignore")
            yield
        sys.stderr.write(written.getvalue())
    finally:
        logging.disable(level)


# --- routes ------------------------------------------------------------------------------------


def _program(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The exported network, by the first route that holds for the inputs.

    Every route writes down what forward computes for all values of inputs of these shapes: a
    decision that depends on values stops it.
    """
    if any(map(is_single, tensors(inputs))):
        with suppress(Exception):  # what is wrong is told by the inputs as they are
            program = _free(model, doubled(inputs))
            if _holds_for(program, inputs):
                return program
    found = _first(model, inputs, (_free, _fixed))
    if isinstance(found, ExportedProgram):
        return found
    outputs = check_runs(model, inputs)
    changed = _register((inputs, outputs)) | _leave_out_caches(model, outputs)
    again = _first(model, inputs, (_free, _fixed, _bytecode) if changed else (_bytecode,))
    if isinstance(again, ExportedProgram):
        return again
    raise _failure(model, found) from found


def _first(
    model: nn.Module, inputs: Inputs, routes: Sequence[Route]
) -> ExportedProgram | Exception:
    """The program of the first route that works, or the error of the first that does not."""
    errors: list[Exception] = []
    for route in routes:
        try:
            return route(model, inputs)
        except Exception as error:  # noqa: BLE001 - export runs the user's code: anything may arise
            errors.append(error)
    return errors[0]


def _decided(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The exported network for these inputs alone: it is run, and decides by the values it meets.

    That is enough to see what meets what in training mode, which skips layers at random.
    """
    given = doubled(inputs) if any(map(is_single, tensors(inputs))) else inputs
    try:
        with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
            return _fixed(model, given)
    except Exception as error:
        raise _failure(model, error) from error


def _free(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Run forward on sizes alone; the first dimension of every tensor is free."""
    args, kwargs = arguments(inputs)
    spec = _free_batch(model, args, kwargs)
    return torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False)


def _fixed(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Run forward on sizes alone, which are those of the inputs."""
    return torch.export.export(model, *arguments(inputs), strict=False)


def _bytecode(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Follow the bytecode of forward, which carries NumPy and ``float(tensor)`` too."""
    return torch.export.export(model, *arguments(inputs), strict=True)


Route: TypeAlias = Callable[[nn.Module, Inputs], ExportedProgram]


def _holds_for(program: ExportedProgram, inputs: Inputs) -> bool:
    """Whether what was captured on doubled inputs holds for these: what was doubled is free."""
    signature = program.graph_signature
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    doubled: set[Any] = set()
    others: set[Any] = set()
    for leaf, name in zip(
        pytree.tree_leaves(arguments(inputs)), signature.user_inputs, strict=True
    ):
        value = values.get(str(name))
        if isinstance(leaf, Tensor) and isinstance(value, Tensor):
            free = {s for size in value.shape for s in free_symbols(size)}
            if is_single(leaf) and not free:
                return False
            (doubled if is_single(leaf) else others).update(free)
    return not doubled & others


def _free_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """For every argument of forward, by name, that the first dimension of its tensors is free."""

    def batch(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim else None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(batch, value) for name, value in bound.items()}


def _register(values: Any) -> bool:
    """Make dataclasses among nested values known to pytree, which keeps their structure."""
    found = False
    for leaf in pytree.tree_leaves(values):
        kind = type(leaf)
        if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
            name = f"{kind.__module__}.{kind.__qualname__}"
            with suppress(ValueError):  # its fields cannot be told from outside
                torch.export.register_dataclass(kind, serialized_type_name=name)
                found = True
                _register(leaf)
    return found


def _leave_out_caches(model: nn.Module, outputs: Any) -> bool:
    """Let forward return no key-value cache, until the model is put back as it was.

    A cache is for the network's own next call: its width follows that of the layers that fill it,
    which an output of the network must not.
    """
    if not any(map(_is_cache, pytree.tree_leaves(outputs))):
        return False
    forward = model.forward

    @wraps(forward)
    def without(*args: Any, **kwargs: Any) -> Any:
        returned = forward(*args, **kwargs)
        return pytree.tree_map(lambda leaf: None if _is_cache(leaf) else leaf, returned)

    model.forward = without
    return True


def _is_cache(leaf: Any) -> bool:
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(leaf).__mro__}
    return "transformers.cache_utils.Cache" in names


def _failure(model: nn.Module, error: Exception) -> CaptureError:
    text = str(error)
    _, what, remedy = next(cause for cause in _CAUSES if cause[0] in text)
    return CaptureError(
        f"capture of {type(model).__name__}",
        f"{what}: {first_line(error)}{_user_line(error)}",
        remedy,
    )


_CAUSES = (
    (
        "data-dependent",
        "its forward decides by the values of tensors, so one graph cannot stand for it",
        "Replace Python decisions on tensor values (if, while, range, int) by torch.where, or move "
        "them out of forward",
    ),
    (
        "same device",
        "its parameters and the example inputs are on different devices",
        "Move the network and the inputs to one device",
    ),
    (
        "not a known type",
        "its forward returns an object that torch.export cannot take apart",
        "Return tensors, tuples, lists, dictionaries or dataclasses",
    ),
    (
        "",
        "torch.export cannot follow its forward",
        "Change that line, or move it out of forward: the network must compute with PyTorch alone",
    ),
)
"""Words of torch's message, what they mean, and what to do; the last row is for all others."""

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def _user_line(error: BaseException) -> str:
    """The deepest line outside of torch and rarefy that the error came through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((*_OWN, "<")):
            line = linecache.getline(name, trace.tb_lineno).strip()
            found = f" (at {name}:{trace.tb_lineno}: {line})"
        trace = trace.tb_next
    return found
