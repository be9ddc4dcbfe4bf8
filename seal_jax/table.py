"""The table of a run: a condition a line, with standard errors and paired differences."""

from collections.abc import Sequence
from typing import NamedTuple

from seal_jax import stats
from seal_jax.stats import Estimate


class Row(NamedTuple):
    """A line of the table: a condition's rewards, in the order of the held-out contexts.

    `trials` counts the inner loops (or answers of the bare model) behind them.
    """

    name: str
    rewards: tuple[float, ...]
    trials: int

    @property
    def estimate(self) -> Estimate:
        """The mean reward, its standard error over contexts."""
        return stats.mean_se(self.rewards)


def differences(table: Sequence[Row]) -> list[Estimate | None]:
    """Returns the last round minus each row, paired by context; None for itself, or without one."""
    last = next((row for row in reversed(table) if row.name.startswith("round ")), None)
    minus = lambda row: stats.paired(last.rewards, row.rewards)
    return [minus(row) if last and row is not last else None for row in table]


def text(table: Sequence[Row]) -> str:
    """Returns the table as text, with standard errors and paired differences to the last round."""
    if not table:
        return ""
    lines = [
        f"{'condition':<16} {'accuracy (s.e.)':<18} {'trials':>6}  "
        f"{'last round minus it (s.e.)':<26}"
    ]
    for row, difference in zip(table, differences(table), strict=True):
        change = stats.text(difference) if difference else ""
        lines.append(
            f"{row.name:<16} {stats.text(row.estimate):<18} {row.trials:>6}  {change}".rstrip()
        )
    lines.append(f"{len(table[0].rewards)} held-out contexts; standard errors over contexts.")
    return "\n".join(lines)
