"""Prompts that are decoded together, as arrays of few shapes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Prompts = Sequence[Sequence[Sequence[int]]]
"""Token ids [c][b][t]."""

_LONG = (1024, 2048, 4096, 8192)  # tokens that long prompts are padded to


class Tile(NamedTuple):
    """Rows (c, b) that run together, a list for each of `adapters` (or for each device).

    At most `width` of each, prompts padded to t tokens.
    """

    rows: list[list[tuple[int, int]]]
    adapters: list[int]
    width: int
    t: int


def arrange(
    prompts: Prompts, t: int, at_once: Callable[[int], int], own: bool, parts: int = 1
) -> list[Tile]:
    """Returns the rows that run together, in tiles of few shapes.

    With an adapter for each c, a tile spans several of them, alike in their number of rows; else
    the rows of all c are one list, cut into tiles alike in length.

    Args:
      t: Tokens that the longest prompt is padded to.
      at_once: Rows of a tile of prompts of so many tokens.
      own: Whether each c has an adapter of its own.
      parts: Devices that share out a tile, an equal part of c (or of the rows) for each.
    """
    every = [[(c, b) for b in range(len(rows))] for c, rows in enumerate(prompts)]
    length = lambda cb: len(_at(prompts, cb))
    by_size: dict[int, list] = {}
    tiles: list[Tile] = []
    if not own:
        for cb in sorted((cb for rows in every for cb in rows), key=length):
            by_size.setdefault(_padded(length(cb), t), []).append(cb)
        for size, work in by_size.items():
            rows = at_once(size)
            width = min(rows, 1 << (len(work) - 1).bit_length())
            cut = [work[i : i + rows] for i in range(0, len(work), rows)]
            each = -(-width // parts)
            tiles += [Tile([x[i::parts] for i in range(parts)], [], each, size) for x in cut]
        return tiles
    share = len(every) // parts
    for i in range(share):
        mine = every[i::share]
        if any(mine):
            size = _padded(max(length(cb) for rows in mine for cb in rows), t)
            by_size.setdefault(size, []).append((i, max(map(len, mine))))
    for size, counts in sorted(by_size.items()):
        rows = at_once(size)
        most = 1 << max(0, (rows // parts).bit_length() - 1)
        work = sorted(
            (min(most, count - start), i, start)
            for i, count in counts
            for start in range(0, count, most)
        )
        # Fillers too, so that chunks have one shape; among long prompts they would cost too much.
        places = max(len(work), share if len(by_size) == 1 else 1 << (len(work) - 1).bit_length())
        while work:
            width = 1 << (work[-1][0] - 1).bit_length()  # powers of two: few shapes
            take = max(1, min(rows // (width * parts), places))
            group, work = sorted(x[1:] for x in work[-take:]), work[:-take]
            fill = take - len(group)  # every tile of this width has one shape
            group_rows, adapters = [], []
            for part in range(parts):
                adapters += [part * share + i for i, _ in group + [group[-1]] * fill]
                mine = [every[part * share + i][start : start + most] for i, start in group]
                group_rows += mine + [[]] * fill
            tiles.append(Tile(group_rows, adapters, width, size))
    return tiles


def _padded(length: int, t: int) -> int:
    """Returns what a prompt is padded to, where the longest is to `t`: long ones by their own
    length, to few sizes; what a row is does not depend on its company."""
    return next((size for size in _LONG if length <= size < t), t)


def arrays(
    tile: Tile, prompts: Prompts, ids: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens [c, b, t], lengths [c, b] and names [c, b]; length 0 marks a filler."""
    shape = (len(tile.rows), tile.width)
    tokens = np.zeros((*shape, tile.t), np.int32)
    lengths, names = np.zeros(shape, np.int32), np.zeros(shape, np.uint32)
    for at, rows in enumerate(tile.rows):
        for place, row in enumerate(rows):
            prompt = _at(prompts, row)
            tokens[at, place, : len(prompt)] = prompt
            lengths[at, place], names[at, place] = len(prompt), _at(ids, row)
    return tokens, lengths, names


def _at(prompts: Sequence[Sequence[Any]], place: tuple[int, int]) -> Any:
    return prompts[place[0]][place[1]]
