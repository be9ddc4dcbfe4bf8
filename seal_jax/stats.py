"""Means with standard errors, paired differences, bootstrap intervals: behind every table.

Means are exactly rounded (`statistics.mean`), so that equal values tie exactly, in whatever order.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean, its standard error and the number of values behind it.

    The error is NaN for fewer than two values, the mean is NaN for none.
    """

    mean: float
    se: float
    n: int

    def __str__(self) -> str:
        return text(self)

    def record(self) -> dict[str, float | int | None]:
        """Returns it as JSON can hold it: None where it is NaN. See `from_record`."""
        return {k: None if math.isnan(v) else v for k, v in self._asdict().items()}


def from_record(record: Mapping[str, float | int | None]) -> Estimate:
    """Returns the estimate of a record, whatever else is in it."""
    found = {name: record[name] for name in Estimate._fields}
    return Estimate(**{k: math.nan if v is None else v for k, v in found.items()})


class Interval(NamedTuple):
    """A statistic of the values, and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


def mean(values: Iterable[float]) -> float:
    """Returns the mean, exactly rounded; NaN of no values."""
    listed = [float(value) for value in values]
    return statistics.mean(listed) if listed else math.nan


def mean_se(values: Iterable[float]) -> Estimate:
    """Returns the mean with its standard error, from the sample variance (n - 1)."""
    listed = [float(value) for value in values]
    n = len(listed)
    deviation = statistics.stdev(listed) if n > 1 else math.nan
    return Estimate(mean(listed), deviation / math.sqrt(max(n, 1)), n)


def paired(a: Iterable[float], b: Iterable[float]) -> Estimate:
    """Returns the mean of a - b, value by value, with the standard error of the differences."""
    first, second = list(a), list(b)
    if len(first) != len(second):
        raise ValueError(f"paired values differ in number: {len(first)} and {len(second)}")
    return mean_se(x - y for x, y in zip(first, second, strict=True))


def bootstrap(
    values: Iterable[float],
    statistic: Callable[[np.ndarray], float] = mean,
    seed: int = 0,
    n: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Returns the statistic with its percentile interval over n resamples.

    Args:
      values: One per independent unit, such as a context; rows are kept whole if they are vectors.
      statistic: Of an array of such values.
      seed: Same seed, same interval.
      n: Resamples.
      level: Share of the resampled statistics between the bounds.
    """
    array = np.asarray(list(values))
    if len(array) == 0:
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    resampled = [statistic(array[rng.integers(0, len(array), len(array))]) for _ in range(n)]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(array)), float(low), float(high))


def text(estimate: Estimate, digits: int = 3) -> str:
    """Returns `.413 (.027)` for a table: no zero before the point, no error where there is none."""
    if math.isnan(estimate.mean):
        return "-"
    centre = _short(estimate.mean, digits)
    return centre if math.isnan(estimate.se) else f"{centre} ({_short(estimate.se, digits)})"


def _short(value: float, digits: int) -> str:
    rounded = f"{value:.{digits}f}"
    if float(rounded) == 0:
        rounded = rounded.removeprefix("-")
    return rounded.replace("0.", ".", 1) if rounded.lstrip("-").startswith("0.") else rounded
