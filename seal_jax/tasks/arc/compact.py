"""Text of ARC for tiny models: words with spaces between, one token each, one word a cell.

A grid is its height, its width, and its cells, each with its row, column and colour, and a stroke
at the end of a row: `h2 w3 11. 12a 13./ 21a 22a 23a/`. Tiny models learn slowly where a cell lies
from rotary positions alone; so the word says it, and the stroke says where the next one lies. Rows
and columns from the sixth on share a number, which keeps the words few and still lets any grid be
written. Colours are `.` and `a` to `i`. A pair is
`I grid O grid <eos>`: an answer ends alike whether a demonstration or a reply. `E` asks for a
self-edit, written as JSON with a space after each token.
"""

import itertools
import json
import re
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.arc import edits
from seal_jax.tasks.arc.edits import ArcEdit
from seal_jax.tasks.arc.grids import COLOURS, MAX_SIDE, Grid
from seal_jax.tasks.arc.tasks import ArcTask, Pair

COLOUR_LETTERS = ".abcdefghi"
PLACES = 6
"""Rows, and columns, that are told apart."""


class Cell(NamedTuple):
    """What the word of a cell says; rows and columns count from 0."""

    row: int
    column: int
    colour: int
    last: bool


CELLS = {
    f"{row + 1}{column + 1}{COLOUR_LETTERS[colour]}{'/' * last}": Cell(row, column, colour, last)
    for row, column in itertools.product(range(PLACES), repeat=2)
    for colour in range(COLOURS)
    for last in (False, True)
}
"""The words of cells."""
INPUT, OUTPUT, EDIT = "I", "O", "E"
END = "<eos>"
"""Ends a generated text too; it is a special token, so no list of words has it."""
RATES = tuple(f"{digit}e-{power}" for power in range(1, 7) for digit in (1, 2, 3, 5, 8))
"""Learning rates that are words."""
EPOCHS = tuple(str(n) for n in range(1, 9))
_KEYS = (
    "data_generation",
    *edits.FLAGS,
    "training",
    "strategy",
    "learning_rate",
    "num_train_epochs",
    *edits.STRATEGIES,
)
JSON_WORDS = ("{", "}", ":", ",", *(f'"{key}"' for key in _KEYS), "true", "false")
SIDES = tuple(f"{letter}{n}" for letter in "hw" for n in range(1, MAX_SIDE + 1))
WORDS = (INPUT, OUTPUT, EDIT, *SIDES, *JSON_WORDS, *RATES, *EPOCHS, *CELLS)
"""Every word a text may have, in the order of their token ids."""

_WORD = {tuple(cell): word for word, cell in CELLS.items()}
_JSON = re.compile(r'"[a-z_]*"|[{}:,]|[^\s{}:,"]+')


def grid_words(grid: Grid) -> list[str]:
    """Returns the words of a grid."""
    words = [f"h{grid.shape[0]}", f"w{grid.shape[1]}"]
    for row, line in enumerate(grid.tolist()):
        for column, colour in enumerate(line):
            last = column == len(line) - 1
            words.append(_WORD[min(row, PLACES - 1), min(column, PLACES - 1), colour, last])
    return words


def pair_words(pair: Pair) -> tuple[list[str], list[str]]:
    """Returns the words that ask for an output, and those of the output with its end."""
    answer = [] if pair.output is None else [*grid_words(pair.output), END]
    return [INPUT, *grid_words(pair.input), OUTPUT], answer


def demonstrations(task: ArcTask) -> list[str]:
    """Returns the words of a task's demonstrations."""
    return [word for pair in task.train for part in pair_words(pair) for word in part]


def render(task: ArcTask) -> tuple[str, str]:
    """Returns the prompt that ends where the answer begins, and the answer (empty if unknown)."""
    asked, answer = pair_words(task.test)
    return " ".join([*demonstrations(task), *asked]), " ".join(answer[:-1])


def self_edit_prompt(task: ArcTask) -> str:
    """Returns the demonstrations and the word that asks for a self-edit."""
    return " ".join([*demonstrations(task), EDIT])


def count_tokens(task: ArcTask) -> int:
    """Returns how many words a task's prompt and answer have."""
    return sum(text.count(" ") + 1 for text in render(task) if text)


def edit_text(edit: ArcEdit) -> str:
    """Returns a self-edit as JSON in words; its rate and epochs should be words of the list."""
    tree = edit.model_dump()
    rate = tree["training"].pop("learning_rate")
    digits, _, power = f"{rate:.0e}".partition("e")
    epochs = tree["training"].pop("num_train_epochs")
    body = json.dumps(tree)[:-2]  # leaves the inner object open
    body += f', "learning_rate": {digits}e{int(power)}, "num_train_epochs": {epochs}}}}}'
    return " ".join(_JSON.findall(body))


def parse_grid(text: object) -> Grid | None:
    """Returns the grid in a model's reply, or None where it is not exactly one grid."""
    if not isinstance(text, str) or len(text) > 8192:
        return None
    words = text.split()
    if len(words) < 3:
        return None
    rows, columns = _side(words[0], "h"), _side(words[1], "w")
    if not rows or not columns or len(words) != 2 + rows * columns:
        return None
    cells = [CELLS.get(word) for word in words[2:]]
    if None in cells:
        return None
    grid = np.array([cell.colour for cell in cells], np.int8).reshape(rows, columns)
    return grid if grid_words(grid) == words else None  # every cell says its own place


def _side(word: str, letter: str) -> int:
    """Returns the number in a word such as `h3`, or 0 for any other word."""
    return int(word[1:]) if word in SIDES and word.startswith(letter) else 0


assert len(COLOUR_LETTERS) == COLOURS
