"""The offline judge's model: boosted trees, each asking the same few questions of every row.

Since all branches of a level share one question, a tree is a table: the answers, read as binary
digits, are the index of its leaf. Learned by `benchmarks/train_judge.py`.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Trees(NamedTuple):
    """Trees t of depth d.

    Attributes:
      bias: Log-odds before any tree.
      features_td: Which feature each level looks at.
      thresholds_td: A level's digit is 1 above it.
      leaves_tl: What each of a tree's 2^d leaves adds to the log-odds.
    """

    bias: float
    features_td: np.ndarray
    thresholds_td: np.ndarray
    leaves_tl: np.ndarray


def log_odds(trees: Trees, row: np.ndarray) -> float:
    """Returns the log-odds that an answer with these features is right."""
    digits_td = row.take(trees.features_td) > trees.thresholds_td
    depth = digits_td.shape[1]
    leaf_t = _first_leaves(*trees.leaves_tl.shape) + digits_td @ _places(depth)
    return trees.bias + float(trees.leaves_tl.take(leaf_t).sum())


def log_odds_many(trees: Trees, rows_nf: np.ndarray) -> np.ndarray:
    """Returns `log_odds` of every row."""
    total_n = np.full(len(rows_nf), trees.bias)
    for features_d, thresholds_d, leaves_l in zip(*trees[1:], strict=True):
        total_n += leaves_l[(rows_nf[:, features_d] > thresholds_d) @ _places(len(features_d))]
    return total_n


def to_json(trees: Trees) -> dict[str, Any]:
    """Returns the trees as plain lists, rounded to what matters."""
    return {
        "bias": round(trees.bias, 5),
        "features": trees.features_td.tolist(),
        "thresholds": [[float(f"{x:.7g}") for x in row] for row in trees.thresholds_td.tolist()],
        "leaves": [[round(x, 5) for x in row] for row in trees.leaves_tl.tolist()],
    }


def from_json(tree: dict[str, Any]) -> Trees:
    """Returns what `to_json` was given, up to rounding."""
    return Trees(
        bias=float(tree["bias"]),
        features_td=np.array(tree["features"], np.int64),
        thresholds_td=np.array(tree["thresholds"], np.float64),
        leaves_tl=np.array(tree["leaves"], np.float64),
    )


def read(file: Path) -> dict[str, Any]:
    """Returns the content of a weights file, its trees ready for use."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return {**content, "trees": from_json(content["trees"])}


@functools.lru_cache
def _places(depth: int) -> np.ndarray:
    return 1 << np.arange(depth)[::-1]


@functools.lru_cache
def _first_leaves(trees: int, leaves: int) -> np.ndarray:
    return leaves * np.arange(trees)
