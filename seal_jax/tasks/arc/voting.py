"""Voting: many predictions of one test output become two attempts, as in the reference.

Predictions are grouped by what undid them. All predictions together, and each group, name three
candidates: their most frequent grids, filled up with the grid of most frequent rows and that of
most frequent columns. The three candidates named most often decide: the first is the first attempt,
and where the other two were named equally often, the one predicted more often without a
transformation is the second.

Ties. Among equally frequent grids the first in a Python set of them wins, then the last, as in the
reference: tuples of integers hash alike in every process. The order of the rest the reference
leaves to numpy's argsort, which differs between machines where it is not stable; ours is.
"""

from collections.abc import Sequence

import numpy as np

from seal_jax.tasks.arc.grids import Grid
from seal_jax.tasks.arc.predict import Prediction

Rows = tuple[tuple[int, ...], ...]

GROUPS = (None, "Transpose()", "Flip(0)", "Flip(1)", "Rotate(180)", "Rotate(270)")
"""Predictions undone in any other way only count among all."""


def vote(predictions: Sequence[Prediction | tuple[Grid, str | None] | Grid]) -> list[Grid]:
    """Returns two attempts; equal ones if all predictions are, none if there are none.

    A bare grid is a prediction that nothing undid.
    """
    groups: dict[str | None, list[Rows]] = {}
    for one in predictions:
        told = len(one) == 2 and isinstance(one[1], str | None)
        grid, inverter = one if told else (one, None)
        groups.setdefault(inverter, []).append(_rows(grid))
    if not groups:
        return []
    named = _candidates([rows for group in groups.values() for rows in group])
    for name in GROUPS:
        named += _candidates(groups[name]) if name in groups else []
    first, second, third = _candidates(named)
    if None in groups and named.count(second) == named.count(third):
        plain = groups[None].count
        second = second if plain(second) > plain(third) else third
    return [_grid(first), _grid(second)]


def majority(predictions: Sequence[Grid], columns: bool = False) -> Grid:
    """Returns the grid of the most frequent rows (or columns) at each place.

    It has the most frequent shape; predictions of another shape count for the rows that they have,
    if these are as wide.
    """
    turned = [_rows(np.asarray(grid).T if columns else grid) for grid in predictions]
    # To numpy a grid without rows has one side; of shapes as frequent a set's first wins.
    height, *rest = _most_frequent([np.array(rows).shape for rows in turned])
    width = rest[0] if rest else 0
    rows = [
        _most_frequent([x[i] for x in turned if len(x) > i and len(x[i]) == width])
        for i in range(height)
    ]
    grid = np.array(rows, np.int8).reshape(height, width)
    return grid.T if columns else grid


def _candidates(group: Sequence[Rows]) -> list[Rows]:
    """Returns three grids, the most frequent one first; of few different ones some are equal."""
    unique = list(set(group))
    counts = [group.count(rows) for rows in unique]
    order = [unique[i] for i in np.argsort(counts, kind="stable")[::-1]]
    first = unique[int(np.argmax(counts))]
    second = order[1] if len(order) > 1 else first
    third = order[2] if len(order) > 2 else first
    shown = [_grid(rows) for rows in group]
    by_rows, by_columns = (_rows(majority(shown, columns)) for columns in (False, True))
    if second == first:  # also where the first of a tie is not the last in order
        second = by_rows if by_rows != first else by_columns
    if third in (first, second):
        third = by_rows if by_rows not in (first, second) else by_columns
    return [first, second, third]


def _most_frequent(values: list) -> tuple:
    return max(set(values), key=values.count)


def _rows(grid: Grid) -> Rows:
    return tuple(map(tuple, np.asarray(grid).tolist()))


def _grid(rows: Rows) -> Grid:
    return np.array(rows, np.int8).reshape(len(rows), -1 if any(rows) else 0)
