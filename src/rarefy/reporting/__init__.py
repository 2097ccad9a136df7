"""What a compression achieved, for people and for programs: a page, a table, JSON.

Every sentence and ratio is computed from the figures of a :class:`~rarefy.types.Report`; nothing
is typed by hand.
"""

from rarefy.reporting.files import write
from rarefy.reporting.page import page
from rarefy.reporting.summary import as_dict, concerns, table, terminal, verdict

__all__ = ["as_dict", "concerns", "page", "table", "terminal", "verdict", "write"]
