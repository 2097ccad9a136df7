"""A network as an ONNX file that is proven to compute the same."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from rarefy.batches import arguments, call, evaluating, map_tensors, tensors
from rarefy.deployment.rewrite import rewrite
from rarefy.deployment.rounded import fold_grids, opset, rounded_weights
from rarefy.deployment.runtimes import ExactOnnxSession, OnnxSession, load_onnx, load_onnxruntime
from rarefy.deployment.translations import translations
from rarefy.errors import ExportError, MissingExtraError, OutputError, RarefyError, first_line
from rarefy.files import replacing
from rarefy.graph.program import GraphModel
from rarefy.graph.stubs import plain_graph, stubs
from rarefy.quantization.insertion import is_quantized
from rarefy.quantization.summary import QuantizationSummary
from rarefy.types import Inputs


@dataclass(frozen=True)
class Tolerance:
    """How far onnxruntime may be from PyTorch.

    Attributes:
        value: largest error of one value, relative to the output's largest.
        norm: error of an output in the Euclidean norm, relative to the output.
    """

    value: float
    norm: float


FLOAT_TOLERANCE = Tolerance(5e-4, 5e-4)
"""Of a float network in single precision; in half precision :data:`ROUNDINGS` are the limit."""

ROUNDINGS = 8
"""Steps of a half-precision number at 1, by which sums in another order may differ."""

QUANTIZED_TOLERANCE = Tolerance(0.5, 0.1)
"""Of a quantized network. Sums that fall between two integers are rounded either way, and one step
then travels through the network: small networks stay below 0.01 in the norm, deep ones with random
weights reach 0.1. Where quantization itself changed a layer by more than this norm, that is the
limit, up to :data:`MAX_NORM`."""

MAX_NORM = 0.3
"""Largest limit of the norm. Rounding alone made 0.17 in untrained networks of 24 layers, whose
quantization ruined them already; deeper ones, with 0.3 to 1, are refused. Outputs of zeros make 1,
a wrong order of the classes 1.4."""

MIN_CORRELATION = 0.9
"""Of an output with PyTorch's, where its values spread by more than half of the norm's limit: an
offset that all values share hides from the norm what differs between them. An error at
:data:`MAX_NORM` leaves 0.95 of outputs without such an offset."""

MIN_AGREEMENT = 0.9
"""Share of the examples whose largest class must agree, among those where it leads by more than
four times the noise that the norm's limit allows one value."""


def export(
    model: nn.Module, path: str | Path, example_inputs: Inputs, *, check: bool = True
) -> Path:
    """Write a network to an ONNX file, and prove that onnxruntime computes the same from it.

    A network from :func:`rarefy.quantize` is written in integers: weights as int8, biases as
    int32, activations between QuantizeLinear and DequantizeLinear. Weights that were rounded alone
    (``WeightOnly``) become int8 or int4, with a DequantizeLinear. The first dimension of the
    inputs is free where the network allows it.

    Args:
        model: any module, taken in eval mode; left as it is.
        path: the file to write; an older one is replaced when the new one is complete.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        check: compare onnxruntime's outputs with PyTorch's, on the examples and, where the
            first dimension is free, on another number of them.

    Returns:
        The path.

    Raises:
        ExportError: an operator cannot be exported (the message names it and its module), or the
            file computes something else (the message has the figures); nothing is written.
        OutputError: the path cannot be written.
        MissingExtraError: onnx, onnxscript or (for the check) onnxruntime is not installed.

    Example:
        >>> export(nn.Linear(4, 2), "net.onnx", torch.randn(8, 4)).name  # doctest: +SKIP
        'net.onnx'
    """
    path = Path(path)
    _require(check)
    if not path.parent.is_dir() or path.is_dir():
        raise OutputError(
            f"export({str(path)!r})", "no file can be written there", "Check the path"
        )
    inputs = map_tensors(torch.Tensor.contiguous, _doubled(example_inputs))
    with evaluating(model), _quiet(), _fake_quantize_shapes():
        source = plain_graph(model, inputs) if stubs(model) else model
        weights = rounded_weights(model)
        traced, translated = _written(source, inputs, opset(weights.values()))
        outputs = call(model, map_tensors(torch.clone, inputs))
        _name(translated, traced, outputs)
        rewrite(translated)
        fold_grids(translated, weights)
    try:
        with replacing(path) as draft:
            _save(translated, draft)
            if check:
                _check(model, draft, traced, inputs)
    except OSError as error:
        raise OutputError(f"export({str(path)!r})", str(error), "Check the path") from error
    return path


def _require(check: bool) -> None:
    load_onnx()
    for name in ("onnxscript", "onnx_ir"):
        try:
            __import__(name)
        except ImportError as error:
            raise MissingExtraError(name, "onnx") from error
    if check:
        load_onnxruntime()


def _written(model: nn.Module, inputs: Inputs, version: int | None) -> tuple[Traced, Any]:
    """The traced and the translated network, with a free batch where that can be written."""
    trace = _traced_graph if isinstance(model, GraphModel) else _trace
    traced = trace(model, inputs, (True, False))  # type: ignore[arg-type]
    try:
        return traced, _translate(model, traced, version)
    except ExportError:
        if not any(traced.free):
            raise
    traced = trace(model, inputs, (False,))  # type: ignore[arg-type]
    return traced, _translate(model, traced, version)


# --- tracing -----------------------------------------------------------------------------------


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


def _doubled(inputs: Inputs) -> Inputs:
    """Inputs of at least two examples, since a dimension of 1 would be taken for a constant."""
    if {t.shape[0] for t in tensors(inputs) if t.ndim} != {1}:
        return inputs
    return map_tensors(lambda t: torch.cat([t, t]) if t.ndim else t, inputs)  # type: ignore[no-any-return]


def _trace(model: nn.Module, inputs: Inputs, free: tuple[bool, ...]) -> Traced:
    args, kwargs = arguments(inputs)
    errors: list[Exception] = []
    for dynamic in free:
        try:
            program = _program(model, args, kwargs, dynamic)
        except Exception as error:  # noqa: BLE001 - export runs the user's code: anything may arise
            errors.append(error)
            continue
        given = set(program.graph_signature.user_inputs)
        nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in given]
        values = [n.meta["val"] for n in nodes if isinstance(n.meta["val"], Tensor)]
        free = tuple(v.ndim > 0 and _is_free(v.shape[0]) for v in values)
        return Traced(program, free, _input_names(model, inputs, [n.name for n in nodes]))
    raise ExportError(
        f"export of {type(model).__name__}",
        f"torch.export cannot follow its forward: {first_line(errors[-1])}",
        "Check that the model runs on the example inputs; replace Python decisions on tensor "
        "values by torch.where",
    ) from errors[-1]


def _is_free(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _traced_graph(model: GraphModel, inputs: Inputs, free: tuple[bool, ...]) -> Traced:
    """Trace a captured network with its inputs one by one: its forward has no named arguments."""
    leaves, _ = pytree.tree_flatten(arguments(inputs))
    _, spec = pytree.tree_flatten((tuple(leaves), {}))
    flat = GraphModel(
        replace(model.graph, in_spec=pytree.treespec_dumps(spec)),
        dict(model.named_parameters(remove_duplicate=False)),
        dict(model.named_buffers(remove_duplicate=False)),
    )
    traced = _trace(flat, tuple(leaves), free)
    if isinstance(inputs, Mapping) and len(inputs) == len(traced.names):
        return replace(traced, names=tuple(inputs))
    return traced


def _program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> ExportedProgram:
    def batch(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim else None

    shapes: Any = None
    if dynamic:
        positional, named = pytree.tree_map(batch, args), pytree.tree_map(batch, kwargs)
        shapes = (positional,) if isinstance(model, GraphModel) else (named or positional)
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _fake_quantize_shapes() -> Iterator[None]:
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


def _input_names(model: nn.Module, inputs: Inputs, placeholders: list[str]) -> tuple[str, ...]:
    if isinstance(inputs, Mapping) and len(inputs) == len(placeholders):
        return tuple(inputs)
    if isinstance(model, GraphModel):
        return tuple(node.name for node in model.graph.nodes if node.op == "input")
    return tuple(placeholders)


# --- translation -------------------------------------------------------------------------------


def _translate(model: nn.Module, traced: Traced, version: int | None) -> Any:
    try:
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
        operator = _failed_operator(error)
        where = _scope(model, traced.program, operator)
        raise ExportError(
            f"export of {type(model).__name__}{where}",
            f"the operator {operator or '(unknown)'} cannot be written as ONNX: "
            f"{first_line(_root(error))}",
            "Replace it by operators that ONNX has, or keep it outside of the exported network",
        ) from error


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


_OPERATOR = re.compile(r"torch\.ops\.([\w.]+)|<OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")


def _failed_operator(error: BaseException) -> str:
    """Name of the operator that an exporter's error speaks of, such as ``aten.lgamma.default``."""
    current: BaseException | None = error
    while current is not None:
        found = _OPERATOR.search(str(current))
        if found:
            return found[1] or f"{found[2]}.{found[3]}"
        current = current.__cause__
    return ""


def _scope(model: nn.Module, program: ExportedProgram, operator: str) -> str:
    """``", module 'head'"`` for the module that first calls an operator."""
    if isinstance(model, GraphModel):
        calls = [(node.op, node.scope) for node in model.graph.calls]
    else:
        stacks = [(n.target, n.meta.get("nn_module_stack") or {}) for n in program.graph.nodes]
        calls = [(str(op), [("", ""), *stack.values()][-1][0]) for op, stack in stacks]
    # Decomposition may have changed the namespace and the overload: prims.sin for aten.sin.
    scopes = [scope for op, scope in calls if op.split(".")[1:2] == operator.split(".")[1:2]]
    return f", module {scopes[0]!r}" if scopes and scopes[0] else ""


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
    symbols = list(dict.fromkeys(str(getattr(d, "value", d)) for d in free))
    if len(symbols) == 1:
        _rename_dimension(model, symbols[0], "batch")


def _key(path: tuple[Any, ...], position: int) -> str:
    if not path:
        return "output"
    key = getattr(path[-1], "key", None)
    return key if isinstance(key, str) else f"output_{position}"


def _rename_dimension(model: Any, old: str, new: str) -> None:
    import onnx_ir as ir

    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                name = re.sub(rf"\b{re.escape(old)}\b", new, str(size.value))
                value.shape[axis] = ir.SymbolicDim(name)


# --- the file ----------------------------------------------------------------------------------


def _save(model: Any, path: Path) -> None:
    import onnx_ir as ir

    try:
        content = ir.to_proto(model).SerializeToString()
    except Exception as error:
        raise ExportError(
            f"export({path.name!r})",
            f"the network cannot be written as one file: {first_line(error)}",
            "Files above 2 GB are not supported; compress the network further",
        ) from error
    path.write_bytes(content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Contain the exporter's prints, log messages and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
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


# --- proof -------------------------------------------------------------------------------------


def _check(model: nn.Module, path: Path, traced: Traced, inputs: Inputs) -> None:
    """Compare onnxruntime with PyTorch on the examples, and on the first of them alone.

    Raises:
        ExportError: with the figures.
    """
    where = f"export of {type(model).__name__}"
    try:
        session = ExactOnnxSession(path)
        variants = [inputs]
        if any(traced.free):
            variants.append(_shortened(inputs, traced.free))
        for given in variants:
            try:
                expected = _outputs(model, given)
            except Exception as error:
                if given is not inputs:
                    continue  # the network does not take fewer examples than were given
                raise ExportError(
                    where,
                    f"it does not run on the example inputs: {first_line(error)}",
                    "Check that forward can be called again and again in eval mode",
                ) from error
            found = session(_only_read(session, traced, given))
            _compare(where, expected, found, _tolerance(model))
    except ExportError:
        raise
    except RarefyError as error:
        raise ExportError(where, str(error), "Report this network with its export") from error


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model):
        outputs = call(model, map_tensors(torch.clone, inputs))
    return tensors(pytree.tree_leaves(outputs))


def _only_read(session: OnnxSession, traced: Traced, inputs: Inputs) -> Inputs:
    """The inputs by name, without those that the network does not read."""
    by_name = dict(zip(traced.names, tensors(inputs), strict=False))
    if set(session.inputs) <= set(by_name):
        return {name: by_name[name] for name in session.inputs}
    return inputs


def _shortened(inputs: Inputs, free: tuple[bool, ...]) -> Inputs:
    flags = iter(free)
    return map_tensors(lambda t: t[:1] if next(flags) else t, inputs)  # type: ignore[no-any-return]


def _tolerance(model: nn.Module) -> Tolerance:
    if not is_quantized(model):
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        steps = max((ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        return Tolerance(*(max(limit, steps) for limit in astuple(FLOAT_TOLERANCE)))
    summary = getattr(model, "quantization", None)
    ratios = summary.layers.values() if isinstance(summary, QuantizationSummary) else ()
    noise = [10 ** (-ratio / 20) for ratio in ratios]
    norm = min(max([QUANTIZED_TOLERANCE.norm, *noise]), MAX_NORM)
    return replace(QUANTIZED_TOLERANCE, norm=norm)


def _compare(where: str, expected: list[Tensor], found: list[Tensor], tolerance: Tolerance) -> None:
    if len(expected) != len(found):
        raise ExportError(
            where, f"{len(found)} outputs instead of {len(expected)}", "Return each tensor once"
        )
    for position, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape:
            raise ExportError(
                where,
                f"output {position} has shape {tuple(b.shape)} instead of {tuple(a.shape)}",
                "Check what forward derives from the shape of its inputs",
            )
        a, b = a.detach().cpu().double(), b.double()
        largest, norm = _errors(a, b)
        correlation, agreement = _correlation(a, b, tolerance), _agreement(a, b, tolerance)
        if not (
            largest <= tolerance.value
            and norm <= tolerance.norm
            and correlation >= MIN_CORRELATION
            and agreement >= MIN_AGREEMENT
        ):
            raise ExportError(
                where,
                f"onnxruntime and PyTorch differ in output {position} by {largest:.3g} of its "
                f"largest value and {norm:.3g} of its norm, with a correlation of "
                f"{correlation:.3g} and the same largest class in {agreement:.1%} of the clear "
                f"examples; {tolerance.value:g}, {tolerance.norm:g}, {MIN_CORRELATION:g} and "
                f"{MIN_AGREEMENT:.0%} are the limits",
                "Check that forward is deterministic in eval mode and does not depend on Python "
                "values of its inputs, and that quantization left the network accurate; "
                "check=False writes the file nevertheless",
            )


def _errors(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest and Euclidean relative difference; equal infinities and NaNs are no difference."""
    same = (a == b) | (a.isnan() & b.isnan())
    a, difference = a[~same], (a - b)[~same]
    if not difference.numel():
        return 0.0, 0.0
    return _ratio(difference.abs().max(), a.abs().max()), _ratio(difference.norm(), a.norm())


def _ratio(error: Tensor, size: Tensor) -> float:
    return float(error / size.clamp_min(1e-6))


def _correlation(a: Tensor, b: Tensor, tolerance: Tolerance) -> float:
    """Pearson's correlation of all finite values; 1 where noise could hide how they spread."""
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    if a.numel() < 2 or (a - a.mean()).norm() <= tolerance.norm / 2 * a.norm():
        return 1.0
    a, b = a - a.mean(), b - b.mean()
    return float((a / a.norm()) @ (b / b.norm())) if bool(b.norm() > 0) else 0.0


def _agreement(a: Tensor, b: Tensor, tolerance: Tolerance) -> float:
    """Share of the examples with the same largest class, of those where noise cannot change it."""
    if a.ndim != 2 or a.shape[1] < 2:
        return 1.0
    first, second = a.topk(2, dim=1).values.unbind(1)
    noise = tolerance.norm * a.norm() / a.numel() ** 0.5
    same = (a.argmax(1) == b.argmax(1))[first - second > 4 * noise]
    return float(same.double().mean()) if same.numel() else 1.0
