"""A grid of colours: its texts, and reading one from untrusted text. Nothing is ever evaluated.

A grid is a 2-D int8 array of colours 0-9, at most 30 by 30. Its code is its rows joined by `/`,
such as `012/345`: hashable, and what duplicates are found by.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from seal_jax.errors import SealError

Grid = np.ndarray

MAX_SIDE = 30
COLOURS = 10
WORDS = tuple("Black Blue Red Green Yellow Gray Pink Orange Purple Brown".split())
_MAX_TEXT = 8192  # a reply of the largest grid has about 2,000 characters
_TOUCHING = re.compile(r"[0-9][\[\]]+[0-9]")  # one number to the reference, two to us


def make(rows: Sequence[Sequence[int]], where: str) -> Grid:
    """Returns a grid from lists of integers, as found in a file.

    Raises:
      SealError: says `where` the grid is not rectangular, empty, too large or not of colours 0-9.
    """
    shaped = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
    if not shaped or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise SealError(f"{where}: a grid is a list of rows of equal length, not empty")
    if max(len(rows), len(rows[0])) > MAX_SIDE:
        raise SealError(f"{where}: a grid has at most {MAX_SIDE} rows and columns")
    if not all(type(cell) is int and 0 <= cell < COLOURS for row in rows for cell in row):
        raise SealError(f"{where}: the cells of a grid are integers from 0 to 9")
    return np.array(rows, np.int8)


def code(grid: Grid) -> str:
    """Returns the rows as digits, joined by `/`."""
    return "/".join("".join(str(cell) for cell in row) for row in grid.tolist())


def decode(text: str) -> Grid:
    """Returns the grid of a code (trusted text; see `parse_grid` for replies)."""
    return np.array([[int(cell) for cell in row] for row in text.split("/")], np.int8)


def fits(grid: Grid) -> bool:
    """Says whether a grid has at most 30 rows and columns."""
    return max(grid.shape) <= MAX_SIDE


def same(one: Grid | None, other: Grid | None) -> bool:
    """Says whether two grids are there and equal."""
    return one is not None and other is not None and np.array_equal(one, other)


def list_text(grid: Grid) -> str:
    """Returns a grid as numpy prints it, such as `[[0 1]\\n [2 3]]`, however large it is."""
    rows = (" ".join(str(cell) for cell in row) for row in grid.tolist())
    return "[[" + "]\n [".join(rows) + "]]"


def plain_text(grid: Grid) -> str:
    """Returns a grid as digits with spaces between, a line for each row."""
    return "\n".join(" ".join(str(cell) for cell in row) for row in grid.tolist())


def word_text(grid: Grid) -> str:
    """Returns a grid as names of colours with spaces between, a line for each row."""
    return "\n".join(" ".join(WORDS[cell] for cell in row) for row in grid.tolist())


TEXTS: dict[str, Callable[[Grid], str]] = {
    "PythonListGridRepresenter()": list_text,
    "DelimitedGridRepresenter()": plain_text,
    "WordGridRepresenter()": word_text,
}
"""The reference's names for the three."""


def parse_grid(text: Any) -> Grid | None:
    """Returns the grid in a model's reply, or None where there is none.

    Read are `[[0 1]\\n [2 3]]` and `0 1\\n2 3`, with or without a `#`, and what is inside a plain
    ``` fence. Refused is whatever is not a rectangle of single digits.
    """
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        return None
    bare = _bare(text)
    if _TOUCHING.search(bare):
        return None
    rows = [line.split() for line in bare.replace("[", " ").replace("]", " ").split("\n")]
    if not all(len(cell) == 1 and cell in "0123456789" for row in rows for cell in row):
        return None
    if not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        return None
    if max(len(rows), len(rows[0])) > MAX_SIDE:
        return None
    return np.array([[int(cell) for cell in row] for row in rows], np.int8)


def parse_as_reference(text: str) -> Grid | None:
    """Returns what the reference reads in a text that holds a grid alone, with its quirks.

    Numbers are whatever Python takes for integers once brackets are gone (`1][2` is 12). They are
    poured into as many rows as the text has lines, ragged or not, and wrap to int8; no numbers at
    all are a grid without columns.
    """
    rows = text.count("\n") + 1
    try:
        numbers = [int(word) for word in text.replace("[", "").replace("]", "").split()]
        return np.array(numbers).reshape(rows, len(numbers) // rows).astype(np.int8)
    except (ValueError, OverflowError):
        return None


def decode_as_reference(text: str) -> Grid | None:
    """Returns the grid that the reference reads in a model's reply, with its quirks."""
    return parse_as_reference(_bare(text))


def _bare(text: str) -> str:
    """Returns what follows the first fence of a reply, up to the next, or all; without any `#`."""
    plain = text.replace("#", "")
    return (plain.split("```")[1] if "```" in plain else plain).strip()
