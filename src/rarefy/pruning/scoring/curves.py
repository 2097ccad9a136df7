"""What the removal of each group's units costs in the user's own metric: read and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.drawing import Panel, panels
from rarefy.errors import FormatError, InputError, OutputError, first_line
from rarefy.files import replacing
from rarefy.graph.groups import Group

Losses = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Shares of a group's units that go -> what that costs."""

VERSION = 1


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        group: label of the group.
        ratio: share of its units that was asked for.
        removed: how many units were removed.
        units: how many it has.
        metric: what the evaluation returned.
    """

    group: str
    ratio: float
    removed: int
    units: int
    metric: float


@dataclass(frozen=True)
class Sensitivity:
    """The metric against the share of units removed, group by group, all others whole.

    Made by :func:`rarefy.sensitivity`; ``print`` shows a table.

    Attributes:
        base: the metric of the whole network.
        points: what was measured.
        criterion: by which units were chosen.
        higher_is_better: False where the metric is a loss.
        fingerprint: of the network and the options.
    """

    base: float
    points: tuple[Point, ...]
    criterion: str
    higher_is_better: bool
    fingerprint: str

    @property
    def groups(self) -> tuple[str, ...]:
        """Labels of the groups, in their order."""
        return tuple(dict.fromkeys(p.group for p in self.points))

    def curve(self, group: str) -> tuple[Point, ...]:
        """What was measured of one group, by ascending share."""
        return tuple(
            sorted((p for p in self.points if p.group == group), key=lambda p: p.removed / p.units)
        )

    def drop(self, point: Point) -> float:
        """How much worse than the whole network; below zero where it is better."""
        return (self.base - point.metric) * (1 if self.higher_is_better else -1)

    def losses(self, groups: Sequence[Group]) -> Mapping[int, Losses]:
        """For each group that was measured, by its number, what the removal of a share costs.

        Between measurements linear, beyond the last with its slope; where more removed did better
        it was noise or luck, and costs what less did.

        Raises:
            InputError: these groups are not those that were measured.
        """
        number = {label: g for g, label in enumerate(labels(groups))}
        found = {}
        for label in self.groups:
            curve = self.curve(label)
            g = number.get(label, -1)
            if g < 0 or len(groups[g]) != curve[0].units:
                raise InputError(
                    "prune(sensitivity=...)",
                    f"it was measured on another network: {label} is not among the groups of this "
                    f"one, or has other than {curve[0].units} units",
                    "Measure this network with rarefy.sensitivity",
                )
            known = {0.0: 0.0} | {p.removed / p.units: self.drop(p) for p in curve}
            shares, drops = np.array([*known]), np.maximum.accumulate([*known.values()])
            found[g] = interpolated(shares, drops)
        return found

    def __str__(self) -> str:
        ratios = sorted({p.ratio for p in self.points})
        wide = max([len("group"), *map(len, self.groups)])
        lines = [
            f"metric {self.base:.4g} whole, units chosen by {self.criterion}",
            f"{'group':<{wide}}  units  " + "".join(f"{r:>11.0%}" for r in ratios),
        ]
        for group in self.groups:
            curve = self.curve(group)
            at = {p.ratio: f"{p.metric:.4g}" for p in curve}
            cells = "".join(f"{at.get(r, ''):>11}" for r in ratios)
            lines.append(f"{group:<{wide}}  {curve[0].units:>5}  {cells}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw the curves to an SVG file that needs nothing else, one small panel per group.

        Raises:
            OutputError: the path cannot be written.
        """
        drawn = [
            Panel(group, ((0.0, self.base), *((p.removed / p.units, p.metric) for p in curve)))
            for group in self.groups
            for curve in [self.curve(group)]
        ]
        return _written(Path(path), panels("Metric by share of units removed", drawn, self.base))

    def save(self, path: str | Path) -> Path:
        """Write to a JSON file.

        Raises:
            OutputError: the path cannot be written.
        """
        return _written(
            Path(path), json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"
        )

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what :meth:`save` wrote.

        Raises:
            FormatError: it is no such file.
            InputError: there is no file.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            if held.pop("version") != VERSION:
                raise ValueError("another version")
            points = tuple(point(p) for p in held.pop("points"))
            found = cls(points=points, **held)
            if not isinstance(found.base, float | int) or not isinstance(found.criterion, str):
                raise TypeError("base or criterion")
        except OSError as error:
            raise InputError(str(path), f"it cannot be read: {error}", "Check the path") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(
                str(path),
                f"it holds no sensitivity ({first_line(error)})",
                "Give a file that Sensitivity.save wrote",
            ) from error
        return found


def point(held: Mapping[str, Any]) -> Point:
    """A measurement from its JSON form.

    Raises:
        TypeError: it is none.
    """
    found = Point(**held)
    numbers = (found.ratio, found.removed, found.units, found.metric)
    if not isinstance(found.group, str) or not all(isinstance(n, int | float) for n in numbers):
        raise TypeError(f"no measurement: {held!r}")
    return found


def labels(groups: Sequence[Group]) -> tuple[str, ...]:
    """A label of each group: its name, numbered where several groups have one name."""
    seen: dict[str, int] = {}
    found = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        found.append(group.name if seen[group.name] == 1 else f"{group.name} #{seen[group.name]}")
    return tuple(found)


def interpolated(shares: NDArray[np.float64], drops: NDArray[np.float64]) -> Losses:
    """Losses that are known at ascending shares: linear in between, and beyond the last."""
    slope = 0.0
    if len(shares) > 1 and shares[-1] > shares[-2]:
        slope = float((drops[-1] - drops[-2]) / (shares[-1] - shares[-2]))

    def losses(at: NDArray[np.float64]) -> NDArray[np.float64]:
        beyond = np.maximum(at - shares[-1], 0) * slope
        found: NDArray[np.float64] = np.interp(at, shares, drops) + beyond
        return found

    return losses


def _written(path: Path, text: str) -> Path:
    try:
        with replacing(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(str(path), f"it cannot be written: {error}", "Check the path") from error
    return path
