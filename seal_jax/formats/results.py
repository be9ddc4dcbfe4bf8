"""Result files of single passages (`run_*.json`, `rank_*.json`): verdicts -> statistics -> file.

The reference rounds each run's accuracy to 4 decimals, means them exactly (`statistics.mean`), and
rounds again at the article and at the top. Deviations are of samples, and 0 for one value.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seal_jax import config
from seal_jax.formats import files


def accuracy(verdicts: Sequence[bool]) -> float:
    """Returns the share of right answers to 4 decimals; 0 of none."""
    return round(sum(verdicts) / len(verdicts), 4) if verdicts else 0.0


def gain(baseline: Sequence[bool], adapter: Sequence[bool]) -> float:
    """Returns by how much the share of right answers grew, to 4 decimals."""
    if not adapter:
        return 0.0
    return round(sum(adapter) / len(adapter) - sum(baseline) / len(baseline), 4)


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the exactly rounded mean, 0 of none; None if a value is missing in an old file."""
    if None in values:
        return None
    return statistics.mean(values) if values else 0.0


def deviation(values: Sequence[float | None]) -> float | None:
    """Returns the sample deviation, 0 of one value; None if a value is missing."""
    if None in values:
        return None
    return statistics.stdev(values) if len(values) > 1 else 0.0


def completion_stats(
    baselines: Sequence[Sequence[bool]], adapters: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Returns the statistics of one self-edit over its runs.

    Args:
      baselines: Verdicts on the un-adapted model's answers, a row for each run.
      adapters: Verdicts on the adapted model's.
    """
    before = [accuracy(row) for row in baselines]
    after = [accuracy(row) for row in adapters]
    gains = [gain(b, a) for b, a in zip(baselines, adapters, strict=True)]
    return {
        "baseline_mean": mean(before),
        "baseline_std": deviation(before),
        "adapter_mean": mean(after),
        "adapter_std": deviation(after),
        "gain_mean": mean(gains),
    }


def article_stats(completions: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the statistics of one passage from those of its self-edits."""
    return {key: _round(value) for key, value in _article(completions).items()}


def overall(articles: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Returns the statistics of a run from those of its self-edits, listed for each passage.

    Passages weigh the same, however many self-edits they have; only the deviation within
    self-edits is a mean over all self-edits. The gain is the difference of the two means: the mean
    of gains, rounded one by one, may differ in the last digit.
    """
    each = [_article(completions) for completions in articles]
    baseline = [stats["baseline_accuracy"] for stats in each]
    adapter = [stats["adapter_mean_accuracy"] for stats in each]
    over = [stats["adapter_std_over_completions"] for stats in each]
    within = [stats.get("adapter_std") for completions in articles for stats in completions]
    values = {
        "baseline_mean_accuracy": mean(baseline),
        "baseline_std_of_article_means": deviation(baseline),
        "adapter_mean_accuracy": mean(adapter),
        "adapter_std_of_article_means": deviation(adapter),
        "mean_adapter_std_over_completions": mean(over),
        "mean_adapter_std_within_completions": mean(within),
        "mean_gain": mean(adapter) - mean(baseline),
    }
    return {key: _round(value) for key, value in values.items()}


def recompute(result: Mapping[str, Any], from_questions: bool = False) -> dict[str, float]:
    """Returns the `overall` block that a result file's records give.

    Args:
      from_questions: Go down to the verdicts; else the self-edits' own statistics are believed.
    """
    articles = []
    for article in result["articles"]:
        stats = [entry["stats"] for entry in article["completions"]]
        if from_questions:
            stats = [stats_of_records(entry["questions"]) for entry in article["completions"]]
        articles.append(stats)
    return overall(articles)


def stats_of_records(questions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns a self-edit's statistics from its question records, grouped by their `rep`."""
    reps = sorted({record["rep"] for record in questions}) or [0]  # of no questions all is 0
    rows = [[r for r in questions if r["rep"] == rep] for rep in reps]
    return completion_stats(
        [[record["baseline_correct"] for record in row] for row in rows],
        [[record["adapter_correct"] for record in row] for row in rows],
    )


def lora_params(lora: config.Lora, inner: config.Inner) -> dict[str, float]:
    """Returns the settings of the inner loop under the reference's names.

    Our batch is the whole of an optimizer step; there is no dropout.
    """
    return {
        "rank": lora.rank,
        "alpha": plain(lora.alpha),
        "dropout": 0,
        "epochs": inner.epochs,
        "lr": inner.learning_rate,
        "batch_size": inner.batch_size,
        "grad_accum_steps": 1,
    }


def result(
    articles: Sequence[Mapping[str, Any]],
    *,
    name: str,
    dataset: str,
    split_newlines: bool,
    k: int,
    seeds: int,
    lora: Mapping[str, float],
    timestamp: str | None = None,
) -> dict[str, Any]:
    """Returns the content of a result file.

    Args:
      articles: As `evals.single_passage.article` makes them.
      k: Self-edits asked for, of each passage.
      seeds: Inner loops of each self-edit.
      lora: As `lora_params` makes it.
      timestamp: Left out if None.
    """
    stats = [[entry["stats"] for entry in article["completions"]] for article in articles]
    return {
        "overall": overall(stats),
        **({} if timestamp is None else {"timestamp": timestamp}),
        "exp_name": name,
        "dataset": dataset,
        "split_newlines": split_newlines,
        "n_articles": len(articles),
        "k_completions": k,
        "eval_times": seeds,
        "lora_params": dict(lora),
        "articles": list(articles),
    }


def read(path: str | Path) -> dict[str, Any]:
    """Returns a result file's content, its records checked as far as we rely on them."""
    content = files.read_json(path)
    articles = files.need(content, "articles", list, str(path))
    files.need(content, "overall", dict, str(path))
    for i, article in enumerate(articles):
        where = f"{path}: article {i}"
        files.need(article, "title", str, where)
        for j, entry in enumerate(files.need(article, "completions", list, where)):
            spot = f"{where}, completion {j}"
            files.need(entry, "text", str, spot)
            stats = files.need(entry, "stats", dict, spot)
            for key in ("baseline_mean", "adapter_mean", "gain_mean"):
                files.need(stats, key, (float, int), spot)
    return content


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a result file in the reference's layout."""
    files.write_json(path, content)


def plain(value: float) -> float | int:
    """Returns a whole number as an int: the reference writes 64, not 64.0."""
    return int(value) if float(value).is_integer() else value


def _article(completions: Sequence[Mapping[str, float]]) -> dict[str, float]:
    adapter = [stats["adapter_mean"] for stats in completions]
    return {
        "baseline_accuracy": mean([stats["baseline_mean"] for stats in completions]),
        "adapter_mean_accuracy": mean(adapter),
        "adapter_std_over_completions": deviation(adapter),
        "mean_adapter_std_within_completions": mean([s.get("adapter_std") for s in completions]),
        "mean_gain": mean([stats["gain_mean"] for stats in completions]),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
