"""The plan that comes nearest to a budget from below."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rarefy.pruning.plan import Plan
from rarefy.pruning.selection.allocation import Allocation, Lane

CLOSE = 0.02
"""How far below its budget a network may end where a nearer one can be had, as a share of that."""

PORTION = 0.25
"""Share of what is still free that is given back to one track at once."""

MOST_STEPS = 8
"""Steps of one track that a swap takes at most."""

MOST_TRIALS = 200
"""Plans that are tried at most to come closer."""


@dataclass(frozen=True)
class Landed:
    """A plan, how many items of each lane it takes, and the share of the cost that it leaves."""

    plan: Plan
    counts: tuple[int, ...]
    share: float


Try = Callable[[Sequence[int]], Landed]
"""How many items of each lane should go -> what that makes."""

Track = tuple[int, ...]
"""Numbers of lanes that go together, by one share of each."""


def least_removal(allocate: Allocation, attempt: Try, limit: float, levels: int) -> Landed | None:
    """The least removal that leaves at most ``limit``, by bisection; None where none does."""
    return _bisected(allocate, attempt, limit, levels)[0]


def _bisected(
    allocate: Allocation, attempt: Try, limit: float, levels: int
) -> tuple[Landed | None, int]:
    """The least removal, and how many levels of it there are."""
    best = attempt(allocate(1.0))
    if best.share > limit:
        return None, levels
    low, high = 0, levels
    while low < high:
        middle = (low + high) // 2
        found = attempt(allocate(middle / levels))
        if found.share <= limit:
            best, high = found, middle
        else:
            low = middle + 1
    return best, low


def landed(
    allocate: Allocation,
    lanes: Sequence[Lane],
    attempt: Try,
    limit: float,
    levels: int,
    *,
    even: bool = False,
    together: Sequence[Track] = (),
) -> Landed | None:
    """The nearest to the limit from below of the plans that are tried; None where none fits.

    The least removal is brought closer; if it is to stay ``even`` over the lanes, only where it is
    not close already. Where that stays far below the limit, since widths that have to agree go in
    steps that leap over it, the lanes that leap keep what they have, and the others go on.

    Args:
        allocate: share to remove -> items of each lane.
        lanes: what it chooses from.
        attempt: makes a plan.
        limit: the share of the cost that may remain.
        levels: amounts of removal that are told apart.
        even: whether the lanes should lose equal shares.
        together: lanes that may have to go by one share.
    """
    best: Landed | None = None
    caps: dict[int, int] = {}

    def held(share: float) -> list[int]:
        return [min(n, caps.get(i, n)) for i, n in enumerate(allocate(share))]

    while True:
        below, level = _bisected(held, attempt, limit, levels)
        if below is None:
            return best
        if even and best is None and is_close(below.share, limit):
            return below
        found = closer(below, lanes, attempt, limit, together)
        best = found if best is None or found.share > best.share else best
        if is_close(best.share, limit) or level == 0:
            return best
        pair = held((level - 1) / levels), held(level / levels)
        caps |= _leaping(*pair, lanes, attempt, caps)


def _leaping(
    few: Sequence[int],
    more: Sequence[int],
    lanes: Sequence[Lane],
    attempt: Try,
    caps: Mapping[int, int],
) -> dict[int, int]:
    """What lanes keep to that do not go as asked from one amount of removal to the next.

    Where there are no more of them, those that were to go on keep to what they had.
    """
    before, after = attempt(few).counts, attempt(more).counts
    asked = [
        lane.range.nearest(n) - lane.range.nearest(m)
        for lane, m, n in zip(lanes, few, more, strict=True)
    ]
    found = {i: before[i] for i, n in enumerate(asked) if after[i] - before[i] != n}
    found = {i: n for i, n in found.items() if n < caps.get(i, lanes[i].range.size)}
    return found or {i: few[i] for i in range(len(few)) if few[i] < more[i]}


def closer(
    found: Landed,
    lanes: Sequence[Lane],
    attempt: Try,
    limit: float,
    together: Sequence[Track] = (),
) -> Landed:
    """A plan that gives back what still fits; where that does not come close, one with a swap.

    Items are given back track by track, the most important first. A swap takes one step more of a
    track and gives back of others.

    Args:
        found: a plan within the limit.
        lanes: what it chooses from.
        attempt: makes a plan.
        limit: the share of the cost that may remain.
        together: lanes that may have to go by one share.
    """
    search = _Search(lanes, together, attempt, limit)
    found = search.given_back(found)
    while not is_close(found.share, limit):
        swapped = search.swapped(found)
        if swapped is None:
            break
        found = swapped
    return found


class _Search:
    """Steps from plan to plan, of one lane or of several together.

    Args:
        lanes: what is chosen from.
        together: lanes that may have to go by one share.
        attempt: makes a plan.
        limit: the share of the cost that may remain.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        together: Sequence[Track],
        attempt: Try,
        limit: float,
    ) -> None:
        self.lanes, self.attempt, self.limit = lanes, attempt, limit
        self.trials = iter(range(MOST_TRIALS))
        self.tracks = [*((i,) for i in range(len(lanes))), *together]

    def given_back(self, found: Landed, closed: Track = ()) -> Landed:
        """A plan that gives back what still fits, but for the lanes that are closed."""
        tracks = {t for t in self.tracks if not set(t) & set(closed)}
        while tracks:
            track = max(sorted(tracks), key=lambda t: self._value(found, t))
            saved = sum(self.lanes[i].saved for i in track)
            many = int((self.limit - found.share) * PORTION / saved)
            for by in dict.fromkeys((max(many, 1), 1)):
                trial = self._try(found, self._fewer(found.counts, track, by))
                if trial is not None and found.share < trial.share <= self.limit:
                    found = trial
                    break
            else:
                tracks.remove(track)
        return found

    def swapped(self, found: Landed) -> Landed | None:
        """The first swap that comes nearer: small ones of all tracks before large ones."""
        taken = {track: list(found.counts) for track in self.tracks}
        for _ in range(MOST_STEPS):
            for track in self.tracks:
                taken[track] = self._more(taken[track], track)
                trial = self._try(found, taken[track])
                if trial is None or trial.share > self.limit:
                    continue
                trial = self.given_back(trial, track)
                if trial.share > found.share:
                    return trial
        return None

    def _value(self, found: Landed, track: Track) -> float:
        """The importance of what one step back gives back."""
        fewer = self._fewer(found.counts, track, 1)
        return sum(float(self.lanes[i].values[fewer[i] : found.counts[i]].sum()) for i in track)

    def _try(self, found: Landed, counts: Sequence[int]) -> Landed | None:
        """What other counts make; None where they are what there is, or enough was tried."""
        if tuple(counts) == found.counts or next(self.trials, None) is None:
            return None
        return self.attempt(counts)

    def _fewer(self, counts: Sequence[int], track: Track, by: int) -> list[int]:
        """Counts with so many steps less of a track, or the same where there are none."""
        found = list(counts)
        if len(track) == 1:
            found[track[0]] = self.lanes[track[0]].range.fewer(counts[track[0]], by)
        else:
            self._shared(found, track, max(math.ceil(self._steps(counts, track)) - by, 0))
        return found

    def _more(self, counts: Sequence[int], track: Track) -> list[int]:
        """Counts with one step more of a track, or the same where there is none."""
        found = list(counts)
        if len(track) == 1:
            found[track[0]] = self.lanes[track[0]].range.more(counts[track[0]])
        else:
            self._shared(found, track, math.floor(self._steps(counts, track)) + 1)
        return found

    def _step(self, track: Track) -> int:
        """Into how many equal parts the lanes of a track go."""
        return math.gcd(*(self.lanes[i].range.size for i in track))

    def _steps(self, counts: Sequence[int], track: Track) -> float:
        """How many of these parts of the lanes go."""
        shares = [counts[i] / self.lanes[i].range.size for i in track]
        return round(max(shares) * self._step(track), 6)

    def _shared(self, counts: list[int], track: Track, steps: int) -> None:
        """Let so many parts of all lanes of a track go."""
        for i in track:
            bounds = self.lanes[i].range
            counts[i] = bounds.nearest(bounds.size // self._step(track) * steps)


def is_close(share: float, limit: float) -> bool:
    """Whether what remains is as near to its limit as was promised."""
    return limit - share <= CLOSE * limit
