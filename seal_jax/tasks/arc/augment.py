"""Augmenters: named changes of a grid, the four families a self-edit chooses from, and inverses.

Random changes of whole tasks (translation, colours, order of examples) draw from a numpy
RandomState as the reference does, so its recorded draws come out again.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.arc import tasks
from seal_jax.tasks.arc.grids import COLOURS, Grid
from seal_jax.tasks.arc.tasks import ArcTask, Pair

_MAX_SHIFT = 4  # shifts are 0, 1, 2 or 3, and less than the grid's side


class Augmenter(NamedTuple):
    """A change of a grid under the reference's name."""

    name: str
    grid: Callable[[Grid], Grid]


class Translation(NamedTuple):
    """A cyclic shift that is drawn for each task."""

    name: str = "RandomTranslateXY()"


IDENTITY = Augmenter("IdentityAugmenter()", lambda grid: grid)
TRANSPOSE = Augmenter("Transpose()", lambda grid: grid.T)
TRANSLATION = Translation()


def rotate(degrees: int) -> Augmenter:
    """Returns the rotation to the left by a multiple of 90 degrees."""
    return Augmenter(f"Rotate({degrees})", lambda grid: np.rot90(grid, degrees // 90))


def flip(axis: int) -> Augmenter:
    """Returns the flip of rows (axis 0) or columns (axis 1)."""
    return Augmenter(f"Flip({axis})", lambda grid: np.flip(grid, axis))


def reflect(axis: int, reverse: bool) -> Augmenter:
    """Returns the grid beside its mirror image; reversed, the mirror image comes first."""

    def change(grid: Grid) -> Grid:
        pair = [grid, np.flip(grid, axis)]
        return np.concatenate(pair[::-1] if reverse else pair, axis)

    return Augmenter(f"Reflect({axis}, reverse={reverse})", change)


def resolution(factor: int) -> Augmenter:
    """Returns each cell as a square of cells."""
    return Augmenter(
        f"IncreaseResolution({factor})", lambda grid: grid.repeat(factor, 0).repeat(factor, 1)
    )


def height(factor: int) -> Augmenter:
    """Returns each row several times."""
    return Augmenter(f"IncreaseHeight({factor})", lambda grid: grid.repeat(factor, 0))


def width(factor: int) -> Augmenter:
    """Returns each column several times."""
    return Augmenter(f"IncreaseWidth({factor})", lambda grid: grid.repeat(factor, 1))


def repeat(axis: int, times: int) -> Augmenter:
    """Returns the grid several times below (axis 0), beside (axis 1) itself, or both (axis 2)."""
    tiles = {0: (times, 1), 1: (1, times), 2: (times, times)}[axis]
    return Augmenter(f"Repeat({axis}, {times})", lambda grid: np.tile(grid, tiles))


def chain(parts: Sequence[Augmenter]) -> Augmenter:
    """Returns several changes one after the other."""

    def change(grid: Grid) -> Grid:
        for part in parts:
            grid = part.grid(grid)
        return grid

    return Augmenter(f"Chain([{', '.join(part.name for part in parts)}])", change)


def concat(parts: Sequence[Augmenter], axis: int) -> Augmenter:
    """Returns several versions of the grid side by side."""
    names = ", ".join(part.name for part in parts)
    return Augmenter(
        f"Concat(({names}), axis={axis})",
        lambda grid: np.concatenate([part.grid(grid) for part in parts], axis),
    )


_TURNS = (rotate(90), rotate(270), rotate(180), flip(0), flip(1))
BASIC: tuple[Augmenter | Translation, ...] = (
    *_TURNS,
    *(reflect(axis, reverse) for reverse in (True, False) for axis in (0, 1)),
    TRANSLATION,
    TRANSPOSE,
)
SIZE = (resolution(2), height(2), width(2))
CHAIN = tuple(chain([part, resolution(2)]) for part in (*_TURNS, TRANSPOSE))
REPEAT = tuple(repeat(axis, 2) for axis in (0, 1, 2))
CONCAT = tuple(concat([IDENTITY, rotate(180)], axis) for axis in (0, 1))
"""The reference has it, but no self-edit can ask for it."""

INVERTIBLE = (TRANSPOSE, flip(0), flip(1), rotate(90), rotate(180))
"""In the order in which predictions use them."""

_INVERSES = {part.name: part for part in (rotate(180), flip(0), flip(1), TRANSPOSE)} | {
    "Rotate(90)": rotate(270),
    "Rotate(270)": rotate(90),
    IDENTITY.name: IDENTITY,
}


def inverse(name: str) -> Augmenter | None:
    """Returns what undoes the augmenter of that name; None where information is lost."""
    return _INVERSES.get(name)


def families(
    basic: bool = False,
    size: bool = False,
    chain: bool = False,
    repeat: bool = False,
    concat: bool = False,
) -> list[Augmenter | Translation]:
    """Returns the augmenters of the chosen families, in the order in which they are applied."""
    chosen = ((basic, BASIC), (size, SIZE), (concat, CONCAT), (chain, CHAIN), (repeat, REPEAT))
    return [part for wanted, family in chosen if wanted for part in family]


def apply(
    part: Augmenter | Translation,
    task: ArcTask,
    rng: np.random.RandomState,
    reference_quirks: bool = False,
) -> ArcTask:
    """Returns the task with an augmenter applied to all its grids; only translations draw."""
    if isinstance(part, Augmenter):
        return tasks.on_grids(task, part.grid)
    return translated_as_reference(task, rng) if reference_quirks else translated(task, rng)


def translated(task: ArcTask, rng: np.random.RandomState) -> ArcTask:
    """Returns the task with one cyclic shift, drawn from `rng`, of every input and output."""
    shapes = [grid.shape for grid in tasks.grids_of(task)]
    down, right = _shift(rng, max(h for h, _ in shapes), max(w for _, w in shapes))
    return tasks.on_grids(task, lambda grid: np.roll(grid, (down, right), (0, 1)))


def translated_as_reference(task: ArcTask, rng: np.random.RandomState) -> ArcTask:
    """Returns the task with each input and output shifted by other draws, as the reference does.

    It draws from a copy, so `rng` does not move and every pair begins with the same draws.
    """

    def change(pair: Pair) -> Pair:
        own = copy.deepcopy(rng)
        return tasks.on_pair(pair, lambda grid: np.roll(grid, _shift(own, *grid.shape), (0, 1)))

    return tasks.on_pairs(task, change)


def _shift(rng: np.random.RandomState, rows: int, columns: int) -> tuple[int, int]:
    return rng.randint(min(rows, _MAX_SHIFT)), rng.randint(min(columns, _MAX_SHIFT))


def colour_map(colours: set[int], rng: np.random.RandomState) -> dict[int, int]:
    """Returns a one-to-one map of a task's colours, as the reference draws it; 0 stays 0.

    Colours go to colours the task does not have, as long as there are any; the rest are paired
    with each other, and some may stay as they are.

    Args:
      colours: Filled in the order in which the task has them.
    """
    # Up to four numbers leave a set of CPython not in order but by their slots in its table, and 1
    # and 9, who share one, as they came in; the reference iterates over such sets. Hashes of
    # integers do not depend on PYTHONHASHSEED.
    own = list(colours - {0})
    free = list(set(range(1, COLOURS)) - set(own))
    others = list(own)
    rng.shuffle(free)
    rng.shuffle(others)
    new = {0: 0}
    for colour in own:
        if colour in new:
            continue
        if free:
            new[colour] = free.pop()
            continue
        partner = others.pop()
        while partner in new.values():
            partner = others.pop()
        new[partner] = colour
        new[colour] = partner
    return new


def recoloured(task: ArcTask, rng: np.random.RandomState) -> ArcTask:
    """Returns the task in other colours."""
    colours = {cell for grid in tasks.grids_of(task) for cell in grid.ravel().tolist()}
    new = colour_map(colours, rng)
    table = np.array([new.get(colour, colour) for colour in range(COLOURS)], np.int8)
    return tasks.on_grids(task, lambda grid: table[grid])


def reordered(task: ArcTask, rng: np.random.RandomState) -> ArcTask:
    """Returns the task with its demonstrations in another order."""
    order = rng.permutation(len(task.train))
    return replace(task, train=tuple(task.train[i] for i in order))
