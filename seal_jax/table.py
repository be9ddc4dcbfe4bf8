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
        return stats.mean_se(self.rewards)


def text(table: Sequence[Row]) -> str:
    """Returns the table as text, with standard errors and paired differences to the last round."""
    if not table:
        return ""
    by_name = {row.name: row for row in table}
    last = next((n for n in reversed(by_name) if n.startswith("round")), None)
    lines = [
        f"{'condition':<16} {'accuracy (s.e.)':<18} {'trials':>6}  "
        f"{'last round minus it (s.e.)':<26}"
    ]
    for row in table:
        difference = ""
        if last and row.name != last:
            difference = stats.text(stats.paired(by_name[last].rewards, row.rewards))
        lines.append(
            f"{row.name:<16} {stats.text(row.estimate):<18} {row.trials:>6}  {difference}".rstrip()
        )
    lines.append(f"{len(table[0].rewards)} held-out contexts; standard errors over contexts.")
    return "\n".join(lines)
