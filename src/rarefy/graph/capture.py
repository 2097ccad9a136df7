"""Model and example inputs -> :class:`~rarefy.graph.program.Graph`, through ``torch.export``."""

from __future__ import annotations

import inspect
import linecache
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from rarefy.batches import arguments, call, evaluating, map_tensors, tensors
from rarefy.errors import CaptureError, InputError, first_line
from rarefy.graph.program import (
    SCALAR_OPS,
    Graph,
    GraphModel,
    Node,
    Ref,
    Spec,
    Value,
    is_known,
    schema,
    shares_memory,
    substitute,
    writes,
)
from rarefy.types import Inputs


@dataclass(frozen=True)
class Capture:
    """A graph with the constants that it reads but that the model does not own.

    Attributes:
        graph: the computation in eval mode, with a dynamic batch where the network allows it.
        constants: tensors made inside ``forward`` (``torch.tensor([...])``), by path.
    """

    graph: Graph
    constants: Mapping[str, Tensor]


def capture(model: nn.Module, example_inputs: Inputs) -> Capture:
    """Capture what ``model`` computes on inputs like ``example_inputs``, in eval mode.

    The model is left as it was: training flags, buffers and gradients are untouched. Inputs of
    batch size 1 are doubled first, since a dimension of size 1 would be taken for a constant.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        InputError: the inputs are of no known form or empty, or the network does not run on them.
        CaptureError: ``torch.export`` cannot follow the network; the message names the line.
    """
    if isinstance(model, GraphModel):
        return Capture(model.graph, {})
    _check_inputs(example_inputs)
    inputs = _widen(example_inputs)
    args, kwargs = arguments(inputs)
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_runs(model, inputs)
        program = _export(model, args, kwargs)
    for name, buffer in model.named_buffers():
        if buffer.shape == buffers[name].shape:
            buffer.data.copy_(buffers[name])
    graph = _read_once(_convert(program), model)
    return Capture(graph, dict(_constants(program)))


def _check_inputs(inputs: Inputs) -> None:
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise InputError(
            "example_inputs",
            f"they are a {type(inputs).__name__}",
            "Give a tensor, a tuple of arguments or a mapping of keyword arguments",
        )
    if any(tensor.ndim and not len(tensor) for tensor in tensors(inputs)):
        raise InputError("example_inputs", "they hold no example", "Give at least one example")


def _check_runs(model: nn.Module, inputs: Inputs) -> None:
    """Run the network as it is: its own error says more than that of the export."""
    try:
        call(model, map_tensors(torch.clone, inputs))
    except Exception as error:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors(inputs))
        raise InputError(
            "example_inputs",
            f"{type(model).__name__} does not run on them ({shapes.replace('torch.', '')}): "
            f"{first_line(error)}{_user_line(error)}",
            "Give inputs of the shapes and dtypes that its forward takes",
        ) from error


def graph_model(model: nn.Module, captured: Capture) -> GraphModel:
    """The captured network as a module that shares its tensors with ``model``.

    Raises:
        CaptureError: the graph holds an operator that is not ATen's, which only eager PyTorch runs.
    """
    for node in captured.graph.calls:
        if not is_known(node.op):
            raise CaptureError(
                f"graph of {type(model).__name__}",
                f"it calls {node.op}, which is not an ATen operator"
                + (f" (at {node.source})" if node.source else ""),
                "Take that call out of the network, or compress the parts around it",
            )
    paths = captured.graph.tensor_paths
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False)) | dict(captured.constants)
    return GraphModel(
        captured.graph,
        {path: tensor for path, tensor in parameters.items() if path in paths},
        {path: tensor for path, tensor in buffers.items() if path in paths},
    )


def _widen(inputs: Inputs) -> Inputs:
    sizes = {t.shape[0] for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim}
    if sizes != {1}:
        return inputs
    return map_tensors(lambda t: torch.cat([t, t]) if t.ndim else t, inputs)  # type: ignore[no-any-return]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    errors: list[BaseException] = []
    for dynamic in (True, False):
        try:
            spec = _free_batch(model, args, kwargs) if dynamic else None
            return torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False)
        except Exception as error:  # noqa: BLE001 - export runs the user's code: anything may arise
            errors.append(error)
    last = errors[-1]
    raise CaptureError(
        f"capture of {type(model).__name__}",
        f"torch.export cannot follow its forward: {first_line(last)}{_user_line(last)}",
        "Check that the model runs on the example inputs; replace Python decisions on tensor "
        "values by torch.where, or move them out of forward",
    ) from last


def _free_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """For every argument of forward, by name, that the first dimension of its tensors is free."""

    def batch(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim else None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(batch, value) for name, value in bound.items()}


def _user_line(error: BaseException) -> str:
    """The deepest line outside of torch that the error came through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/torch/" not in name and "/rarefy/" not in name and not name.startswith("<"):
            line = linecache.getline(name, trace.tb_lineno).strip()
            found = f" (at {name}:{trace.tb_lineno}: {line})"
        trace = trace.tb_next
    return found


# --- torch.fx graph -> Graph -------------------------------------------------------------------


def _constants(program: ExportedProgram) -> Iterable[tuple[str, Tensor]]:
    for path, value in program.constants.items():
        if isinstance(value, Tensor):
            yield path, value.detach().clone()
    for path in program.graph_signature.non_persistent_buffers:
        value = program.constants.get(path)
        if isinstance(value, Tensor):
            yield path, value.detach().clone()


def _convert(program: ExportedProgram) -> Graph:
    signature = program.graph_signature
    paths = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    nodes: list[Node] = []
    for fx_node in program.graph.nodes:
        if fx_node.op == "placeholder":
            path = paths.get(fx_node.name)
            if path is None:
                nodes.append(Node(fx_node.name, "input", value=_value(fx_node.meta.get("val"))))
            elif fx_node.users:
                value = _value(fx_node.meta.get("val"))
                nodes.append(Node(fx_node.name, "tensor", (path,), value=value))
        elif fx_node.op == "call_function":
            nodes.append(_call(fx_node))
        elif fx_node.op == "output":
            outputs = _user_outputs(program, fx_node)
            nodes.append(Node("output", "output", (outputs,)))
        else:
            raise CaptureError(
                f"node {fx_node.name}",
                f"the captured graph holds a nested graph ({fx_node.target})",
                "Replace control-flow operators (torch.cond, torch.map), autocast and "
                "enable_grad blocks in forward by plain code",
            )
    spec = program.call_spec
    graph = Graph(
        tuple(nodes), pytree.treespec_dumps(spec.in_spec), pytree.treespec_dumps(spec.out_spec)
    )
    return _without_dead_code(_out_of_place(graph))


def _user_outputs(program: ExportedProgram, fx_node: torch.fx.Node) -> list[Any]:
    """The outputs that ``forward`` returned, without the buffer updates that export appends."""
    kept = []
    for spec, arg in zip(program.graph_signature.output_specs, fx_node.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT:
            kept.append(_arg(arg))
    return kept


def _call(fx_node: torch.fx.Node) -> Node:
    stack = list((fx_node.meta.get("nn_module_stack") or {}).values())
    return Node(
        fx_node.name,
        _op_name(fx_node.target),
        tuple(_arg(a) for a in fx_node.args),
        {k: _arg(v) for k, v in fx_node.kwargs.items()},
        _value(fx_node.meta.get("val")),
        scope=stack[-1][0] if stack else "",
        source=_source(fx_node.meta.get("stack_trace") or ""),
    )


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    for name, function in SCALAR_OPS.items():
        if target is function:
            return name
    return f"unknown.{getattr(target, '__name__', target)}"


def _source(stack_trace: str) -> str:
    """Last user line of a stack trace as ``file.py:12: code``."""
    found = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', stack_trace)
    own = [f for f in found if "/torch/nn/" not in f[0]]
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line}: {code.strip()}"


def _arg(arg: Any) -> Any:
    if isinstance(arg, torch.fx.Node):
        return Ref(arg.name)
    if isinstance(arg, tuple):
        return tuple(_arg(a) for a in arg)
    if isinstance(arg, list | torch.fx.immutable_collections.immutable_list):
        return [_arg(a) for a in arg]
    if isinstance(arg, Mapping):
        return {k: _arg(v) for k, v in arg.items()}
    return arg


def _value(value: Any) -> Value:
    if isinstance(value, Tensor):
        return Spec(tuple(_size(s) for s in value.shape), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_value(v) for v in value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        hint = value.node.hint
        return hint if isinstance(hint, int | float | bool) else None
    if isinstance(value, int | float | bool):
        return value
    return None


def _size(size: int | torch.SymInt) -> int:
    hint = size if isinstance(size, int) else size.node.hint
    assert isinstance(hint, int)
    return hint


# --- clean-up ----------------------------------------------------------------------------------


def _out_of_place(graph: Graph) -> Graph:
    """``relu_`` and its like as ``relu``, later readers of the input reading the result instead.

    Only where the input is a value of its own that nobody has a view of: a write that others see
    through shared memory stays as it is.
    """
    nodes: list[Node] = []
    renamed: dict[str, Ref] = {}
    fresh: set[str] = set()
    viewed: set[str] = set()

    def current(arg: Any) -> Any:
        return substitute(arg, lambda ref: renamed.get(ref.name, ref))

    for node in graph.nodes:
        node = replace(node, args=current(node.args), kwargs=current(node.options))
        target = node.args[0] if node.args else None
        pure = _pure(node.op)
        if pure and isinstance(target, Ref) and target.name in fresh - viewed:
            node = replace(node, op=pure)
            before = {old for old, new in renamed.items() if new == target} | {target.name}
            renamed.update({old: Ref(node.name) for old in before})
        if node.op not in ("input", "tensor", "output"):
            if shares_memory(node.op):
                viewed.update(node.inputs)
            else:
                fresh.add(node.name)
        nodes.append(node)
    return graph.with_nodes(nodes)


def _pure(op: str) -> str:
    """``aten.relu_.default`` -> ``aten.relu.default``; empty where there is no such pair."""
    family, _, overload = op.rpartition(".")
    pure = f"{family.removesuffix('_')}.{overload}"
    return pure if writes(op) and pure != op and schema(pure) is not None else ""


def _read_once(graph: Graph, model: nn.Module) -> Graph:
    """Each tensor read by one node only, under the first of the paths that share it."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    owner = {path: first.setdefault(id(tensor), path) for path, tensor in named}
    nodes: list[Node] = []
    reader: dict[str, Ref] = {}
    renamed: dict[str, Ref] = {}
    for node in graph.nodes:
        if node.op == "tensor":
            path = owner.get(node.path, node.path)
            renamed[node.name] = reader.setdefault(path, Ref(node.name))
            node = replace(node, args=(path,))
            if renamed[node.name].name != node.name:
                continue
        else:
            node = replace(
                node,
                args=substitute(node.args, lambda ref: renamed.get(ref.name, ref)),
                kwargs=substitute(node.options, lambda ref: renamed.get(ref.name, ref)),
            )
        nodes.append(node)
    return graph.with_nodes(nodes)


def _without_dead_code(graph: Graph) -> Graph:
    """Drop calls whose value nobody reads; operators that write in place are kept."""
    live = set(graph.output.inputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op in ("input", "output") or node.name in live or writes(node.op):
            live.update(node.inputs)
            kept.append(node)
    return graph.with_nodes(kept[::-1])
