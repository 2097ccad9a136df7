"""Which operator an exporter or a runtime refuses, and which module of the network made it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.export import ExportedProgram

from rarefy.errors import ExportError, first_line
from rarefy.graph.model import GraphModel
from rarefy.graph.program import Node


def untraceable(model: nn.Module, error: Exception) -> ExportError:
    """The error of a network whose forward ``torch.export`` cannot follow."""
    return ExportError(
        f"export of {type(model).__name__}{_named(_module_of(model, error))}",
        f"torch.export cannot follow its forward: {first_line(error)}",
        "Check that the model runs on the example inputs; replace Python decisions on tensor "
        "values by torch.where",
    )


def unwritable(
    model: nn.Module, program: ExportedProgram, error: Exception, form: str
) -> ExportError:
    """The error of a program with an operator that a form of file does not have."""
    operator = _failed_operator(error)
    return ExportError(
        f"export of {type(model).__name__}{_named(_scope(model, program, operator))}",
        f"the operator {operator or '(unknown)'} cannot be written as {form}: "
        f"{first_line(_root(error))}",
        f"Replace it by operators that {form} has, or keep it outside of the exported network",
    )


def unrunnable(model: nn.Module, what: str, origins: Mapping[str, tuple[str, str]]) -> ExportError:
    """The error of a runtime that has no kernel for a node of a file, or cannot run it.

    Args:
        model: the network.
        what: what the runtime says, with the name of the node.
        origins: name of a node -> the operator that it was made for, and the path of its module.
    """
    words = re.findall(r"[\w.]+", what)
    operator, path = next((origins[word] for word in words if word in origins), ("", ""))
    made = f"; the node was made for {operator}" if operator else ""
    return ExportError(
        f"export of {type(model).__name__}{_named(path or _called_at(model, operator))}",
        f"{what}{made}",
        "Replace the operator by one that the runtime has; check=False writes the file "
        "nevertheless",
    )


def _named(path: str) -> str:
    """``", module 'head'"``."""
    return f", module {path!r}" if path else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _root(error: BaseException) -> BaseException:
    return list(_causes(error))[-1]


_OPERATOR = re.compile(r"torch\.ops\.([\w.]+)|<OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")


def _failed_operator(error: BaseException) -> str:
    """Name of the operator that an exporter's error speaks of, such as ``aten.lgamma.default``."""
    for current in _causes(error):
        found = _OPERATOR.search(str(current))
        if found:
            return found[1] or f"{found[2]}.{found[3]}"
    return ""


def _scope(model: nn.Module, program: ExportedProgram, operator: str) -> str:
    """Path of the module that first calls an operator; empty where that is unknown."""
    stacks = [(n.target, n.meta.get("nn_module_stack") or {}) for n in program.graph.nodes]
    calls = [(str(op), [("", ""), *stack.values()][-1][0]) for op, stack in stacks]
    return _called_at(model, operator) or _first(calls, operator)


def _called_at(model: nn.Module, operator: str) -> str:
    """Path of the module that first called an operator, where the network is a graph."""
    calls = model.graph.calls if isinstance(model, GraphModel) else ()
    return _first([(node.op, node.scope) for node in calls], operator)


def _first(calls: Iterable[tuple[str, str]], operator: str) -> str:
    # Decomposition may have changed the namespace and the overload: prims.sin for aten.sin.
    name = operator.split(".")[1:2]
    return next((scope for op, scope in calls if op.split(".")[1:2] == name), "")


def _module_of(model: nn.Module, error: BaseException) -> str:
    """Path of the innermost module of a network in whose forward an error arose."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, Node):
            found = node.scope
        found = paths.get(id(frame.f_locals.get("self")), found)
    return found
