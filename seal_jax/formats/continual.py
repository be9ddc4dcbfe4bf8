"""Summaries of continual self-edits: accuracy after each edit, over the passages seen so far.

A sequence of n edits gives a matrix of n + 1 rows and n columns. Row 0 is the un-edited model on
every passage; row r, after r edits, fills columns 0..r-1 and leaves the rest 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seal_jax.errors import SealError
from seal_jax.formats import files

Matrix = list[list[float]]
_ABOUT = ("n_datapoints", "dataset", "base_model")


def summary(matrices: Sequence[Matrix], dataset: str, base_model: str) -> dict[str, Any]:
    """Returns the summary of sequences: mean and sample deviation of each cell, not rounded."""
    cells = np.asarray(matrices)
    std = np.std(cells, axis=0, ddof=1) if len(cells) > 1 else np.zeros(cells.shape[1:])
    return {
        "mean_over_sequences": np.mean(cells, axis=0).tolist(),
        "std_over_sequences": std.tolist(),
        "n_sequences": len(matrices),
        "n_datapoints": len(matrices[0][0]),
        "dataset": dataset,
        "base_model": base_model,
    }


def pool(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns several runs of equal size as one, to 4 decimals.

    `mean` and `average_std` are means over runs, as the reference publishes; `pooled_std` is the
    deviation of all sequences together, within and between runs. Rounding is numpy's: half a unit
    of the last place goes to the even neighbour, which Python's `round` does not always do.

    Raises:
      SealError: where the runs differ in size, data set or model.
    """
    shapes = {(len(s["mean_over_sequences"]), s["n_sequences"]) for s in summaries}
    if len(shapes) != 1:
        raise SealError("continual runs differ in sequences or passages: they cannot be pooled")
    for key in _ABOUT:
        if any(s.get(key) != summaries[0].get(key) for s in summaries):
            raise SealError(f"continual runs differ in {key!r}: they cannot be pooled")
    n = summaries[0]["n_sequences"]
    total = n * len(summaries)
    means = np.asarray([s["mean_over_sequences"] for s in summaries])
    stds = np.asarray([s["std_over_sequences"] for s in summaries])
    within = np.sum((n - 1) * stds**2, axis=0)
    between = np.sum(n * (means - np.mean(means, axis=0)) ** 2, axis=0)
    values = {
        "mean": np.mean(means, axis=0),
        "average_std": np.mean(stds, axis=0),
        "pooled_std": np.sqrt((within + between) / max(total - 1, 1)),
    }
    rounded = {key: np.round(value, 4).tolist() for key, value in values.items()}
    about = {key: summaries[0].get(key) for key in _ABOUT}
    return {**rounded, "n_sequences": total, **about}


def read(path: str | Path) -> dict[str, Any]:
    """Returns a summary file's content, its matrices checked; a SealError names what is wrong."""
    content = files.read_json(path)
    for key in ("mean_over_sequences", "std_over_sequences"):
        matrix = files.need(content, key, list, str(path))
        width = len(matrix) - 1
        if width < 1 or any(not isinstance(row, list) or len(row) != width for row in matrix):
            raise SealError(f"{path}: {key!r} is not n + 1 rows of n accuracies")
    files.need(content, "n_sequences", int, str(path))
    return content


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a summary file in the reference's layout."""
    files.write_json(path, content)
