"""Submissions in Kaggle's format: `{id: [{"attempt_1": grid, "attempt_2": grid}, ...]}`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seal_jax.errors import SealError
from seal_jax.tasks.arc import grids, tasks
from seal_jax.tasks.arc.grids import Grid
from seal_jax.tasks.arc.tasks import ArcTask

Submission = dict[str, list[dict[str, list[list[int]]]]]

ATTEMPTS = ("attempt_1", "attempt_2")
MISSING = [[0]]
"""What stands for an attempt that was not made."""


def build(
    asked: Sequence[ArcTask], attempts: Mapping[str, Sequence[Grid | list[list[int]]]]
) -> Submission:
    """Returns a submission for every puzzle of which some test input was attempted.

    It goes up to the last of them, as the reference's does.

    Args:
      attempts: Up to two grids by task name (`id-index`).
    """
    made: Submission = {}
    for key, group in sorted(tasks.puzzles(asked).items()):
        attempted = [task.index for task in group if task.name in attempts]
        if attempted:
            names = (f"{key}-{i}" for i in range(attempted[-1] + 1))
            made[key] = [_entry(attempts.get(name, ())) for name in names]
    return made


def _entry(attempts: Sequence[Any]) -> dict[str, list[list[int]]]:
    rows = [np.asarray(grid).tolist() for grid in attempts]
    return dict(zip(ATTEMPTS, (rows + [MISSING, MISSING])[:2], strict=True))


def score(
    asked: Sequence[ArcTask], submission: Submission, subpoints: bool = False
) -> dict[str, Any]:
    """Returns the scores of a submission, each as [correct, total, ratio].

    `per_prediction` counts the test inputs that were submitted; `competition` all puzzles, right
    only if every test input is. `correct` says it of each puzzle submitted.

    Args:
      asked: All tasks, with their solutions.
      subpoints: A puzzle counts the share of its test inputs that are right.

    Raises:
      SealError: names the task that is unknown, has no solution, or lacks an attempt.
    """
    groups = tasks.puzzles(asked)
    if unknown := sorted(submission.keys() - groups.keys()):
        raise SealError(f"submission: task {unknown[0]!r} is not among the tasks")
    right: dict[str, list[bool]] = {}
    for key in sorted(submission):
        entries, group = submission[key], groups[key]
        if len(entries) > len(group):
            raise SealError(f"submission: task {key!r} has {len(group)} test inputs")
        for i, task in enumerate(group[: len(entries)]):
            _check_entry(entries[i], f"submission: task {key!r}[{i}]")
            if task.test.output is None:
                raise SealError(f"task {task.name}: has no solution to score with")
        right[key] = [
            any(np.array_equal(entry[name], task.test.output) for name in ATTEMPTS)
            for entry, task in zip(entries, group, strict=False)
        ]
    verdicts = [verdict for each in right.values() for verdict in each]
    shares = {key: sum(each) / len(groups[key]) for key, each in right.items()}
    points = [share if subpoints else float(share == 1) for share in shares.values()]
    return {
        "correct": {key: share == 1 for key, share in shares.items()},
        "per_prediction": _ratio(float(sum(verdicts)), len(verdicts)),
        "competition": _ratio(sum(points), len(groups)),
    }


def _ratio(correct: float, total: int) -> list[float]:
    return [float(correct), total, correct / total if total else 0.0]


def task_info(correct: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """Returns verdicts by puzzle as the reference writes them: a data frame's columns."""
    return {
        "task_id": {str(i): key for i, key in enumerate(correct)},
        "correct": {str(i): bool(value) for i, value in enumerate(correct.values())},
    }


def write(path: str | Path, submission: Submission) -> None:
    """Writes a submission file."""
    Path(path).write_text(json.dumps(submission), encoding="utf-8")


def read(path: str | Path) -> Submission:
    """Returns the content of a submission file; a SealError names the task at fault."""
    tree = tasks.read_json(path)
    for key, entries in tree.items():
        where = f"{path}: task {key!r}"
        if not isinstance(entries, list) or not entries:
            raise SealError(f"{where}: expected a list with an entry for each test input")
        for i, entry in enumerate(entries):
            _check_entry(entry, f"{where}[{i}]")
            for name in ATTEMPTS:
                grids.make(entry[name], f"{where}[{i}].{name}")
    return tree


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != set(ATTEMPTS):
        raise SealError(f"{where}: expected 'attempt_1' and 'attempt_2'")
