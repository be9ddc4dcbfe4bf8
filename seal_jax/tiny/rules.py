"""Families of grid rules. A family draws a rule; a rule turns an input into its output.

Families are dealt to pretraining, RL and evaluation; none is in two of them. Which of the new ones
can be learned from, and are not known already, `benchmarks/filter_grids.py` says.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.arc.grids import Grid

Rule = Callable[[Grid], Grid]
Rng = np.random.Generator


class Family(NamedTuple):
    """A kind of rule.

    Attributes:
      draw: Makes a rule for grids of a shape and a palette of colours (black first).
      black: Whether inputs need black cells to work on.
      fixed: Whether the rule knows the shape, so that all inputs of a task must have it.
    """

    draw: Callable[[Rng, tuple[int, int], list[int]], Rule]
    black: bool = False
    fixed: bool = False


def _pick(rng: Rng, values):
    return values[rng.integers(len(values))]


def _colour(rng: Rng, palette: list[int]) -> int:
    return int(_pick(rng, palette[1:]))


def _flip(rng, shape, palette) -> Rule:
    axis = int(rng.integers(2))
    return lambda grid: np.flip(grid, axis)


def _rotate(rng, shape, palette) -> Rule:
    turns = int(rng.integers(1, 4))
    return lambda grid: np.rot90(grid, turns)


def _transpose(rng, shape, palette) -> Rule:
    return lambda grid: grid.T


def _antitranspose(rng, shape, palette) -> Rule:
    return lambda grid: np.rot90(grid, 2).T


def _table(new: dict[int, int]) -> Rule:
    table = np.array([new.get(colour, colour) for colour in range(10)], np.int8)
    return lambda grid: table[grid]


def _recolour(rng, shape, palette) -> Rule:
    return _table(dict(zip(palette, rng.permutation(10)[: len(palette)].tolist(), strict=True)))


def _swap(rng, shape, palette) -> Rule:
    one, other = rng.permutation(palette)[:2].tolist()
    return _table({one: other, other: one})


def _only(rng, shape, palette) -> Rule:
    kept = _colour(rng, palette)
    return lambda grid: np.where(grid == kept, grid, 0)


def _without(rng, shape, palette) -> Rule:
    return _table({_colour(rng, palette): 0})


def _invert(rng, shape, palette) -> Rule:
    colour = int(rng.integers(1, 10))
    return lambda grid: np.where(grid == 0, colour, 0)


def _fill(rng, shape, palette) -> Rule:
    return _table({0: int(rng.integers(1, 10))})


def _roll(rng, shape, palette) -> Rule:
    down, right = _pick(rng, [(0, 1), (1, 0), (1, 1), (0, -1), (-1, 0), (-1, -1)])
    return lambda grid: np.roll(grid, (down, right), (0, 1))


def _shift(rng, shape, palette) -> Rule:
    axis, end = int(rng.integers(2)), int(rng.integers(2))

    def rule(grid: Grid) -> Grid:
        moved = np.roll(grid, -1 if end else 1, axis)
        moved[(slice(None),) * axis + (-1 if end else 0,)] = 0
        return moved

    return rule


def _gravity(rng, shape, palette) -> Rule:
    axis, end = int(rng.integers(2)), int(rng.integers(2))

    def rule(grid: Grid) -> Grid:
        order = np.argsort((grid == 0) ^ bool(end), axis=axis, kind="stable")
        return np.take_along_axis(grid, order, axis)

    return rule


def _painted(where: Callable[[int, int], np.ndarray], colour: int) -> Rule:
    def rule(grid: Grid) -> Grid:
        return np.where(where(*grid.shape), np.int8(colour), grid)

    return rule


def _edge(h: int, w: int) -> np.ndarray:
    mask = np.ones((h, w), bool)
    mask[1:-1, 1:-1] = False
    return mask


def _border(rng, shape, palette) -> Rule:
    return _painted(_edge, int(rng.integers(1, 10)))


def _inside(rng, shape, palette) -> Rule:
    return _painted(lambda h, w: ~_edge(h, w), int(rng.integers(10)))


def _diagonal(rng, shape, palette) -> Rule:
    return _painted(lambda h, w: np.eye(h, w, dtype=bool), int(rng.integers(1, 10)))


def _parity(rng, shape, palette) -> Rule:
    odd = int(rng.integers(2))
    return _painted(lambda h, w: np.add.outer(range(h), range(w)) % 2 == odd, int(rng.integers(10)))


def _mask(rng, shape, palette) -> Rule:
    mask = rng.random(shape) < 0.4
    return _painted(lambda h, w: mask, int(rng.integers(10)))


def _bar(rng, shape, palette) -> Rule:
    place = int(rng.integers(shape[0]))
    return _painted(lambda h, w: np.arange(h)[:, None] == [place] * w, int(rng.integers(1, 10)))


def _cross(rng, shape, palette) -> Rule:
    def where(h: int, w: int) -> np.ndarray:
        return (np.arange(h)[:, None] == h // 2) | (np.arange(w) == w // 2)

    return _painted(where, int(rng.integers(1, 10)))


def _corners(rng, shape, palette) -> Rule:
    def where(h: int, w: int) -> np.ndarray:
        return np.isin(np.arange(h), (0, h - 1))[:, None] & np.isin(np.arange(w), (0, w - 1))

    return _painted(where, int(rng.integers(1, 10)))


def _keep_row(rng, shape, palette) -> Rule:
    kept = int(rng.integers(shape[0]))
    return lambda grid: np.where(np.arange(len(grid))[:, None] == kept, grid, 0)


def _antidiagonal(rng, shape, palette) -> Rule:
    return _painted(lambda h, w: np.eye(h, w, dtype=bool)[:, ::-1], int(rng.integers(1, 10)))


def _saltire(rng, shape, palette) -> Rule:
    def where(h: int, w: int) -> np.ndarray:
        one = np.eye(h, w, dtype=bool)
        return one | one[:, ::-1]

    return _painted(where, int(rng.integers(1, 10)))


def _keep_column(rng, shape, palette) -> Rule:
    kept = int(rng.integers(shape[1]))
    return lambda grid: np.where(np.arange(grid.shape[1]) == kept, grid, 0)


def _keep_edge(rng, shape, palette) -> Rule:
    colour = int(rng.integers(1, 10))
    return lambda grid: np.where(_edge(*grid.shape), np.where(grid == 0, colour, grid), 0)


def _half(rng, shape, palette) -> Rule:
    def where(h: int, w: int) -> np.ndarray:
        return np.add.outer(np.arange(h), np.arange(w)) < (h + w) // 2 - 1

    return _painted(where, int(rng.integers(1, 10)))


def _recolour_row(rng, shape, palette) -> Rule:
    row, new = int(rng.integers(shape[0])), _swap(rng, shape, palette)
    return lambda grid: np.where(np.arange(len(grid))[:, None] == row, new(grid), grid)


def _lines(rng, shape, palette) -> Rule:
    axis = int(rng.integers(2))
    return lambda grid: np.where(grid == 0, grid.max(axis, keepdims=True), grid)


def _symmetry(rng, shape, palette) -> Rule:
    axis = int(rng.integers(2))

    def rule(grid: Grid) -> Grid:
        half = np.arange(grid.shape[axis])
        return np.take(grid, np.minimum(half, half[::-1]), axis)

    return rule


def _overlay(rng, shape, palette) -> Rule:
    axis = int(rng.integers(2))
    return lambda grid: np.where(grid == 0, np.flip(grid, axis), grid)


def _copy_row(rng, shape, palette) -> Rule:
    return lambda grid: np.repeat(grid[:1], len(grid), 0)


def _copy_column(rng, shape, palette) -> Rule:
    return lambda grid: np.repeat(grid[:, -1:], grid.shape[1], 1)


def _last_row(rng, shape, palette) -> Rule:
    return lambda grid: np.repeat(grid[-1:], len(grid), 0)


def _majority(rng, shape, palette) -> Rule:
    return lambda grid: np.full_like(grid, np.bincount(grid.ravel(), minlength=10).argmax())


def _cells(rng, shape, palette) -> Rule:
    order = rng.permutation(shape[0] * shape[1])
    return lambda grid: grid.ravel()[order].reshape(grid.shape)


def _rows(rng, shape, palette) -> Rule:
    order = rng.permutation(shape[0])
    return lambda grid: grid[order]


def _columns(rng, shape, palette) -> Rule:
    order = rng.permutation(shape[1])
    return lambda grid: grid[:, order]


def _crop(rng, shape, palette) -> Rule:
    top, left = rng.integers(2, size=2).tolist()
    return lambda grid: grid[top : len(grid) - 1 + top, left : grid.shape[1] - 1 + left]


def _concat(rng, shape, palette) -> Rule:
    axis = int(rng.integers(2))
    return lambda grid: np.concatenate([grid, grid], axis)


def _mirror(rng, shape, palette) -> Rule:
    axis = int(rng.integers(2))
    return lambda grid: np.concatenate([grid, np.flip(grid, axis)], axis)


def _upscale(rng, shape, palette) -> Rule:
    return lambda grid: grid.repeat(2, 0).repeat(2, 1)


def _double_rows(rng, shape, palette) -> Rule:
    return lambda grid: grid.repeat(2, 0)


PRETRAINING: dict[str, Family] = {
    "flip": Family(_flip),
    "rotate": Family(_rotate),
    "transpose": Family(_transpose),
    "recolour": Family(_recolour),
    "swap": Family(_swap),
    "only": Family(_only),
    "fill": Family(_fill, black=True),
    "roll": Family(_roll),
    "gravity": Family(_gravity, black=True),
    "border": Family(_border),
    "parity": Family(_parity),
    "mask": Family(_mask, fixed=True),
    "lines": Family(_lines, black=True),
    "symmetry": Family(_symmetry),
    "copy_row": Family(_copy_row),
    "majority": Family(_majority),
    "cells": Family(_cells, fixed=True),
    "rows": Family(_rows, fixed=True),
    "crop": Family(_crop),
    "concat": Family(_concat),
    "mirror": Family(_mirror),
    "upscale": Family(_upscale),
}
RL: dict[str, Family] = {
    "inside": Family(_inside),
    "last_row": Family(_last_row),
    "keep_edge": Family(_keep_edge),
}
HELD_OUT: dict[str, Family] = {
    "overlay": Family(_overlay, black=True),
    "copy_column": Family(_copy_column),
    "keep_row": Family(_keep_row, fixed=True),
    "keep_column": Family(_keep_column, fixed=True),
    "recolour_row": Family(_recolour_row, fixed=True),
}
OTHER: dict[str, Family] = {
    "without": Family(_without),
    "shift": Family(_shift),
    "double_rows": Family(_double_rows),
    "corners": Family(_corners),
    "antidiagonal": Family(_antidiagonal),
    "antitranspose": Family(_antitranspose),
    "invert": Family(_invert, black=True),
    "diagonal": Family(_diagonal),
    "bar": Family(_bar, fixed=True),
    "columns": Family(_columns, fixed=True),
    "cross": Family(_cross),
    "saltire": Family(_saltire),
    "half": Family(_half),
}
"""New to the model too, but it solves nearly all of a family in-context, or nothing teaches it."""
SPLITS = {"pretraining": PRETRAINING, "rl": RL, "held_out": HELD_OUT, "other": OTHER}
