"""Text for HTML. Whatever a name or a note holds, it is shown and never becomes markup."""

from __future__ import annotations

from html import escape

from rarefy.reporting import figures


def safe(text: object) -> str:
    """Escaped for HTML; characters that cannot be shown are replaced."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def figure(text: str | None) -> str:
    """A figure in one piece: its unit stays beside its number."""
    return safe(figures.typeset(text or "")).replace(" ", "&nbsp;")
