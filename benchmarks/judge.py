"""How well the offline judge agrees with GPT-4.1, on passages it was not trained on.

    python benchmarks/judge.py --data DATA [--out benchmarks/results/judge.json]

DATA is the folder of reference data, with `grader/` and `ki_inputs/`. Folds are whole articles (all
passages of one title). Speed is of the shipped judge on one core. "Best of five" asks how often the
judge's favourite of a passage's five self-edits is one of GPT-4.1's favourites; its weights never
saw the article either. Takes about five minutes.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import train_judge

from seal_jax import judge, judge_features, judge_trees, stats
from seal_jax.formats import files

FOLDS = 10
Rows = list[dict[str, Any]]


def folds(titles: Sequence[str]) -> dict[str, int]:
    """Returns the fold of each article, at random but always the same."""
    names = sorted(set(titles))
    order = np.random.default_rng(0).permutation(len(names))
    return {names[i]: place % FOLDS for place, i in enumerate(order)}


def measures(found: np.ndarray, right: np.ndarray, titles: Sequence[str]) -> dict[str, float]:
    """Returns agreement with standard errors of accuracy and kappa, by bootstrap over articles."""
    numbers = np.unique(titles, return_inverse=True)[1]
    cells = np.zeros((numbers.max() + 1, 2, 2))
    np.add.at(cells, (numbers, found.astype(int), right.astype(int)), 1)
    rng = np.random.default_rng(0)
    draws = [
        _agreement(cells[rng.integers(len(cells), size=len(cells))].sum(0)) for _ in range(1000)
    ]
    result = _agreement(cells.sum(0))
    for name in ("accuracy", "kappa"):
        result[f"{name}_se"] = float(np.std([draw[name] for draw in draws], ddof=1))
    return result


def _agreement(cells: np.ndarray) -> dict[str, float]:
    (true_no, missed), (false_yes, true_yes) = cells
    n = cells.sum()
    accuracy = (true_no + true_yes) / n
    yes, really = (false_yes + true_yes) / n, (missed + true_yes) / n
    chance = yes * really + (1 - yes) * (1 - really)
    precision = true_yes / max(false_yes + true_yes, 1)
    recall = true_yes / max(missed + true_yes, 1)
    return {
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
        "kappa": (accuracy - chance) / (1 - chance),
    }


def cross_validate(data: train_judge.Data, fold_n: np.ndarray, **changes: Any):
    """Returns verdicts of trees that did not see the article, and the trees of each fold."""
    settings = train_judge.DEFAULTS._replace(**changes)
    found, models = np.zeros(len(fold_n), bool), []
    for fold in range(FOLDS):
        model = train_judge.fit(data.select(fold_n != fold), settings=settings)
        mine = fold_n == fold
        found[mine] = judge_trees.log_odds_many(model, data.rows_nf[mine]) > 0
        models.append(model)
    return found, models


def curve(rows: Rows, data: train_judge.Data, fold_n: np.ndarray) -> dict[str, Any]:
    """Returns agreement from the simplest rule to the shipped judge's kind, and the fold models."""
    right = data.right_n > 0
    titles = [row["title"] for row in rows]
    exact = np.array([judge.exact(r["question"], r["gold"], r["answer"]) for r in rows])
    contained = np.array([_contained(row["gold"], row["answer"]) for row in rows])
    table = {
        "exact match": measures(exact, right, titles),
        "gold contained": measures(contained, right, titles),
    }
    for trees, depth in ((20, 1), (60, 2), (180, 4)):
        found, _ = cross_validate(data, fold_n, trees=trees, depth=depth)
        table[f"{trees} trees of depth {depth}"] = measures(found, right, titles)
    found, models = cross_validate(data, fold_n)
    shipped = f"{train_judge.DEFAULTS.trees} trees of depth {train_judge.DEFAULTS.depth} (shipped)"
    table[shipped] = measures(found, right, titles)
    return {"table": table, "models": models}


def _contained(gold: str, answer: str) -> bool:
    return f" {judge.plain(gold)} " in f" {judge.plain(answer)} "


def best_of_five(root: Path, fold_of: dict[str, int], models: list) -> dict[str, Any]:
    """Returns, per result file, how often the judge's favourite is one of GPT-4.1's favourites."""
    result = {}
    for file in sorted((root / "ki_inputs" / "results" / "query_server").rglob("*.json.gz")):
        articles = files.read_json(file)["articles"]
        if not all(c.get("questions") for a in articles for c in a["completions"]):
            continue
        hits, by_chance = [], []
        for article in articles:
            model = models[fold_of.get(article["title"], 0)]
            theirs = [_mean_theirs(c["questions"]) for c in article["completions"]]
            ours = [_mean_ours(c["questions"], model) for c in article["completions"]]
            if len(theirs) < 2:
                continue
            top = [score >= max(theirs) - 1e-9 for score in theirs]
            hits.append(top[int(np.argmax(ours))])
            by_chance.append(sum(top) / len(top))
        if hits:
            name = str(file.relative_to(root / "ki_inputs" / "results"))
            own = stats.mean_se(map(float, hits))
            result[name] = {**own._asdict(), "at_random": stats.mean(by_chance)}
    return result


def _mean_theirs(questions: Rows) -> float:
    return stats.mean([float(q["adapter_correct"]) for q in questions])


def _mean_ours(questions: Rows, model: judge_trees.Trees) -> float:
    return stats.mean([float(_verdict(q, model)) for q in questions])


def _verdict(question: dict[str, Any], model: judge_trees.Trees) -> bool:
    answer = question["adapter_answer"]
    if not answer.strip():
        return False
    text = question["question"].split("\n", 1)[-1]
    prepared = judge_features.prepare(text, question["answer"], judge.weights().rarity)
    row = np.array(judge_features.features(prepared, answer), np.float64)
    return judge_trees.log_odds(model, row) > 0


def speed(rows: Rows, one: Callable[[str, str, str], bool]) -> float:
    """Returns judgements a second, the median of five passes over 3,000 answers."""
    some = [(r["question"], r["gold"], r["answer"]) for r in rows[:3000]]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for item in some:
            one(*item)
        seconds.append(time.perf_counter() - start)
    return len(some) / sorted(seconds)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with grader, ki_inputs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = train_judge.read(args.data / "grader" / "grader_public.jsonl.gz")
    rows = [row for row in rows if row["answer"].strip()]
    data = train_judge.arrays(rows, judge.weights().rarity)
    fold_of = folds([row["title"] for row in rows])
    fold_n = np.array([fold_of[row["title"]] for row in rows])
    measured = curve(rows, data, fold_n)
    report = {
        "command": "python benchmarks/judge.py --data DATA --out benchmarks/results/judge.json",
        "answers": len(rows),
        "articles": len(fold_of),
        "cross_validated": measured["table"],
        "best_of_five": best_of_five(args.data, fold_of, measured["models"]),
        "judgements_per_second": round(speed(rows, judge.offline)),
        "weights_kB": round(
            Path(judge.__file__).with_name("judge_weights.json").stat().st_size / 1e3
        ),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }
    print(f"{'':<36}accuracy (s.e.)   precision  recall  f1     kappa (s.e.)")
    for name, m in report["cross_validated"].items():
        print(
            f"{name:<36}{m['accuracy']:.4f} ({m['accuracy_se']:.4f})   {m['precision']:.3f}      "
            f"{m['recall']:.3f}   {m['f1']:.3f}  {m['kappa']:.4f} ({m['kappa_se']:.4f})"
        )
    for name, own in report["best_of_five"].items():
        print(f"one of GPT-4.1's best: {own['mean']:.2f} (at random {own['at_random']:.2f}) {name}")
    print(f"{report['judgements_per_second']} judgements a second, {report['weights_kB']} kB")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(args.out, file=sys.stderr)


if __name__ == "__main__":
    main()
