"""Trackers of experiments, through Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rarefy.errors import InputError, MissingExtraError
from rarefy.process import quiet_setup
from rarefy.training.identity import plain
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


@contextmanager
def runs(job: Job, accelerator: Accelerator) -> Iterator[None]:
    """A run of each tracker; of those that are objects of the caller's, only the caller ends it."""
    if job.trackers is None:
        yield
        return
    facts = {k: v for k, v in plain(job.options).items() if v is not None} | {"seed": job.seed}
    with quiet_setup():
        accelerator.init_trackers("rarefy", config=facts)
    theirs = [id(tracker) for tracker in listed(job.trackers)]
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            if id(tracker) not in theirs:
                tracker.finish()
