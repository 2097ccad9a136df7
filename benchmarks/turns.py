"""Several things that take time, in turn, so that all meet the same noise."""

import statistics
import time
from collections.abc import Callable


def in_turn(*works: Callable[[], object], rounds: int, warmup: int = 0) -> list[float]:
    """Median seconds of processor time of each, the first rounds not counted."""
    found = []
    for _ in range(rounds):
        row = []
        for work in works:
            begin = time.process_time()
            work()
            row.append(time.process_time() - begin)
        found.append(row)
    return [statistics.median(side) for side in zip(*found[warmup:], strict=True)]
