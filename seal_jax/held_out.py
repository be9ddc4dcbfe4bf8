"""The table on held-out contexts: each condition's mean reward, asked without the context."""

from collections.abc import Sequence

from seal_jax import files, outer, runs, stats, table
from seal_jax.batching import SelfEdit
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.policies import Policies, Saved
from seal_jax.table import Row
from seal_jax.tasks import Context, Task


def evaluate(
    models: Policies,
    policies: dict[str, Saved],
    task: Task,
    path: files.AnyPath,
    cfg: Config,
    metrics: runs.Metrics,
) -> list[Row]:
    """Returns the table: the bare model, reference self-edits, and each policy's own self-edits.

    Reference self-edits (the passage alone, an oracle's) adapt the model before any round. A
    policy's self-edits adapt the policy itself, or with `outer.adapt: base` that model too.
    """
    contexts = list(task.held_out[: cfg.evaluation.contexts])
    home = path / "eval"
    bare = outer.base_rewards(models.load(None), task, contexts, home / "base.jsonl", cfg)
    rows = [Row("base", tuple(bare), len(bare))]
    for name in _references(cfg, task):
        edits = reference_edits(task, name, contexts)
        rows.append(_row(name, models.load(None), task, edits, home, cfg, metrics))
    for name, policy in policies.items():
        file = home / f"{_slug(name)}.edits.jsonl"
        key = outer.key_of(cfg, "write", "held-out")
        edits = outer.write_edits(
            models.load(policy), task, contexts, cfg.evaluation.n, file, key, cfg
        )
        rows.append(_row(name, models.load_adapted(policy), task, edits, home, cfg, metrics))
    last = [row for row in rows if row.name == "oracle"]
    rows = [row for row in rows if row.name != "oracle"] + last
    if not metrics.has("eval/table"):
        means = {f"eval/{_slug(row.name)}": row.estimate.mean for row in rows}
        metrics.log(stage="eval/table", **means)
    runs.write_json(home / "table.json", _records(rows, contexts))
    return rows


def _records(rows: Sequence[Row], contexts: Sequence[Context]) -> dict[str, runs.Record]:
    """Returns the table as JSON has it: rewards with their contexts, differences in pairs."""
    names = [context.id for context in contexts]
    return {
        row.name: {
            **row.estimate.record(),
            "trials": row.trials,
            "last_minus": difference.record() if difference else None,
            "contexts": names,
            "rewards": row.rewards,
        }
        for row, difference in zip(rows, table.differences(rows), strict=True)
    }


def reference_edits(task: Task, name: str, contexts: Sequence[Context]) -> list[SelfEdit]:
    """Returns the task's reference self-edits of this name, one or several for each context.

    Raises:
      SealError: names a context for which there is none.
    """
    edits = []
    for context in contexts:
        made = task.references[name](context)
        texts = [made] if isinstance(made, str) else list(made)
        if not texts:
            raise SealError(f"references: {name!r} gives no self-edit for {context.id!r}")
        edits += [SelfEdit(context, i, text) for i, text in enumerate(texts)]
    return edits


def check(cfg: Config, task: Task) -> None:
    """Raises SealError where a row of the table would have the name, or the file, of another."""
    taken = {"base", "own_self_edits", "control"}
    taken |= {f"round_{number + 1}" for number in range(cfg.outer.rounds)}
    for name in _references(cfg, task):
        if (slug := _slug(name)) in taken:
            raise SealError(f"references: {name!r} is the name of another row of the table")
        taken.add(slug)


def _references(cfg: Config, task: Task) -> list[str]:
    """Returns the names of the reference self-edits to evaluate."""
    wanted = cfg.evaluation.references
    return [name for name in task.references if wanted is None or name in wanted]


def _slug(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")


def _row(name, lm, task, edits, home: files.AnyPath, cfg: Config, metrics) -> Row:
    """Returns a condition's mean reward on each context, over its self-edits and seeds."""
    key = outer.key_of(cfg, "inner", "held-out")
    file = home / f"{_slug(name)}.jsonl"
    rows = outer.test_edits(lm, task, edits, cfg.evaluation.seeds, file, key, cfg, metrics)
    return Row(name, mean_rewards(name, edits, rows), len(rows))


def mean_rewards(
    name: str, edits: Sequence[SelfEdit], rows: Sequence[runs.Record]
) -> tuple[float, ...]:
    """Returns the reward on each context over its self-edits and their seeds.

    It is the mean, but of several tries the best if they are an `oracle`'s, which knows it.
    """
    by_context: dict[str, dict[int, list[float]]] = {edit.context.id: {} for edit in edits}
    for row in rows:
        by_context[row["context"]].setdefault(row["index"], []).append(row["reward"])
    over = max if name == "oracle" else stats.mean
    each = [[stats.mean(seeds) for seeds in own.values()] for own in by_context.values()]
    return tuple(over(own) for own in each)
