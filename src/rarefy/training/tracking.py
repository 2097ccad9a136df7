"""Trackers of experiments, through Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rarefy.errors import InputError, MissingExtraError
from rarefy.process import quiet_setup
from rarefy.training.job import Job, Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "runs"
"""Where trackers write that need a folder, in the working directory."""


def listed(trackers: Trackers) -> list[Any]:
    """Trackers as a list."""
    if trackers is None:
        return []
    return list(trackers) if isinstance(trackers, list | tuple) else [trackers]


def require_trackers(trackers: Trackers, where: str) -> None:
    """Every tracker that is named is known and installed.

    Raises:
        InputError: a name or object is no tracker, or its package is not installed.
        MissingExtraError: TensorBoard is not installed.
    """
    if not listed(trackers):
        return
    with quiet_setup():
        from accelerate.tracking import GeneralTracker, get_available_trackers
        from accelerate.utils import LoggerType
    known = [str(name) for name in LoggerType.list() if str(name) != "all"]
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for tracker in listed(trackers):
        if isinstance(tracker, GeneralTracker):
            continue
        if tracker not in known:
            raise InputError(
                f"{where}(trackers={tracker!r})",
                "no such tracker",
                f"Use {', '.join(known)}, or an object of accelerate.tracking.GeneralTracker",
            )
        if tracker not in available and tracker == "tensorboard":
            raise MissingExtraError("tensorboard", "tensorboard")
        if tracker not in available:
            raise InputError(
                f"{where}(trackers={tracker!r})",
                "its package is not installed",
                f"Install it with: pip install {tracker.replace('_', '-')}",
            )


def start(job: Job, facts: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Begin a run of each tracker, with what is known of it."""
    if job.trackers is not None:
        with quiet_setup():
            plain = {k: v for k, v in facts.items() if isinstance(v, bool | int | float | str)}
            accelerator.init_trackers("rarefy", config=plain)


def finish(job: Job, accelerator: Accelerator) -> None:
    """End the runs of the trackers that were named; objects are the caller's."""
    own = [tracker for tracker in listed(job.trackers) if not isinstance(tracker, str)]
    for tracker in accelerator.trackers:
        if all(tracker is not other for other in own):
            tracker.finish()
