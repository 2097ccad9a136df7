"""``torch.export``'s program -> :class:`~rarefy.graph.program.Graph`: plain calls in one list.

Blocks under ``torch.no_grad()`` and the like arrive as nested graphs. They change no value, so
they are read in place; a graph that is trained has gradients there. In blocks under
``torch.autocast`` the casts that autocast makes unseen are written down as calls. What chooses
between computations by value (``torch.cond`` and its like) cannot stand in a list of calls.
"""

from __future__ import annotations

import linecache
import operator
import re
from collections import namedtuple
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from rarefy.errors import CaptureError
from rarefy.graph.declarations import SCALAR_OPS, schema, writes
from rarefy.graph.memory import sharing
from rarefy.graph.program import Graph, Node, Ref, Spec, Value, substitute


def convert(program: ExportedProgram) -> Graph:
    """The exported network as a graph, with the calls that ``forward`` makes for nothing.

    Raises:
        CaptureError: the program holds control flow, or its outputs are of a type that no file
            can name; the message says where.
    """
    signature = program.graph_signature
    paths = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    reader = _Reader()
    for fx_node in program.graph.nodes:
        if fx_node.op == "placeholder":
            reader.take(fx_node, paths.get(fx_node.name))
        elif fx_node.op == "output":
            specs = zip(signature.output_specs, fx_node.args[0], strict=True)
            returned = [arg for spec, arg in specs if spec.kind is OutputKind.USER_OUTPUT]
            reader.nodes.append(Node("output", "output", (reader.argument(returned),)))
        else:
            reader.read(fx_node)
    spec = program.call_spec
    graph = Graph(tuple(reader.nodes), _structure(spec.in_spec), _structure(spec.out_spec))
    return _of_tensors(_out_of_place(graph))


def constants(program: ExportedProgram) -> dict[str, Tensor]:
    """Tensors that the program reads but that are no parameter: made inside ``forward``."""
    return {
        path: value.detach().clone()
        for path, value in program.constants.items()
        if isinstance(value, Tensor)
    }


def _structure(spec: pytree.TreeSpec) -> str:
    with suppress(NotImplementedError):
        return pytree.treespec_dumps(spec)
    for named in _named_tuples(spec):
        name = f"{named.__module__}.{named.__qualname__}"
        pytree._register_namedtuple(named, serialized_type_name=name)
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        raise CaptureError(
            "forward",
            f"its arguments or outputs are structured as {' '.join(str(spec).split())}, "
            "which has no name in a file",
            "Take and return tensors, tuples, lists, dictionaries or dataclasses",
        ) from error


def _named_tuples(spec: pytree.TreeSpec) -> set[type]:
    """Classes made by ``namedtuple`` that occur in a structure."""
    found = {spec.context} if spec.type is namedtuple else set()
    return found.union(*map(_named_tuples, spec.children()))


# --- reading -----------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Writes down calls in order of execution.

    Attributes:
        nodes: what was written so far.
        known: what each node of the fx graphs stands for: a reference, or outputs of a block.
        names: names that are taken; nested graphs repeat those of the outer one.
        hints: sizes that depend on values -> the number that stands for them.
        lower: dtype of the autocast region that is being read.
    """

    nodes: list[Node] = field(default_factory=list)
    known: dict[torch.fx.Node, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    hints: dict[Any, int] = field(default_factory=dict)
    lower: torch.dtype | None = None

    def take(self, fx_node: torch.fx.Node, path: str | None) -> None:
        """An input of the network, or a parameter or buffer that is read."""
        value = self.value(fx_node.meta.get("val"))
        if path is None:
            self.add(fx_node, Node(fx_node.name, "input", value=value))
        elif fx_node.users:
            self.add(fx_node, Node(fx_node.name, "tensor", (path,), value=value))

    def read(self, fx_node: torch.fx.Node) -> None:
        """A call; a block of calls is read in place."""
        if fx_node.op == "get_attr":
            return
        target = fx_node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.known[fx_node] = self.block(fx_node)
            return
        source = self.known.get(fx_node.args[0]) if fx_node.args else None  # type: ignore[arg-type]
        if target is operator.getitem and isinstance(source, list):
            self.known[fx_node] = source[fx_node.args[1]]  # type: ignore[index]
            return
        self.add(fx_node, self.call(fx_node))

    def call(self, fx_node: torch.fx.Node) -> Node:
        stack = list((fx_node.meta.get("nn_module_stack") or {}).values())
        node = Node(
            fx_node.name,
            _op_name(fx_node.target),
            tuple(self.argument(a) for a in fx_node.args),
            {k: self.argument(v) for k, v in fx_node.kwargs.items()},
            self.value(fx_node.meta.get("val")),
            scope=stack[-1][0] if stack else "",
            source=_source(fx_node.meta.get("stack_trace") or ""),
        )
        return self.as_autocast(node, fx_node) if self.lower else node

    def add(self, fx_node: torch.fx.Node, node: Node) -> None:
        self.known[fx_node] = self.append(node)

    def append(self, node: Node) -> Ref:
        name, count = node.name, 0
        while name in self.names:
            count += 1
            name = f"{node.name}_{count}"
        self.names.add(name)
        self.nodes.append(replace(node, name=name))
        return Ref(name)

    def argument(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self.known[arg]
        if isinstance(arg, tuple):
            return tuple(self.argument(a) for a in arg)
        if isinstance(arg, list):
            return [self.argument(a) for a in arg]
        if isinstance(arg, slice):
            return slice(*(self.argument(a) for a in (arg.start, arg.stop, arg.step)))
        if isinstance(arg, Mapping):
            return {k: self.argument(v) for k, v in arg.items()}
        return arg

    # --- blocks ---

    def block(self, fx_node: torch.fx.Node) -> Any:
        """The outputs of a nested graph, whose calls are written down."""
        name = getattr(fx_node.target, "__name__", str(fx_node.target))
        if name not in _BLOCKS:
            raise CaptureError(
                f"torch.{name}(...)" if name in _CONTROL_FLOW else name,
                f"it holds a nested graph that is chosen or repeated by value{_at(fx_node)}",
                "Replace control-flow operators (torch.cond, torch.map, scan, while_loop) in "
                "forward by plain code: torch.where, or a loop over a fixed number of steps",
            )
        place, first = _BLOCKS[name]
        getter, operands = fx_node.args[place], fx_node.args[first:]
        before, self.lower = self.lower, self.region(fx_node, name)
        owner = fx_node.graph.owning_module
        outputs = self.inline(getattr(owner, str(getter.target)).graph, operands)  # type: ignore[union-attr]
        self.lower = before
        return outputs

    def inline(self, graph: torch.fx.Graph, operands: Iterable[Any]) -> Any:
        given = iter(operands)
        for fx_node in graph.nodes:
            if fx_node.op == "placeholder":
                self.known[fx_node] = self.argument(next(given))
            elif fx_node.op == "output":
                outputs = self.argument(fx_node.args[0])
                return list(outputs) if isinstance(outputs, tuple) else outputs
            else:
                self.read(fx_node)
        raise AssertionError("a graph ends with its output")

    def region(self, fx_node: torch.fx.Node, name: str) -> torch.dtype | None:
        """The dtype of autocast inside a block."""
        if name != "wrap_with_autocast":
            return self.lower
        device, dtype, enabled = fx_node.args[:3]
        if not enabled:
            return None
        if device != "cpu" or not isinstance(dtype, torch.dtype | None):
            raise CaptureError(
                f"torch.autocast({device!r})",
                "which casts it makes is known for the CPU only",
                "Put autocast around the training step instead of into forward, or move the "
                "network to the CPU",
            )
        return dtype or torch.bfloat16

    def as_autocast(self, node: Node, fx_node: torch.fx.Node) -> Node:
        """The call with the casts of its operands that autocast makes written before it."""
        floats = [n for n in fx_node.all_input_nodes if _is_single(n)]
        dtypes = {n.meta["val"].dtype for n in floats}
        result = fx_node.meta.get("val")
        wanted = result.dtype if isinstance(result, Tensor) else None
        if node.kind in _LOWERED:
            wanted = self.lower
        elif wanted is not torch.float32 or wanted in dtypes:
            return node
        cast: dict[str, Ref] = {}
        for operand in floats:
            ref = self.known[operand]
            value = self.value(operand.meta["val"])
            assert isinstance(value, Spec)
            if value.dtype is not wanted:
                made = Node(f"{ref.name}_cast", "aten.to.dtype", (ref, wanted), {})
                spec = Spec(value.shape, wanted)  # type: ignore[arg-type]
                made = replace(made, value=spec, scope=node.scope, source=node.source)
                cast[ref.name] = self.append(made)
        return replace(
            node,
            args=substitute(node.args, lambda ref: cast.get(ref.name, ref)),
            kwargs=substitute(node.options, lambda ref: cast.get(ref.name, ref)),
        )

    # --- values ---

    def value(self, value: Any) -> Value:
        if isinstance(value, Tensor):
            return Spec(tuple(self.size(s) for s in value.shape), value.dtype)
        if isinstance(value, tuple | list):
            return tuple(self.value(v) for v in value)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if isinstance(value, torch.SymFloat | torch.SymBool):
            hint = value.node.hint
            return hint if isinstance(hint, int | float | bool) else None
        return value if isinstance(value, int | float | bool | str) else None

    def size(self, size: int | torch.SymInt) -> int:
        """A size at the capture; one that depends on values is given a number of its own."""
        if isinstance(size, int):
            return size
        hint, expression = size.node.hint, size.node.expr
        if isinstance(hint, int):
            if expression.is_Symbol:
                self.hints[expression] = hint
            return hint
        for symbol in sorted(expression.free_symbols, key=str):
            self.hints.setdefault(symbol, _PRIMES[len(self.hints) % len(_PRIMES)])
        return int(expression.xreplace(self.hints))


_PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157)
"""Stand for sizes that depend on values: they divide no usual width."""

_BLOCKS = {
    "wrap_with_set_grad_enabled": (1, 2),
    "wrap_with_autocast": (4, 5),
    "tag_activation_checkpoint": (0, 1),
    "invoke_subgraph": (0, 2),
    "wrap": (0, 1),
}
"""Blocks that compute what their calls compute: places of the nested graph and first operand."""

_CONTROL_FLOW = frozenset("cond map scan while_loop associative_scan".split())

_LOWERED = frozenset(
    "addbmm addmm baddbmm bmm chain_matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d linalg_multi_dot linalg_vecdot linear matmul mm "
    "scaled_dot_product_attention".split()
)
"""What autocast on the CPU computes in lower precision."""


def _is_single(fx_node: torch.fx.Node) -> bool:
    """Whether the node's value is a tensor that autocast may cast."""
    value = fx_node.meta.get("val")
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    )


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    for name, function in SCALAR_OPS.items():
        if target is function:
            return name
    return f"unknown.{getattr(target, '__name__', target)}"


def _at(fx_node: torch.fx.Node) -> str:
    source = _source(fx_node.meta.get("stack_trace") or "")
    return f" (at {source})" if source else ""


def _source(stack_trace: str) -> str:
    """Last user line of a stack trace as ``file.py:12: code``."""
    found = re.findall(r'File "([^"]+)", line (\d+), in ', stack_trace)
    own = [f for f in found if "/torch/" not in f[0] and not f[0].startswith("<")]
    return source_line(own[-1][0], int(own[-1][1])) if own else ""


def source_line(file: str, line: int) -> str:
    """A line of code as ``file.py:12: code``."""
    return f"{file.rsplit('/', 1)[-1]}:{line}: {linecache.getline(file, line).strip()}"


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
            shared = sharing(node)
            viewed.update(shared)
            if not shared:
                fresh.add(node.name)
        nodes.append(node)
    return graph.with_nodes(nodes)


def _pure(op: str) -> str:
    """``aten.relu_.default`` -> ``aten.relu.default``; empty where there is no such pair."""
    family, _, overload = op.rpartition(".")
    pure = f"{family.removesuffix('_')}.{overload}"
    own, other = schema(op), schema(pure)
    if own is None or other is None or pure == op or not writes(op):
        return ""
    same = [a.name for a in own.arguments] == [a.name for a in other.arguments]
    return pure if same else ""  # polygamma_ and polygamma take theirs in another order


def read_once(graph: Graph, model: nn.Module) -> Graph:
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


def _of_tensors(graph: Graph) -> Graph:
    """Drop sizes, parts of results and checks that nobody reads, and tensors that are not read.

    Calls whose tensors nobody reads stay: ``forward`` makes them, so their operands must fit.
    """
    read = set(graph.output.inputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        made = node.op.startswith("aten.") and not isinstance(node.value, int | float | None)
        if made or node.op in ("input", "output") or node.name in read or writes(node.op):
            read.update(node.inputs)
            kept.append(node)
    return graph.with_nodes(kept[::-1])
