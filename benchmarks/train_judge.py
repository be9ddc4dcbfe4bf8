"""Learn the offline judge's weights from judged answers.

    python benchmarks/train_judge.py --data grader.jsonl.gz --out seal_jax/judge_weights.json

The data: a JSON object per line with title, question, gold, answer and verdict (true or false);
plain or gzip. The judge's table of word frequencies is kept unless `--words` names a file with a
word at the start of each line, the most frequent first (such as GloVe's `glove.6B.50d.txt`, in
public domain, from which the table in the package was taken). A minute on one core.
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seal_jax import judge, judge_trees
from seal_jax.judge_features import NAMES, features, prepare

WORDS = 20_000
"""Of the frequency table; rarer ones count alike."""


class Data(NamedTuple):
    """Judged answers as arrays.

    Attributes:
      rows_nf: Their features.
      right_n: The verdicts, 0 or 1.
      article_n: Number of the article each belongs to.
      question_n: Number of its question.
    """

    rows_nf: np.ndarray
    right_n: np.ndarray
    article_n: np.ndarray
    question_n: np.ndarray

    def select(self, mask_n: np.ndarray) -> "Data":
        """Returns the chosen answers."""
        return Data(*(column[mask_n] for column in self))


class Settings(NamedTuple):
    """Of the boosting; accuracy barely depends on them (`benchmarks/judge.py` measures it).

    Few questions have many answers each, so a tree sees a share of the questions, not of the rows.
    """

    trees: int = 180
    depth: int = 3
    rate: float = 0.1
    ridge: float = 20.0
    features: float = 0.3
    questions: float = 0.6
    bins: int = 48


DEFAULTS = Settings()


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file, gzip or plain."""
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open()
    with opened as stream:
        return [json.loads(line) for line in stream if line.strip()]


def arrays(rows: list[dict[str, Any]], rarity: Callable[[str], float]) -> Data:
    """Returns judged answers as arrays; blank ones, which need no judge, are left out."""
    rows = [row for row in rows if row["answer"].strip()]
    golds = {(row["question"], row["gold"]): None for row in rows}
    golds = {pair: prepare(*pair, rarity) for pair in golds}
    numbers = lambda keys: np.unique(keys, return_inverse=True)[1]
    return Data(
        rows_nf=np.array([features(golds[r["question"], r["gold"]], r["answer"]) for r in rows]),
        right_n=np.array([float(row["verdict"]) for row in rows]),
        article_n=numbers([row["title"] for row in rows]),
        question_n=numbers([f"{row['title']}\n{row['question']}\n{row['gold']}" for row in rows]),
    )


def fit(data: Data, seed: int = 0, settings: Settings = DEFAULTS) -> judge_trees.Trees:
    """Returns trees boosted for log-likelihood, the same for the same seed."""
    rng = np.random.default_rng(seed)
    edges = [_edges(column, settings.bins) for column in data.rows_nf.T]
    bins_nf = np.stack(
        [np.searchsorted(edge, x) for edge, x in zip(edges, data.rows_nf.T, strict=True)], 1
    )
    bins = settings.bins + 1
    usable = [feature for feature, edge in enumerate(edges) if len(edge)]
    drawn = max(1, round(settings.features * len(usable)))
    questions = data.question_n.max() + 1
    rate_n = np.clip(data.right_n.mean(), 1e-3, 1 - 1e-3)
    bias = float(np.log(rate_n / (1 - rate_n)))
    odds_n = np.full(len(data.right_n), bias)
    trees = []
    for _ in range(settings.trees):
        chance_n = 1 / (1 + np.exp(-odds_n))
        used_n = (rng.random(questions) < settings.questions)[data.question_n]
        slope_n = (data.right_n - chance_n) * used_n
        curve_n = chance_n * (1 - chance_n) * used_n
        leaf_n = np.zeros(len(odds_n), np.int64)
        levels = []
        candidates = rng.choice(usable, drawn, replace=False)
        for depth in range(settings.depth):
            best = (-1.0, 0, 0)  # gain, feature, bin
            for feature in candidates:
                slopes, curves = _histograms(
                    leaf_n * bins + bins_nf[:, feature], (1 << depth, bins), slope_n, curve_n
                )
                gains = _gains(slopes, curves, settings.ridge)[: len(edges[feature])]
                best = max(best, (float(gains.max()), feature, int(gains.argmax())))
            _, feature, split = best
            levels.append((feature, edges[feature][split]))
            leaf_n = 2 * leaf_n + (bins_nf[:, feature] > split)
        size = 1 << settings.depth
        slope_l = np.bincount(leaf_n, slope_n, size)
        leaves_l = settings.rate * slope_l / (np.bincount(leaf_n, curve_n, size) + settings.ridge)
        odds_n += leaves_l[leaf_n]
        trees.append((*zip(*levels, strict=True), leaves_l))
    return judge_trees.Trees(bias, *(np.array(column) for column in zip(*trees, strict=True)))


def _edges(column_n: np.ndarray, bins: int) -> np.ndarray:
    """Returns thresholds half-way between neighbouring values, at most bins - 1 of them."""
    values = np.unique(column_n)
    between = (values[1:] + values[:-1]) / 2
    if len(between) < bins:
        return between
    marks = np.quantile(column_n, np.linspace(0, 1, bins + 1)[1:-1])
    return np.unique(between[np.clip(np.searchsorted(values, marks), 0, len(between) - 1)])


def _histograms(index_n, shape, slope_n, curve_n) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of slope and curvature in every bin of every leaf."""
    size = shape[0] * shape[1]
    slopes = np.bincount(index_n, slope_n, size).reshape(shape)
    return slopes, np.bincount(index_n, curve_n, size).reshape(shape)


def _gains(slopes: np.ndarray, curves: np.ndarray, ridge: float) -> np.ndarray:
    """Returns what splitting all leaves after a bin gains, for every bin."""
    low_slope, low_curve = slopes.cumsum(1), curves.cumsum(1)
    high_slope, high_curve = low_slope[:, -1:] - low_slope, low_curve[:, -1:] - low_curve
    gains = low_slope**2 / (low_curve + ridge) + high_slope**2 / (high_curve + ridge)
    return gains.sum(0)


def read_words(file: Path) -> list[str]:
    """Returns the most frequent plain words of a list in order of frequency."""
    first = (line.split(" ", 1)[0].strip() for line in file.open(encoding="utf-8"))
    plain = (word for word in first if word.isascii() and word.isalnum())
    return [word for word, _ in zip(plain, range(WORDS), strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="judged answers, JSONL")
    parser.add_argument("--out", type=Path, required=True, help="weights file to write")
    parser.add_argument("--words", type=Path, help="words by falling frequency, one a line")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    words = read_words(args.words) if args.words else judge.weights().words
    data = arrays(read(args.data), judge.rarity_of(words))
    content = {
        "about": "Weights of seal_jax.judge.offline, written by benchmarks/train_judge.py",
        "features": list(NAMES),
        "words": " ".join(words),
        "trees": judge_trees.to_json(fit(data, args.seed)),
    }
    args.out.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(data.right_n)} answers, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
