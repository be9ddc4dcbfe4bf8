"""Test-time queries: one test input asked in several ways, and their answers undone.

The demonstrations are shown without one of them, in several orders, and transformed by changes
that can be undone (transpose, flips, rotations).
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.arc import augment, prompts, tasks
from seal_jax.tasks.arc.grids import Grid
from seal_jax.tasks.arc.tasks import ArcTask

_NAMES = [part.name for part in augment.INVERTIBLE]


class Query(NamedTuple):
    """A task as it is shown to the model, and the name of what undoes it in the answer."""

    task: ArcTask
    inverter: str | None = None


class Prediction(NamedTuple):
    """An answer's grid, undone, and what undid it."""

    grid: Grid
    inverter: str | None = None


def queries(
    task: ArcTask,
    rng: np.random.RandomState,
    *,
    leave: Sequence[int] = (1,),
    permute: int = 2,
    max_tokens: int = 8192,
    count_tokens: Callable[[ArcTask], int] = prompts.count_tokens,
    reference_quirks: bool = False,
) -> list[Query]:
    """Returns the queries for a task's test input; none if every prompt is too long.

    Args:
      leave: How many demonstrations are left out, one choice after the other; one more than the
        last of them where every prompt is too long.
      permute: Random orders of each subset, besides its own.
      max_tokens: Prompts (with the answer, if known) that are not shorter are dropped.
      reference_quirks: Begin each `leave` with the same draws; ask without any demonstration
        rather than with all of them where a task has just one.
    """
    start = copy.deepcopy(rng)

    def short(leave: Sequence[int]) -> list[Query]:
        made = []
        for n in leave:
            own = copy.deepcopy(start) if reference_quirks else rng
            kept = subsets(task, n, reference_quirks)
            made += transformed(tasks.unique(kept + permuted(kept, own, permute)), own)
        return [query for query in made if count_tokens(query.task) < max_tokens]

    return short(leave) or short((*leave, leave[-1] + 1))


def subsets(task: ArcTask, leave: int, reference_quirks: bool = False) -> list[ArcTask]:
    """Returns the task with each choice of `leave` demonstrations left out."""
    indices = range(len(task.train))
    if leave >= len(task.train) and not reference_quirks:
        leave = 0
    return [
        replace(task, train=tuple(task.train[i] for i in indices if i not in out))
        for out in itertools.combinations(indices, leave)
    ]


def permuted(kept: Sequence[ArcTask], rng: np.random.RandomState, permute: int) -> list[ArcTask]:
    """Returns each task in `permute` random orders of its demonstrations."""
    return [augment.reordered(one, rng) for one in kept for _ in range(permute)]


def transformed(shown: Sequence[ArcTask], rng: np.random.RandomState) -> list[Query]:
    """Returns all tasks as they are, and one of them drawn for each invertible augmenter.

    What a symmetric task is turned into may be there already, and is not asked twice.
    """
    made = {tasks.code(one): Query(one) for one in shown}
    for part in augment.INVERTIBLE if shown else ():
        one = tasks.on_grids(shown[rng.choice(len(shown))], part.grid)
        undo = augment.inverse(part.name)
        assert undo is not None
        made.setdefault(tasks.code(one), Query(one, undo.name))
    return list(made.values())


def undone(grid: Grid, inverter: str | None) -> Grid:
    """Returns the grid that an answer to a transformed query stands for."""
    return grid if inverter is None else _UNDO[inverter].grid(grid)


_UNDO = {part.name: part for part in map(augment.inverse, _NAMES) if part is not None}


def predictions(
    asked: Sequence[Query],
    replies: Sequence[str],
    parse: Callable[[str], Grid | None],
) -> list[Prediction | None]:
    """Returns what each reply predicts; None where it holds no grid."""
    made: list[Prediction | None] = []
    for query, reply in zip(asked, replies, strict=True):
        grid = parse(reply)
        made.append(
            None if grid is None else Prediction(undone(grid, query.inverter), query.inverter)
        )
    return made


def token_budget(prompt: str, max_tokens: int = 8192) -> int:
    """Returns how many tokens the reference lets an answer have."""
    return max_tokens - prompts.llama_tokens(prompt)
