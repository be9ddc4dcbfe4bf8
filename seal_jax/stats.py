"""Means with standard errors and paired differences: behind every table.

Means are exactly rounded (`statistics.mean`), so that equal values tie exactly, in whatever order.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple


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
