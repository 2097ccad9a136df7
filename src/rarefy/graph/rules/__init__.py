"""How operators carry labels: small pure functions, and a table of each kind.

The tables of all files are joined here, so that a new file of rules is added in one place.
"""

from __future__ import annotations

from collections.abc import Mapping

from rarefy.graph.editor import Edit
from rarefy.graph.flow import Rule, Zero
from rarefy.graph.rules import (
    attention,
    contractions,
    creation,
    elementwise,
    indexing,
    joining,
    normalization,
    picking,
    pixels,
    recurrent,
    reductions,
    views,
)

ROWS: Mapping[str, Rule] = {
    **contractions.ROWS,
    **attention.ROWS,
    **views.ROWS,
    **joining.ROWS,
    **pixels.ROWS,
    **elementwise.ROWS,
    **creation.ROWS,
    **picking.ROWS,
    **indexing.ROWS,
    **normalization.ROWS,
    **reductions.ROWS,
    **recurrent.ROWS,
}
"""Operator (of one overload or all) -> how it carries labels."""

EDITS: Mapping[str, Edit] = {
    **contractions.EDITS,
    **attention.EDITS,
    **views.EDITS,
    **joining.EDITS,
    **pixels.EDITS,
    **elementwise.EDITS,
    **creation.EDITS,
    **picking.EDITS,
    **indexing.EDITS,
    **normalization.EDITS,
    **reductions.EDITS,
}
"""Operator -> how the sizes in its arguments follow the labels; most state none."""

ZEROS: Mapping[str, Zero] = {
    **views.ZEROS,
    **joining.ZEROS,
    **pixels.ZEROS,
    **elementwise.ZEROS,
    **creation.ZEROS,
    **picking.ZEROS,
    **indexing.ZEROS,
    **contractions.ZEROS,
    **attention.ZEROS,
    **normalization.ZEROS,
    **reductions.ZEROS,
    **recurrent.ZEROS,
}
"""Operator, of all overloads and in place or not -> whether its value is zero at masked units."""
