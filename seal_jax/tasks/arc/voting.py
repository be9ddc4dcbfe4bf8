"""Voting: many predictions of one test output become two attempts.

Predictions are grouped by what undid them. All predictions together, and each group, name three
candidates: their most frequent grids, filled up with the grid of most frequent columns and that of
most frequent rows. The candidates named most often are the attempts.

Ties. Among equally frequent grids, the smaller text names candidates first. Among equally named
candidates, and among equally frequent rows or shapes, the first in a Python set of them wins, as in
the reference: tuples of integers hash alike in every process. For the second attempt, a grid that
was predicted without a transformation comes before others. Where the reference leaves a tie to
numpy's unstable argsort, its answer depends on the machine; ours does not.
"""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from seal_jax.tasks.arc.grids import Grid
from seal_jax.tasks.arc.predict import Prediction

Rows = tuple[tuple[int, ...], ...]

CANDIDATES = 3


def vote(predictions: Sequence[Prediction | tuple[Grid, str | None]]) -> list[Grid]:
    """Returns two attempts; equal ones if all predictions are, none if there are none."""
    found = [(_rows(grid), inverter) for grid, inverter in predictions]
    if not found:
        return []
    groups: dict[str | None, list[Rows]] = {}
    for rows, inverter in found:
        groups.setdefault(inverter, []).append(rows)
    named = _candidates([rows for rows, _ in found])
    for group in groups.values():
        named += _candidates(group)
    order = sorted(set(named), key=named.count, reverse=True)  # stable: ties as in the set
    first, *rest = order
    tied = [rows for rows in rest if named.count(rows) == named.count(rest[0])]
    plain = [rows for rows in tied if rows in groups.get(None, ())]
    second = (plain or tied or [first])[0]
    return [_grid(first), _grid(second)]


def majority(predictions: Sequence[Grid], columns: bool = False) -> Grid:
    """Returns the grid of the most frequent rows (or columns) at each place.

    Only predictions of the most frequent shape count.
    """
    turned = [grid.T if columns else grid for grid in map(np.asarray, predictions)]
    shapes = [grid.shape for grid in turned]
    shape = _most_frequent(shapes)
    kept = [_rows(grid) for grid in turned if grid.shape == shape]
    rows = [_most_frequent([grid[i] for grid in kept]) for i in range(shape[0])]
    grid = np.array(rows, np.int8).reshape(shape)
    return grid.T if columns else grid


def _candidates(group: Sequence[Rows]) -> list[Rows]:
    counts = Counter(group)
    top = sorted(counts, key=lambda rows: (-counts[rows], json.dumps(rows)))[:CANDIDATES]
    if len(top) < CANDIDATES:
        shown = [_grid(rows) for rows in group]
        top += [_rows(majority(shown, columns=True)), _rows(majority(shown))]
    return top[:CANDIDATES]


def _most_frequent(values: list) -> tuple:
    return max(set(values), key=values.count)


def _rows(grid: Grid) -> Rows:
    return tuple(map(tuple, np.asarray(grid).tolist()))


def _grid(rows: Rows) -> Grid:
    return np.array(rows, np.int8).reshape(len(rows), -1 if any(rows) else 0)
