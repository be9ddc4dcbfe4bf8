"""ARC tasks: reading Kaggle's files, one task for each test input.

A task's code is its demonstrations' `input>output` joined by `|`, then `||` and the test example;
a test output that is not known is written as the input, as the reference does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seal_jax.errors import SealError
from seal_jax.formats import files
from seal_jax.tasks.arc import grids
from seal_jax.tasks.arc.grids import Grid


class Pair(NamedTuple):
    """An input and its output; None where the output is not known."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True, eq=False)
class ArcTask:
    """Demonstrations and one test example. Tasks are compared by their `code`.

    Attributes:
      id: Of the puzzle; its test inputs share it.
      index: Which of the puzzle's test inputs.
    """

    train: tuple[Pair, ...]
    test: Pair
    id: str = ""
    index: int = 0

    @property
    def name(self) -> str:
        """The reference's name of a task."""
        return f"{self.id}-{self.index}"


def load(challenges: str | Path, solutions: str | Path | None = None) -> list[ArcTask]:
    """Returns the tasks of a file in Kaggle's format, in its order.

    Args:
      challenges: `{id: {"train": [{"input", "output"}], "test": [{"input"}]}}`.
      solutions: `{id: [grid, ...]}`; without it, outputs in `challenges` count, if there are any.

    Raises:
      SealError: names the file, and the task and grid at fault.
    """
    tree = read_json(challenges)
    answers = read_json(solutions) if solutions is not None else {}
    tasks = []
    for key, entry in tree.items():
        where = f"{challenges}: task {key!r}"
        train = tuple(_pair(pair, f"{where}, train[{i}]", True) for i, pair in _parts(entry, where))
        tests = [_pair(pair, f"{where}, test[{i}]", False) for i, pair in _tests(entry, where)]
        if solutions is not None:
            tests = _solved(tests, answers.get(key), f"{solutions}: task {key!r}")
        tasks += [ArcTask(train, test, key, i) for i, test in enumerate(tests)]
    return tasks


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the object in a JSON file, gzipped or plain; a SealError names the file."""
    tree = files.read_json(path)
    if not isinstance(tree, dict):
        raise SealError(f"{path}: expected an object with a key for each task")
    return tree


def code(task: ArcTask) -> str:
    """Returns a task as one line of text; equal tasks have equal codes."""
    return "|".join(map(pair_code, task.train)) + "||" + pair_code(task.test)


def decode(text: str) -> ArcTask:
    """Returns the task of a code."""
    train, _, test = text.partition("||")
    return ArcTask(
        tuple(_pair_of(pair) for pair in train.split("|") if pair),
        _pair_of(test),
    )


def unique(tasks: Sequence[ArcTask]) -> list[ArcTask]:
    """Returns the tasks without duplicates, in the order in which they were first seen."""
    first: dict[str, ArcTask] = {}
    for task in tasks:
        first.setdefault(code(task), task)
    return list(first.values())


def shuffled(tasks: Sequence[ArcTask], seed: int, count: int | None = None) -> list[ArcTask]:
    """Returns the first `count` tasks in the reference's random order."""
    order = list(tasks)
    np.random.RandomState(seed).shuffle(order)
    return order[:count]


def puzzles(tasks: Sequence[ArcTask]) -> dict[str, tuple[ArcTask, ...]]:
    """Returns the tasks by puzzle: one for each of its test inputs, in order."""
    groups: dict[str, list[ArcTask]] = {}
    for task in tasks:
        groups.setdefault(task.id, []).append(task)
    return {key: tuple(sorted(group, key=lambda task: task.index)) for key, group in groups.items()}


def grids_of(task: ArcTask) -> list[Grid]:
    """Returns all grids of a task whose content is known."""
    pairs = (*task.train, task.test)
    return [grid for pair in pairs for grid in pair if grid is not None]


def fits(task: ArcTask) -> bool:
    """Says whether all grids have at most 30 rows and columns."""
    return all(map(grids.fits, grids_of(task)))


def sizes(task: ArcTask) -> tuple[int, int, int]:
    """Returns the most cells of any demonstration's grid, and the most rows and columns of all."""
    shapes = [grid.shape for grid in grids_of(task)]
    cells = max((grid.size for pair in task.train for grid in pair), default=0)
    return cells, max(h for h, _ in shapes), max(w for _, w in shapes)


def on_grids(task: ArcTask, change: Callable[[Grid], Grid]) -> ArcTask:
    """Returns the task with every grid changed."""
    return on_pairs(task, lambda pair: on_pair(pair, change))


def on_pair(pair: Pair, change: Callable[[Grid], Grid]) -> Pair:
    """Returns a pair with both grids changed."""
    return Pair(change(pair.input), None if pair.output is None else change(pair.output))


def on_pairs(task: ArcTask, change: Callable[[Pair], Pair]) -> ArcTask:
    """Returns the task with every pair changed."""
    return replace(task, train=tuple(map(change, task.train)), test=change(task.test))


def pair_code(pair: Pair) -> str:
    """Returns an input and output as they stand in a task's code."""
    output = pair.input if pair.output is None else pair.output
    return f"{grids.code(pair.input)}>{grids.code(output)}"


def _pair_of(text: str) -> Pair:
    first, _, second = text.partition(">")
    return Pair(grids.decode(first), grids.decode(second))


def _parts(entry: Any, where: str) -> list[tuple[int, Any]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("train"), list):
        raise SealError(f"{where}: has no list 'train'")
    return list(enumerate(entry["train"]))


def _tests(entry: dict[str, Any], where: str) -> list[tuple[int, Any]]:
    if not isinstance(entry.get("test"), list) or not entry["test"]:
        raise SealError(f"{where}: has no list 'test'")
    return list(enumerate(entry["test"]))


def _pair(pair: Any, where: str, solved: bool) -> Pair:
    output = pair.get("output") if isinstance(pair, dict) else None
    if not isinstance(pair, dict) or "input" not in pair or (solved and output is None):
        raise SealError(f"{where}: expected 'input'{' and ' + repr('output') if solved else ''}")
    return Pair(
        grids.make(pair["input"], f"{where}.input"),
        None if output is None else grids.make(output, f"{where}.output"),
    )


def _solved(tests: list[Pair], answers: Any, where: str) -> list[Pair]:
    if not isinstance(answers, list) or len(answers) != len(tests):
        raise SealError(f"{where}: expected a list of {len(tests)} grids, one for each test input")
    return [
        Pair(test.input, grids.make(answer, f"{where}[{i}]"))
        for i, (test, answer) in enumerate(zip(tests, answers, strict=True))
    ]
