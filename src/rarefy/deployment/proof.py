"""The proof of an exported file: it computes what the network does, on real inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rarefy.batches import call, evaluating, map_tensors, tensors
from rarefy.errors import ExportError, RarefyError, first_line
from rarefy.quantization.insertion import is_quantized
from rarefy.quantization.summary import QuantizationSummary
from rarefy.types import Inputs

Run = Callable[[Inputs], list[Tensor]]
"""Inputs -> the outputs of a file."""


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from the network.

    Attributes:
        value: largest error of one value, relative to the output's largest.
        norm: error of an output in the Euclidean norm, relative to the output.
    """

    value: float
    norm: float


FLOAT_TOLERANCE = Tolerance(5e-4, 5e-4)
"""Of a float network in single precision; in half precision :data:`HALF_STEPS` are the limit."""

HALF_STEPS = 8
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


def prove(
    model: nn.Module, open_file: Callable[[], Run], inputs: Inputs, free: tuple[bool, ...]
) -> None:
    """Compare a file with PyTorch on the examples, and on the first of them alone.

    Args:
        model: the network.
        open_file: loads the file in the runtime that is to serve it.
        inputs: the examples.
        free: for each of their tensors, whether its first dimension is free.

    Raises:
        ExportError: the file cannot be loaded or computes something else; with the figures.
    """
    where = f"export of {type(model).__name__}"
    try:
        run = open_file()
        variants = [inputs]
        if any(free):
            variants.append(_shortened(inputs, free))
        for given in variants:
            try:
                expected = outputs(model, given)
            except Exception as error:
                if given is not inputs:
                    continue  # the network does not take fewer examples than were given
                raise ExportError(
                    where,
                    f"it does not run on the example inputs: {first_line(error)}",
                    "Check that forward can be called again and again in eval mode",
                ) from error
            _compare(where, expected, run(given), _tolerance(model))
    except ExportError:
        raise
    except RarefyError as error:
        raise ExportError(where, str(error), "Report this network with its export") from error


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tensors that a network returns in eval mode; its inputs are not written to."""
    with evaluating(model):
        found = call(model, map_tensors(torch.clone, inputs))
    return tensors(pytree.tree_leaves(found))


def _shortened(inputs: Inputs, free: tuple[bool, ...]) -> Inputs:
    flags = iter(free)
    return map_tensors(lambda t: t[:1] if next(flags) else t, inputs)  # type: ignore[no-any-return]


def _tolerance(model: nn.Module) -> Tolerance:
    if not is_quantized(model):
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        steps = max((HALF_STEPS * torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
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
                f"the file and the network differ in output {position} by {largest:.3g} of its "
                f"largest value and {norm:.3g} of its norm, with a correlation of "
                f"{correlation:.3g} and the same largest class in {agreement:.1%} of the clear "
                f"examples; {tolerance.value:g}, {tolerance.norm:g}, {MIN_CORRELATION:g} and "
                f"{MIN_AGREEMENT:.0%} are the limits",
                "Check that forward is deterministic in eval mode and does not depend on Python "
                "values of its inputs, and that quantization left the network accurate; "
                "check=False writes the file nevertheless",
            )


def _errors(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest and Euclidean difference, relative to the whole output; equal infinities and NaNs
    are no difference."""
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0, 0.0
    difference, size = (a - b).where(~same, 0), a.where(a.isfinite(), 0)
    return _ratio(difference.abs().max(), size.abs().max()), _ratio(difference.norm(), size.norm())


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
