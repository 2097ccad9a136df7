"""A network as an ONNX file: translated, rewritten as runtimes fuse it, weights as integers."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import call, map_tensors, tensors
from rarefy.deployment.counts import counted
from rarefy.deployment.look_ups import look_ups
from rarefy.deployment.proof import Run
from rarefy.deployment.recurrent import integer_lstms
from rarefy.deployment.refusals import unrunnable, unwritable
from rarefy.deployment.rewrite import rewrite
from rarefy.deployment.rounded import fold_grids, opset, rounded_weights
from rarefy.deployment.runtimes import ExactOnnxSession, load_onnx, load_onnxruntime
from rarefy.deployment.torchlib import kept_translations
from rarefy.deployment.tracing import WAYS, Traced, trace_flat
from rarefy.deployment.translations import translations
from rarefy.errors import ExportError, FormatError, MissingExtraError, RarefyError, first_line
from rarefy.types import Inputs


class OnnxFile:
    """A traced network in the form of ONNX.

    Args:
        model: the network, in eval mode.
        source: what was traced: the network, or its graph.
        traced: its program.
        inputs: the examples.

    Raises:
        ExportError: an operator cannot be written as ONNX.
    """

    def __init__(self, model: nn.Module, source: nn.Module, traced: Traced, inputs: Inputs) -> None:
        self.model, self.traced = model, traced
        outputs = call(model, map_tensors(torch.clone, inputs))
        weights = rounded_weights(model)
        self.translated = _translated(source, traced, opset(weights.values()))
        _name(self.translated, traced, outputs)
        self.origins = _origins(self.translated)
        rewrite(self.translated)
        integer_lstms(self.translated)
        fold_grids(self.translated, weights)
        look_ups(self.translated)
        counted(self.translated)

    @staticmethod
    def require(check: bool) -> None:
        """Pass where all that is needed is installed.

        Raises:
            MissingExtraError: something is not.
        """
        load_onnx()
        for name in ("onnxscript", "onnx_ir"):
            try:
                __import__(name)
            except ImportError as error:
                raise MissingExtraError(name, "onnx") from error
        if check:
            load_onnxruntime()

    @staticmethod
    def trace(model: nn.Module, inputs: Inputs, ways: tuple[bool, ...] = WAYS) -> Traced:
        """The program of a network; the batch is free in the ways to try, in this order."""
        return trace_flat(model, inputs, ways)

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            ExportError: it would be larger than ONNX allows.
        """
        import onnx_ir as ir

        try:
            content = ir.to_proto(self.translated).SerializeToString()
        except Exception as error:
            raise ExportError(
                f"export({path.name!r})",
                f"the network cannot be written as one file: {first_line(error)}",
                "Files above 2 GB are not supported; compress the network further",
            ) from error
        path.write_bytes(content)

    def open(self, path: Path) -> Run:
        """The file in onnxruntime.

        Raises:
            ExportError: onnxruntime cannot load it, or (when called) run it; the module is named
                whose operator that is.
        """
        try:
            session = ExactOnnxSession(path)
        except FormatError as error:
            raise unrunnable(self.model, error.what, self.origins) from error

        def run(inputs: Inputs) -> list[Tensor]:
            try:
                return session(self._only_read(session.inputs, inputs))
            except RarefyError:
                raise
            except Exception as error:
                what = f"onnxruntime cannot run it: {first_line(error)}"
                raise unrunnable(self.model, what, self.origins) from error

        return run

    def _only_read(self, names: tuple[str, ...], inputs: Inputs) -> Inputs:
        """The inputs by name, without those that the network does not read."""
        by_name = dict(zip(self.traced.names, tensors(inputs), strict=False))
        if set(names) <= set(by_name):
            return {name: by_name[name] for name in names}
        return inputs


def _translated(source: nn.Module, traced: Traced, version: int | None) -> Any:
    try:
        with kept_translations():
            written = torch.onnx.export(
                traced.program,
                dynamo=True,
                verbose=False,
                opset_version=version,
                custom_translation_table=translations(traced.program),
            )
        assert written is not None  # it is where dynamo=True
        return written.model
    except Exception as error:
        raise unwritable(source, traced.program, error, "ONNX") from error


def _origins(model: Any) -> Mapping[str, tuple[str, str]]:
    """Name of a node -> the operator that it was made for, and the path of its module."""
    found: dict[str, tuple[str, str]] = {}
    for node in model.graph:
        kinds, paths = (_listed(node, key) for key in ("class_hierarchy", "name_scopes"))
        if node.name and kinds and len(paths) > 1:
            found[node.name] = (kinds[-1], paths[-2])
    return found


def _listed(node: Any, key: str) -> list[str]:
    try:
        return [
            str(part) for part in ast.literal_eval(node.metadata_props[f"pkg.torch.onnx.{key}"])
        ]
    except (KeyError, ValueError, SyntaxError):
        return []


def _name(model: Any, traced: Traced, outputs: Any) -> None:
    """Name inputs as in forward, outputs after their keys, the free dimension ``batch``."""
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    titles = [_key(path, position) for position, (path, _) in enumerate(leaves)]
    taken = {v.name for node in model.graph for v in node.outputs} | set(model.graph.initializers)
    for values, names in ((model.graph.inputs, traced.names), (model.graph.outputs, titles)):
        if len(values) != len(names) or len({id(value) for value in values}) != len(values):
            continue
        for value, name in zip(values, names, strict=True):
            if name not in taken and not (
                values is model.graph.outputs and value.producer() is None
            ):
                value.name = name
                taken.add(name)
    free = [
        v.shape[0] for v, is_free in zip(model.graph.inputs, traced.free, strict=False) if is_free
    ]
    _relabel(model, lambda size: int(size) if size.isdigit() else size)  # found to be fixed
    symbols = list(dict.fromkeys(str(getattr(d, "value", d)) for d in free))
    if len(symbols) == 1:
        old = re.compile(rf"\b{re.escape(symbols[0])}\b")
        _relabel(model, lambda size: old.sub("batch", size))


def _key(path: tuple[Any, ...], position: int) -> str:
    if not path:
        return "output"
    key = getattr(path[-1], "key", None)
    return key if isinstance(key, str) else f"output_{position}"


def _relabel(model: Any, label: Callable[[str], str | int]) -> None:
    """Write open sizes anew, or the number that one of them is."""
    import onnx_ir as ir

    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                written = label(str(size.value))
                value.shape[axis] = written if isinstance(written, int) else ir.SymbolicDim(written)
