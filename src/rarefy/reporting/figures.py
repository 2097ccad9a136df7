"""Numbers as text. Ratios are cut, never rounded up, so that no saving is overstated."""

from __future__ import annotations

import math
import re

TIMES = "\N{MULTIPLICATION SIGN}"
DASH = "\N{EN DASH}"

_SMALLEST_CHANGE = 1.005


def size(count: float) -> str:
    """Bytes with decimal prefixes: ``"121 kB"``."""
    return _scaled(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def count(number: float) -> str:
    """A count with a prefix: ``"40.6 M"``."""
    return _scaled(number, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")))


def milliseconds(value: float) -> str:
    """A latency given in milliseconds: ``"2.31 ms"``, ``"0.718 ms"``, ``"8.50 µs"``."""
    if 0.01 <= value < 1:
        return f"{value:.3f} ms"
    return _scaled(value, ((1e3, "s"), (1, "ms"), (1e-3, "µs")))


def spread(low: float, high: float) -> str:
    """Two latencies given in milliseconds, as a range with its unit given once."""
    first, last = milliseconds(low), milliseconds(high)
    if first.split()[-1] == last.split()[-1]:
        first = first.split()[0]
    return f"{first}{DASH}{last}" if first != DASH else DASH


def seconds(value: float) -> str:
    """A wall time: ``"0.4 s"``, ``"25 s"``, ``"2 min 5 s"``, ``"1 h 20 min"``."""
    if not math.isfinite(value):
        return DASH
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(share: float) -> str:
    """A share as a percentage; as many digits as keep 99.98 % from reading 100 %."""
    if not math.isfinite(share):
        return DASH
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    text = f"{value:.1f}"
    if float(text) in (0, 100) and not math.isclose(value, float(text), abs_tol=1e-9):
        text = f"{value:.3f}"
    return f"{text} %"


def points(change: float) -> str | None:
    """A change of a share in percentage points with its sign, or None where there is none."""
    value = 100 * change
    if not math.isfinite(value) or abs(value) < 5e-4:
        return None
    digits = next(d for d in (1, 2, 3) if float(f"{value:.{d}f}") != 0)
    return f"{value:+.{digits}f} points"


def typeset(text: str) -> str:
    """A figure with a real minus sign in place of the hyphen."""
    return re.sub(r"(?:^|(?<=\s))-(?=\d)", "\N{MINUS SIGN}", text)


def title(name: str) -> str:
    """A name with a capital first letter."""
    return name[:1].upper() + name[1:]


def ratio(before: float, after: float) -> float | None:
    """``before / after``, or None where that says nothing."""
    if not (math.isfinite(before) and math.isfinite(after)) or before <= 0 or after <= 0:
        return None
    return before / after


def factor(before: float, after: float, better: str, worse: str, same: str) -> str | None:
    """How ``after`` compares, such as "9.1 times smaller" with a times sign, or ``same``.

    None where there is nothing to compare.
    """
    times = ratio(before, after)
    if times is None:
        return None
    word = better if times >= 1 else worse
    times = max(times, 1 / times)
    if times < _SMALLEST_CHANGE:
        return same
    digits = 1 if times >= 1.5 else 2
    if word == better:
        times = math.floor(times * 10**digits + 1e-9) / 10**digits
    return f"{times:.{digits}f}{TIMES} {word}"


def pair(value: float, limit: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to tell them apart."""
    for digits in range(3, 17):
        texts = f"{value:.{digits}g}", f"{limit:.{digits}g}"
        if texts[0] != texts[1] or value == limit:
            break
    return texts


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Three significant digits in the largest unit that leaves at least 1 before the point."""
    if not math.isfinite(value):
        return DASH
    scale, unit = next((u for u in units if abs(value) >= 0.9995 * u[0]), units[-1])
    number = value / scale
    digits = 0 if number == int(number) and scale == 1 else max(0, 3 - len(str(int(abs(number)))))
    if digits and round(abs(number), digits) >= 10 ** (3 - digits):
        digits -= 1
    return f"{number:.{digits}f} {unit}".rstrip()
