"""The largest count that fits, found by compiling few programs."""

import math
from collections.abc import Callable
from typing import NamedTuple

_TRIES = 7  # programs compiled in one search


class Fit(NamedTuple):
    """What a program for `count` candidates (or sequences) needs; bytes None: it was not said."""

    count: int
    bytes: int | None
    kinds: dict[str, int] | None
    fits: bool


def search(at: Callable[[int], Fit], limit: int, unit: int, most: int, first: int) -> Fit:
    """Returns the largest multiple of `unit` up to `most` that fits (count 0: none does).

    Memory is nearly affine in the count, so few programs are compiled: the next is where a line
    through what is known meets the limit. After `_TRIES` the largest that was seen to fit is it.

    Args:
      at: Compiles a program for a count.
      first: Where to begin.
    """
    fitting, failing = Fit(0, 0, None, False), None
    seen: dict[int, int] = {}
    low, high = 0, most // unit + 1  # in units: fits, does not fit
    k = min(max(first // unit, 1), most // unit)
    for _ in range(_TRIES):
        fit = at(k * unit)
        if fit.bytes:
            seen[k] = fit.bytes
        if fit.fits:
            low, fitting = k, fit
        else:
            high, failing = k, fit
        if high - low <= 1:
            break
        k = _next(seen, low, high, limit)
    if fitting.count:
        return fitting
    return failing._replace(count=0) if failing is not None else fitting


def _next(seen: dict[int, int], low: int, high: int, limit: int) -> int:
    """Returns the count to try next, strictly between `low` and `high`."""
    points = sorted(seen.items(), key=lambda p: abs(p[1] - limit))[:2]
    if len(points) == 2 and points[0][1] != points[1][1]:
        (k0, b0), (k1, b1) = points
        guess = k0 + math.floor((limit - b0) * (k1 - k0) / (b1 - b0))
    elif points:
        guess = math.floor(points[0][0] * limit / points[0][1])
    else:
        guess = (low + high) // 2
    return min(max(guess, low + 1), high - 1)
