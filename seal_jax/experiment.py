"""A whole run: rounds of ReST-EM, the control, and the table on held-out contexts."""

import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seal_jax import (
    checkpoint,
    judge_model,
    multihost,
    outer,
    progress,
    readers,
    rewards,
    runs,
    runtime,
    sharding,
    stats,
)
from seal_jax import table as table_lib
from seal_jax.batching import SelfEdit, identity
from seal_jax.checkpoint import LM
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.stats import Estimate
from seal_jax.table import Row
from seal_jax.tasks import Context, Task
from seal_jax.tasks.registry import load_task


class Report(NamedTuple):
    """What a run came to: its folder, a summary of each round, and the held-out table."""

    folder: Path
    rounds: list[runs.Record]
    table: list[Row]

    def __str__(self) -> str:
        return table_lib.text(self.table)


def run(cfg: Config, folder: str | Path | None = None) -> Report:
    """Returns the report of a run, new or gone on with.

    Args:
      folder: By default `runs/NAME`.

    Raises:
      SealError: for settings that do not fit, before anything is computed.
    """
    runtime.set_flags(cfg.compiler)
    with multihost.together(cfg.distributed):
        return _run(cfg, folder)


def _run(cfg: Config, folder: str | Path | None) -> Report:
    task = load_task(cfg.task, judge_model.replies_of(cfg))
    check(cfg, task)
    checkpoint.read_config(checkpoint.find(cfg.model.path, cfg.model.revision))
    mesh = sharding.make(cfg.mesh)
    path = runs.open_run(cfg, folder)
    lm = checkpoint.load_model(cfg.model, mesh=mesh)
    metrics = runs.Metrics(path, cfg.trackers, cfg.name)
    summaries, policies = [], {"own self-edits": lm}
    policy = control = lm
    for number in range(cfg.outer.rounds):
        multihost.check()
        contexts = _contexts(task, number, cfg)
        adapted = lm if cfg.outer.adapt == "base" else policy
        policy, summary = one_round(policy, adapted, task, contexts, path, number, cfg, metrics)
        summaries.append(summary)
        policies[f"round {number + 1}"] = policy
        if cfg.outer.control:
            control = one_control_round(control, task, contexts, path, number, cfg)
    if cfg.outer.control and cfg.outer.rounds:
        policies["control"] = control
    table = evaluate(lm, policies, task, path, cfg, metrics) if cfg.evaluation.contexts else []
    return Report(path, summaries, table)


def check(cfg: Config, task: Task) -> None:
    """Raises SealError where the task has too few contexts for the settings."""
    need = cfg.outer.rounds * cfg.outer.contexts
    if need and len(task.contexts) < cfg.outer.contexts:
        raise SealError(
            f"outer.contexts={cfg.outer.contexts}: the task has {len(task.contexts)} training "
            "contexts (task.size bounds them)"
        )
    if need > len(task.contexts):
        progress.say(
            f"{cfg.outer.rounds} rounds of {cfg.outer.contexts} contexts need {need}, the task has "
            f"{len(task.contexts)}: later rounds see some again"
        )
    if cfg.evaluation.contexts > len(task.held_out):
        raise SealError(
            f"evaluation.contexts={cfg.evaluation.contexts}: the task has {len(task.held_out)} "
            "held-out contexts (task.held_out, task.size)"
        )
    for name in cfg.evaluation.references or ():
        if name not in task.references:
            known = ", ".join(task.references) or "none"
            raise SealError(f"evaluation.references: {name!r} is unknown; the task has {known}")


def _contexts(task: Task, number: int, cfg: Config) -> list[Context]:
    """Returns the contexts of a round: the next ones in order, from the start again at the end."""
    n = cfg.outer.contexts
    return [task.contexts[i % len(task.contexts)] for i in range(number * n, (number + 1) * n)]


def one_round(
    lm: LM,
    adapted: LM,
    task: Task,
    contexts: Sequence[Context],
    path: Path,
    number: int,
    cfg: Config,
    metrics: runs.Metrics,
) -> tuple[LM, runs.Record]:
    """Returns the policy after one round, and the round's summary.

    Args:
      lm: The policy: it writes self-edits and is finetuned on the best.
      adapted: The model that self-edits are applied to.
    """
    home = path / f"round_{number}"
    start = time.monotonic()
    key = outer.key_of(cfg, "write", number)
    edits = outer.write_edits(lm, task, contexts, cfg.sampling.n, home / "edits.jsonl", key, cfg)
    wrote = time.monotonic()
    rows = outer.test_edits(
        adapted,
        task,
        edits,
        cfg.outer.seeds,
        home / "rewards.jsonl",
        outer.key_of(cfg, "inner", number),
        cfg,
        metrics,
    )
    tested = time.monotonic()
    scored = outer.gather(task, edits, rows)
    kept = outer.keep_best(scored, cfg.outer.keep, cfg.outer.min_reward)
    share = cfg.outer.sft.replay
    if share and kept:
        others = outer.applied(scored, rows, kept)
        rng = np.random.default_rng(identity(cfg.seed, "replay", number))
        kept = kept + outer.replay(others, round(len(kept) * share / (1 - share)), rng)
    runs.write_lines(home / "kept.jsonl", [_kept_record(x) for x in kept])
    base = base_rewards(adapted, task, contexts, home / "base.jsonl", cfg)
    after = outer.train_policy(lm, kept, home / "policy", outer.key_of(cfg, "sft", number), cfg)
    summary = summarise(scored, kept, base, rows)
    runs.write_json(home / "summary.json", summary)
    metrics.log(
        stage=f"round_{number}",
        write_s=round(wrote - start, 2),
        test_s=round(tested - wrote, 2),
        finetune_s=round(time.monotonic() - tested, 2),
        reward=summary["reward"]["mean"],
        reward_kept=summary["reward_kept"]["mean"] if kept else 0.0,
    )
    return after, summary


def one_control_round(
    lm: LM, task: Task, contexts: Sequence[Context], path: Path, number: int, cfg: Config
) -> LM:
    """Returns the control policy after one round: finetuned on a random self-edit of each context.

    It writes its own self-edits with the keys of the policy, so that the two differ in the choice
    alone.
    """
    home = path / "control" / f"round_{number}"
    key = outer.key_of(cfg, "write", number)
    edits = outer.write_edits(lm, task, contexts, cfg.sampling.n, home / "edits.jsonl", key, cfg)
    rng = np.random.default_rng(identity(cfg.seed, "control", number))
    kept = outer.keep_random(outer.gather(task, edits, []), rng)
    runs.write_lines(home / "kept.jsonl", [_kept_record(x) for x in kept])
    return outer.train_policy(lm, kept, home / "policy", outer.key_of(cfg, "sft", number), cfg)


def _kept_record(x: outer.Scored) -> runs.Record:
    reward = x.reward if x.rewards else None
    return {
        "context": x.context,
        "index": x.index,
        "reward": reward,
        "prompt": x.prompt,
        "completion": x.text,
    }


def base_rewards(
    lm: LM, task: Task, contexts: Sequence[Context], file: Path, cfg: Config
) -> list[float]:
    """Returns the un-adapted model's reward on each context: once per policy, kept on file."""
    found = {row["context"]: row["reward"] for row in runs.records(file)}
    if any(context.id not in found for context in contexts):
        scores = rewards.score(readers.ready(lm, cfg.mesh), None, task, contexts, cfg)
        rows = [
            {"context": context.id, "reward": float(reward), "answers": answers}
            for context, reward, answers in zip(
                contexts, scores.reward, scores.answers, strict=True
            )
        ]
        runs.write_lines(file, rows)
        found = {row["context"]: row["reward"] for row in runs.records(file)}
    return [found[context.id] for context in contexts]


def summarise(
    scored: Sequence[outer.Scored],
    kept: Sequence[outer.Scored],
    base: Sequence[float],
    rows: Sequence[runs.Record],
) -> runs.Record:
    """Returns a round's figures; standard errors are over contexts."""
    by_context: dict[str, list[float]] = {}
    for one in scored:
        by_context.setdefault(one.context, []).append(one.reward)
    means = [stats.mean(own) for own in by_context.values()]
    # Figures in a reason (a step, a line, a count) would make every one its own.
    errors = Counter(re.sub(r"\d+", "N", row["error"]) for row in rows if row["error"])
    return {
        "contexts": len(by_context),
        "self_edits": len(scored),
        "base": stats.mean_se(base)._asdict(),
        "reward": stats.mean_se(means)._asdict(),
        "reward_best": stats.mean_se(max(own) for own in by_context.values())._asdict(),
        "reward_kept": stats.mean_se(x.reward for x in kept)._asdict() if kept else None,
        "kept": len(kept),
        "not_applied": dict(sorted(errors.items())),
    }


def evaluate(
    lm: LM, policies: dict[str, LM], task: Task, path: Path, cfg: Config, metrics: runs.Metrics
) -> list[Row]:
    """Returns the table: the bare model, reference self-edits, and each policy's own self-edits.

    Reference self-edits (the passage alone, an oracle's) adapt the model before any round. A
    policy's self-edits adapt the policy itself, or with `outer.adapt: base` that model too.
    """
    contexts = list(task.held_out[: cfg.evaluation.contexts])
    home = path / "eval"
    bare = base_rewards(lm, task, contexts, home / "base.jsonl", cfg)
    rows = [Row("base", tuple(bare), len(bare))]
    for name in _references(cfg, task):
        texts = [(context, task.references[name](context)) for context in contexts]
        edits = [
            SelfEdit(context, i, text)
            for context, made in texts
            for i, text in enumerate([made] if isinstance(made, str) else made)
        ]
        rows.append(_row(name, lm, task, edits, home, cfg, metrics))
    for name, policy in policies.items():
        file = home / f"{_slug(name)}.edits.jsonl"
        key = outer.key_of(cfg, "write", "held-out")
        edits = outer.write_edits(policy, task, contexts, cfg.evaluation.n, file, key, cfg)
        adapted = lm if cfg.outer.adapt == "base" else policy
        rows.append(_row(name, adapted, task, edits, home, cfg, metrics))
    last = [row for row in rows if row.name == "oracle"]
    rows = [row for row in rows if row.name != "oracle"] + last
    runs.write_json(
        home / "table.json",
        {
            row.name: {**row.estimate._asdict(), "trials": row.trials, "rewards": row.rewards}
            for row in rows
        },
    )
    return rows


def _references(cfg: Config, task: Task) -> list[str]:
    """Returns the names of the reference self-edits to evaluate."""
    wanted = cfg.evaluation.references
    return [name for name in task.references if wanted is None or name in wanted]


def _slug(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")


def _row(name, lm, task, edits, home: Path, cfg: Config, metrics) -> Row:
    """Returns a condition's mean reward on each context, over its self-edits and seeds."""
    key = outer.key_of(cfg, "inner", "held-out")
    file = home / f"{_slug(name)}.jsonl"
    rows = outer.test_edits(lm, task, edits, cfg.evaluation.seeds, file, key, cfg, metrics)
    by_context: dict[str, dict[int, list[float]]] = {edit.context.id: {} for edit in edits}
    for row in rows:
        by_context[row["context"]].setdefault(row["index"], []).append(row["reward"])
    # Of several tries an oracle knows the best.
    over = max if name == "oracle" else stats.mean
    each = [[stats.mean(seeds) for seeds in own.values()] for own in by_context.values()]
    return Row(name, tuple(over(own) for own in each), len(rows))


def print_report(report: Report) -> None:
    """Prints the table, or the rounds' figures where nothing was held out; process 0 alone."""
    if not multihost.leads():
        return
    if report.table:
        print(table_lib.text(report.table))
    else:
        for number, summary in enumerate(report.rounds):
            reward, base = (Estimate(**summary[name]) for name in ("reward", "base"))
            print(
                f"round {number}: base {stats.text(base)}, "
                f"self-edits {stats.text(reward)}, kept {summary['kept']}"
            )
    print(f"records: {report.folder}", file=sys.stderr)
