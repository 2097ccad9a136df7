"""How a network is quantized: activations and weights, weights alone, half precision."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.errors import InputError
from rarefy.types import check_choice, check_numbers

ROUNDINGS = ("gptq", "learned")
"""How weights are rounded so that outputs stay near, on calibration data."""

OBSERVERS = ("minmax", "average", "percentile", "mse", "entropy")
"""How activation ranges are found."""


FUNCTIONS = ("apart", "split", "fused")
"""How functions behind convolutions are computed."""


@dataclass(frozen=True)
class Int8:
    """Int8: unsigned 8-bit activations, signed 8-bit weights with a scale per channel.

    Args:
        observer: how activation ranges are found: ``"minmax"``, ``"average"`` (of each batch's
            extremes, later ones counting more), ``"percentile"``, ``"mse"`` or ``"entropy"``.
        percentile: the share of values that ``"percentile"`` keeps, in (0.5, 1].
        symmetric: whether ranges that go below 0 reach as far below it as above.
        activations: ``"static"`` for ranges from the calibration data; ``"dynamic"`` for ranges
            of each call, of linear layers and LSTMs alone: no calibration, more work per call, and
            the examples of one call share their range.
        smooth: strength of SmoothQuant between a norm or a linear layer and the linear layers that
            read it (behind a relu, or through attention), in [0, 1]; None for none.
        equalize: whether weights of consecutive layers are equalized over channels.
        correct_bias: whether the mean error of every layer is taken into its bias, with static
            ranges.
        functions: how a SiLU, GELU, hardswish and the like behind a convolution are computed, with
            static ranges: ``"apart"`` in float between two roundings, as every runtime can;
            ``"split"``: SiLU in integers as a sigmoid and a product, which onnxruntime does faster;
            ``"fused"`` in float as a part of the convolution, whose output is not rounded, which
            OpenVINO does faster and onnxruntime much slower.
        rounding: of the weights: ``"nearest"``; ``"gptq"``, column by column, the columns to come
            making up for it; or ``"learned"``, each weight up or down as gradient descent decides
            (AdaRound). The latter two work layer by layer on the calibration data, with the
            quantized network's own inputs, and keep what is nearest where that is better.
        skip: paths or patterns with ``*?[]`` of layers, or of modules around them, that stay in
            float.

    Example:
        >>> Int8(observer="mse").observer
        'mse'
    """

    observer: str = "mse"
    percentile: float = 0.9999
    symmetric: bool = False
    activations: str = "static"
    smooth: float | None = 0.5
    equalize: bool = False
    correct_bias: bool = False
    functions: str = "apart"
    rounding: str = "nearest"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self, "percentile smooth", float)
        check_choice(self, "observer", OBSERVERS)
        check_choice(self, "activations", ("static", "dynamic"))
        check_choice(self, "functions", FUNCTIONS)
        check_choice(self, "rounding", ("nearest", *ROUNDINGS))
        for name in ("symmetric", "equalize", "correct_bias"):
            check_choice(self, name, (True, False))
        if not 0.5 < self.percentile <= 1:
            raise InputError(
                f"Int8(percentile={self.percentile!r})",
                "the share of values kept must be above 0.5 and at most 1",
                "Write percentile=0.9999",
            )
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise InputError(
                f"Int8(smooth={self.smooth!r})",
                "the strength of smoothing is between 0 and 1",
                "Write smooth=0.5, or None for none",
            )
        _freeze_skip(self)


METHODS = ("rtn", *ROUNDINGS, "awq", "palette")
"""How weights alone are quantized."""


@dataclass(frozen=True)
class WeightOnly:
    """Weights on a grid of few values, everything computed in float: a small file, not more speed.

    Args:
        bits: of a weight, 2 to 8; ``"palette"`` takes 1, too.
        group: neighbors along the inputs of one output channel that share a scale; None for all.
            Smaller groups are more accurate; each adds 16 bits for its scale.
        method: ``"rtn"`` rounds to nearest. ``"awq"`` does so with ranges that count errors by the
            size of the inputs that they meet. ``"gptq"`` rounds column by column, the columns to
            come making up for it. ``"learned"`` learns which weights go up and which down
            (AdaRound): nearer than GPTQ, and slower. ``"palette"`` takes the values of a codebook
            for each tensor, found by k-means. ``"gptq"``, ``"learned"`` and ``"awq"`` need
            calibration data.
        symmetric: a range around 0; otherwise from the smallest to the largest value.
        observer: ``"minmax"`` for the whole range, or ``"mse"`` for the share of it with the least
            squared error of the weights. ``"awq"`` searches in any case.
        fold: whether BatchNorms go into the layers before them, which get a bias: nothing of them
            is left to store. Needs calibration data, which show what follows what.
        skip: paths or patterns with ``*?[]`` of layers, or of modules around them, that stay in
            float.

    Example:
        >>> WeightOnly(bits=4, group=32).method
        'gptq'
    """

    bits: int = 4
    group: int | None = None
    method: str = "gptq"
    symmetric: bool = True
    observer: str = "minmax"
    fold: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self, "bits group", int)
        check_choice(self, "method", METHODS)
        check_choice(self, "symmetric", (True, False))
        check_choice(self, "fold", (True, False))
        check_choice(self, "observer", ("mse", "minmax"))
        least = 1 if self.method == "palette" else 2
        if not least <= self.bits <= 8:
            raise InputError(
                f"WeightOnly(bits={self.bits!r})",
                f"a weight has {least} to 8 bits with method={self.method!r}",
                "Write bits=4",
            )
        if self.group is not None and (self.group < 2 or self.method == "palette"):
            raise InputError(
                f"WeightOnly(group={self.group!r}, method={self.method!r})",
                "a group has at least 2 weights, and a palette none",
                "Write group=32, or None for a scale for each output channel",
            )
        _freeze_skip(self)


def _freeze_skip(scheme: Int8 | WeightOnly) -> None:
    """Hold the paths to skip as a tuple; refuse what is no list of them."""
    given = scheme.skip
    listed: object = given  # of callers that no type checker warned
    if not isinstance(listed, list | tuple | set | frozenset) or not all(
        isinstance(pattern, str) for pattern in listed
    ):
        raise InputError(
            f"{type(scheme).__name__}(skip={given!r})",
            "it is no list of paths",
            "Write skip=['head', 'stem.*']",
        )
    object.__setattr__(scheme, "skip", tuple(given))


@dataclass(frozen=True)
class Half:
    """Weights rounded to half precision, everything computed in float: half the file.

    Args:
        dtype: ``"fp16"`` (11 significant bits, up to 65504) or ``"bf16"`` (8, the range of float).

    Example:
        >>> Half("bf16").dtype
        'bf16'
    """

    dtype: str = "fp16"

    def __post_init__(self) -> None:
        check_choice(self, "dtype", ("fp16", "bf16"))
