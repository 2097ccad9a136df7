"""The files of a report, each written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from rarefy.errors import OutputError
from rarefy.files import replacing
from rarefy.reporting.page import page
from rarefy.reporting.summary import as_dict
from rarefy.types import Report


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json``; files of these names are replaced.

    Args:
        report: what was measured.
        folder: where to write; made where it does not exist.

    Returns:
        The paths of the page and of the JSON file.

    Raises:
        InputError: the report has no stage.
        OutputError: the folder cannot be made or written.
    """
    html, text = page(report), json.dumps(as_dict(report), indent=2, allow_nan=False) + "\n"
    paths = folder / "report.html", folder / "report.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, (html, text), strict=True):
            with replacing(path) as draft:
                draft.write_bytes(content.encode("utf-8", "replace"))
    except OSError as error:
        what = f"the report cannot be written: {error.strerror or error}"
        raise OutputError(str(folder), what, "Choose a folder that you may write to") from error
    return paths
