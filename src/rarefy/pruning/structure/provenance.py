"""Where the sizes in a forward come from: attributes, shapes of tensors, or plain numbers.

The user's forward is run on whole numbers that remember their origin: attributes of modules,
and the extents of tensors, and what is computed from these. Each size that a call states
(``x.view(b, self.heads, -1)``) and each equality that the code tests becomes an
:class:`Equation`. They say which attribute must follow when a dimension shrinks, found by its
origin and not by comparing values: two attributes that happen to be equal are never confused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from types import FrameType, FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from rarefy.batches import call, evaluating, map_tensors, unchanged
from rarefy.graph.capture import plain_attention
from rarefy.graph.program import Graph, Node, Spec, Value
from rarefy.pruning.structure.attributes import is_plain
from rarefy.pruning.structure.expressions import Apply, Attribute, Equation, Extent, Number, leaves
from rarefy.pruning.structure.sized import Sized, origin
from rarefy.pruning.structure.stated import STATED, Call
from rarefy.types import Inputs


def equations(model: nn.Module, graph: Graph, inputs: Inputs) -> tuple[Equation, ...]:
    """What the forward of ``model`` needs of the sizes of its tensors.

    The network is run twice in eval mode and left as it was: as it is called, and as it is
    exported, for some forwards go another way then, and as well where they are given a mask. A way
    that does not run on numbers that remember their origin has no equations.

    Args:
        model: the user's module.
        graph: its capture.
        inputs: what it is called with, of the batch size of the capture.
    """
    with plain_attention(model):  # what decides for a fast path does not matter
        found = _stated(model, graph, inputs)
        with _exporting():
            exported = _stated(model, graph, inputs)
    return tuple(dict.fromkeys((*found, *exported)))


def _stated(model: nn.Module, graph: Graph, inputs: Inputs) -> tuple[Equation, ...]:
    """The equations of one run."""
    recorder = _Recorder(graph, model)
    with (
        evaluating(model),
        unchanged(model),
        _sized_attributes(model, recorder),
        suppress(Exception),
    ):
        given = map_tensors(_given, inputs)
        with recorder:
            call(model, given)
        return recorder.found()
    recorder.needed = None
    return ()


@contextmanager
def _exporting() -> Iterator[None]:
    """Code that asks ``torch.compiler`` is told that it is being exported."""
    flags = {name: getattr(torch.compiler, name, None) for name in _FLAGS}
    try:
        for name in flags:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, value in flags.items():
            setattr(torch.compiler, name, value)


_FLAGS = ("_is_compiling_flag", "_is_exporting_flag")


def _given(tensor: Tensor) -> Tensor:
    """A copy of an input, whose sizes are plain numbers."""
    copy = tensor.clone()
    setattr(copy, _ORIGIN, (None, None))
    return copy


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = list(model.named_parameters(remove_duplicate=False))
    return [*reversed([*parameters, *model.named_buffers(remove_duplicate=False)])]


@contextmanager
def _sized_attributes(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Whole numbers in the attributes of all modules remember where they come from.

    Plain objects that modules hold are put back here, the modules themselves by :func:`unchanged`.
    """
    held: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    try:
        for path, module in model.named_modules():
            for name, value in list(vars(module).items()):
                vars(module)[name] = _sized(value, path, name, recorder)
                if is_plain(value) and id(value) not in held:
                    inner = vars(value)
                    held[id(value)] = (inner, dict(inner))
                    for key, number in list(inner.items()):
                        inner[key] = _sized(number, path, f"{name}.{key}", recorder)
        yield
    finally:
        for inner, before in held.values():
            inner.clear()
            inner.update(before)


def _sized(value: Any, path: str, name: str, recorder: _Recorder) -> Any:
    if type(value) is int:
        return Sized.of(value, Attribute(path, name, None, value), recorder)
    if type(value) in (tuple, list, torch.Size) and value and all(type(v) is int for v in value):
        made = [Sized.of(v, Attribute(path, name, i, v), recorder) for i, v in enumerate(value)]
        return type(value)(made)
    return value


_ORIGIN = "_rarefy_result"
"""Attribute of a tensor: the node, and which of its results, that the tensor is."""

_LOST = "?"
"""In place of a node: the tensor was made by a call that no node could be paired with."""


class _Recorder(TorchFunctionMode):
    """Watches the calls of a forward and pairs them with the nodes of its graph.

    The k-th call of a kind by one module with results of one shape is the k-th such node; where
    their numbers differ, none of them is paired.
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        self.paths = {id(tensor): path for path, tensor in _tensors(model)}
        self.modules = {path: id(m) for path, m in model.named_modules(remove_duplicate=False)}
        self.nodes: dict[_Token, list[str]] = {}
        for node in graph.calls:
            caller = self.modules.get(node.scope.partition("@")[0], id(model))
            token = (caller, _kind(node.kind), _shapes(node.value))
            self.nodes.setdefault(token, []).append(node.name)
        self.reader = {n.path: n.name for n in graph.nodes if n.op == "tensor"}
        self.met: dict[_Token, int] = {}
        self.taken: set[str] = set()
        self.needed: list[Equation] | None = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _SHAPE:
            return torch.Size(self.extents(args[0]))
        if func is torch.Tensor.size and isinstance(args[0], Tensor):
            sizes = self.extents(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return torch.Size(sizes) if dim is None else sizes[dim]
        if func is multi_head_attention_forward and isinstance(func, FunctionType):
            with self:
                return _opened(func)(*args, **kwargs)
        if func in (torch.Tensor.numel, torch.Tensor.nelement):
            return prod(self.extents(args[0]))
        result = func(*args, **kwargs)
        self.note(getattr(func, "__name__", ""), args, kwargs, result)
        return result

    def extents(self, tensor: Tensor) -> list[int]:
        """The sizes of a tensor, as numbers that know it."""
        shape = torch._C.TensorBase.size(tensor)
        path = self.paths.get(id(tensor))
        node, part = (self.reader.get(path), None) if path else getattr(tensor, _ORIGIN, (_LOST, 0))
        if node is None:
            return list(shape)
        return [Sized.of(n, Extent(node, part, d), self) for d, n in enumerate(shape)]

    def compared(self, name: str, first: int, second: int, outcome: bool) -> None:
        """Note how a comparison came out.

        Two sizes that are equal have to stay so, and one that is asked to be a plain number has to
        be that; any other comparison (of a remainder, say) has to come out as it did.
        """
        sides = origin(first), origin(second)
        sized = [any(not isinstance(x, Number) for x in leaves(side)) for side in sides]
        if name == "eq" and outcome and (all(sized) or isinstance(sides[0], Extent)):
            self.need(Equation(*sides))
        else:
            self.need(Equation(Apply(name, *sides), Number(int(outcome)), yields=True))

    def value_matters(self, number: Sized) -> None:
        """Note that the code computes with a size as with any number."""
        self.need(Equation(number.origin, Number(int(number)), yields=True))

    def need(self, equation: Equation) -> None:
        """Note an equation, unless the run is over and a number of it has survived in a cache."""
        if self.needed is not None:
            self.needed.append(equation)

    def note(self, name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Pair a call with its node, mark its results, and write down the sizes that it states."""
        value = _value(result)
        if value is None:
            return
        if _kind(name) in _USING_VALUES:
            for number in args[:2]:
                if isinstance(number, Sized):
                    number.used()
        node = self.indexed(args, value) if name == "__getitem__" else self.next(name, value)
        if node is None:
            return
        results = enumerate(result) if isinstance(result, tuple | list) else [(None, result)]
        for part, tensor in results:
            if isinstance(tensor, Tensor):
                setattr(tensor, _ORIGIN, (node.name, part))
        stated = STATED.get(_kind(name))
        if stated:
            for size, part, dim in stated(Call(args, kwargs, value, self.extents)):
                if _states(size, value, part, dim):
                    stating = Equation(origin(size), Extent(node.name, part, dim), node.source)
                    self.need(stating)

    def next(self, name: str, value: Value) -> Node | None:
        """The node of a call: the next of its kind, by the same module, of the same shapes."""
        token = (id(_running()), _kind(name), _shapes(value))
        number = self.met[token] = self.met.get(token, -1) + 1
        names = self.nodes.get(token, [])
        return self.graph.by_name[names[number]] if number < len(names) else None

    def indexed(self, args: Any, value: Value) -> Node | None:
        """The last node of the chain that an indexing expression became."""
        source = getattr(args[0], _ORIGIN, (_LOST, None))[0] or _LOST
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        steps = sum(1 for item in items if item is not Ellipsis)
        ends = [self.graph.by_name[source]] if source in self.graph.by_name else []
        found = None
        for _ in range(steps):
            ends = [u for n in ends for u in self.graph.users[n.name] if u.kind in _INDEXING]
            ends = [u for u in ends if u.op != "operator.getitem" and u.name not in self.taken]
            fit = [u for u in ends if _shapes(u.value) == _shapes(value)]
            found = fit[0] if fit else found
        if found is not None:
            self.taken.add(found.name)
        return found

    def found(self) -> tuple[Equation, ...]:
        """The equations between sizes whose tensors were all paired for sure."""
        sure = {t for t, names in self.nodes.items() if self.met.get(t, -1) + 1 == len(names)}
        unsure = {n for t, names in self.nodes.items() if t not in sure for n in names}
        doubtful = unsure - self.taken | {_LOST}

        def known(equation: Equation) -> bool:
            found = (*leaves(equation.left), *leaves(equation.right))
            return not any(isinstance(x, Extent) and x.node in doubtful for x in found)

        needed, self.needed = self.needed or (), None
        return tuple(dict.fromkeys(e for e in needed if known(e)))


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]

_Token: TypeAlias = "tuple[int, str, tuple[tuple[int, ...], ...]]"
"""Identity of the calling module, kind of call, shapes of the results."""


def _opened(function: FunctionType) -> FunctionType:
    """The function of ``torch.nn.functional`` that computes with sizes, its own calls in sight."""
    never = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
        lambda *_: False,
    )
    made = FunctionType(
        function.__code__,
        {**function.__globals__, **never},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _running() -> nn.Module | None:
    """The innermost module whose forward is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _stated.__code__:
        if frame.f_code is _CALL:
            module = frame.f_locals["self"]
            assert isinstance(module, nn.Module)
            return module
        frame = frame.f_back
    return None


_CALL = nn.Module._call_impl.__code__


_USING_VALUES = frozenset("add sub mul div pow rpow rdiv rtruediv tensor as_tensor".split())
"""Calls that compute with a number among their arguments, and do not take it for a size."""

_INDEXING = frozenset("select slice index unsqueeze".split())
"""What an indexing expression becomes, a node for each of its items."""

_SAME = {
    "split_with_sizes": "split",
    "unsafe_split": "split",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "_to_copy": "to",
    "radd": "add",
    "rmul": "mul",
    "iadd": "add",
    "imul": "mul",
    "isub": "sub",
    "rsub": "sub",
    "swapaxes": "transpose",
}
"""Names of one operation in Python and in ATen."""


def _kind(name: str) -> str:
    bare = name.strip("_") if name.startswith("__") else name.removesuffix("_")
    return _SAME.get(bare, bare)


def _states(size: Any, value: Value, part: int | None, dim: int | str) -> bool:
    """Whether ``size`` is the size of that result (and not -1, nor beyond the end of a slice)."""
    result = value[part] if isinstance(value, tuple) and part is not None else value
    if isinstance(dim, str):
        return isinstance(size, Sized)
    return isinstance(size, int) and isinstance(result, Spec) and result.shape[dim] == int(size)


def _value(result: Any) -> Value:
    if isinstance(result, Tensor):
        return Spec(tuple(torch._C.TensorBase.size(result)), result.dtype)
    if isinstance(result, tuple | list) and any(isinstance(r, Tensor) for r in result):
        return tuple(_value(r) for r in result)
    return None


def _shapes(value: Value) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, Spec):
        return (value.shape,)
    if isinstance(value, tuple):
        return tuple(v.shape if isinstance(v, Spec) else () for v in value)
    return ()
