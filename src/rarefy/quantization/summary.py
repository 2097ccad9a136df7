"""What became of each layer, and how far its output is from the float network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class QuantizationSummary:
    """What was quantized, how well, and what was not.

    Attributes:
        layers: quantized layer -> SQNR in dB of its output, against the float network's on the
            first calibration examples; the noise of all layers before it is included.
        left: layer left in float -> reason.
    """

    layers: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
