"""A whole run: rounds of ReST-EM, the control, and the table on held-out contexts."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from seal_jax import (
    checkpoint,
    files,
    held_out,
    judge,
    judge_model,
    multihost,
    outer,
    progress,
    runs,
    runtime,
    sharding,
    stats,
)
from seal_jax import table as table_lib
from seal_jax.batching import identity
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.policies import Policies, Saved
from seal_jax.table import Row
from seal_jax.tasks import Context, Task
from seal_jax.tasks.registry import load_task


class Report(NamedTuple):
    """What a run came to: its folder, a summary of each round, and the held-out table."""

    folder: files.AnyPath
    rounds: list[runs.Record]
    table: list[Row]

    def __str__(self) -> str:
        """Returns the table, or the rounds' figures where nothing was held out."""
        if self.table:
            return table_lib.text(self.table)
        lines = []
        for number, summary in enumerate(self.rounds):
            reward, base = (stats.from_record(summary[name]) for name in ("reward", "base"))
            lines.append(
                f"round {number + 1} (round_{number}): base {stats.text(base)}, "
                f"self-edits {stats.text(reward)}, kept {summary['kept']}"
            )
        return "\n".join(lines)

    __repr__ = __str__  # what a notebook shows


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
    judge.check(cfg.task)
    model = checkpoint.find(cfg.model.path, cfg.model.revision)
    checkpoint.read_config(model)
    mesh = sharding.make(cfg.mesh)
    runs.check_trackers(cfg.trackers)
    contexts, base = (*task.contexts, *task.held_out), checkpoint.fingerprint(model)
    with runs.opened(cfg, folder, contexts, base) as path:
        return _rounds(cfg, task, mesh, path)


def _rounds(cfg: Config, task: Task, mesh: Mesh | None, path: files.AnyPath) -> Report:
    """Returns the report of all rounds and the table, in a folder of our own."""
    models = Policies(checkpoint.load_model(cfg.model, mesh=mesh), cfg.outer.adapt)
    metrics = runs.Metrics(path, cfg.trackers, cfg.name)
    summaries, policies = [], {"own self-edits": None}
    policy = control = None
    for number in range(cfg.outer.rounds):
        multihost.check()
        contexts = _contexts(task, number, cfg)
        policy, summary = one_round(models, policy, task, contexts, path, number, cfg, metrics)
        summaries.append(summary)
        policies[f"round {number + 1}"] = policy
        if cfg.outer.control:
            control = one_control_round(models, control, task, contexts, path, number, cfg)
    if cfg.outer.control and cfg.outer.rounds:
        policies["control"] = control
    table = []
    if cfg.evaluation.contexts:
        table = held_out.evaluate(models, policies, task, path, cfg, metrics)
    return Report(path, summaries, table)


def check(cfg: Config, task: Task) -> None:
    """Raises SealError where the task has too few contexts for the settings, or asks nothing."""
    if task.contexts and not any(map(task.questions, task.contexts)):
        raise SealError("task: no context has a question, so no self-edit can be rewarded")
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
    if cfg.evaluation.contexts:
        held_out.check(cfg, task)


def _contexts(task: Task, number: int, cfg: Config) -> list[Context]:
    """Returns the contexts of a round: the next ones in order, from the start again at the end."""
    n = cfg.outer.contexts
    return [task.contexts[i % len(task.contexts)] for i in range(number * n, (number + 1) * n)]


def one_round(
    models: Policies,
    policy: Saved,
    task: Task,
    contexts: Sequence[Context],
    path: files.AnyPath,
    number: int,
    cfg: Config,
    metrics: runs.Metrics,
) -> tuple[Saved, runs.Record]:
    """Returns where the policy is after one round, and the round's summary.

    The policy writes self-edits and is finetuned on the best. They are applied to the policy too,
    or with `outer.adapt: base` to the model before any round.
    """
    home = path / f"round_{number}"
    start = time.monotonic()
    key = outer.key_of(cfg, "write", number)
    edits = outer.write_edits(
        models.load(policy), task, contexts, cfg.sampling.n, home / "edits.jsonl", key, cfg
    )
    wrote = time.monotonic()
    rows = outer.test_edits(
        models.load_adapted(policy),
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
    again: list[outer.Scored] = []
    share = cfg.outer.sft.replay
    if share and kept:
        others = outer.applied(scored, rows, kept)
        rng = np.random.default_rng(identity(cfg.seed, "replay", number))
        again = outer.replay(others, round(len(kept) * share / (1 - share)), rng)
    records = [_kept_record(x) for x in kept] + [_kept_record(x, True) for x in again]
    runs.write_lines(home / "kept.jsonl", records)
    base = outer.base_rewards(models.load_adapted(policy), task, contexts, home / "base.jsonl", cfg)
    key = outer.key_of(cfg, "sft", number)
    trained = outer.train_policy(models.load(policy), kept + again, home / "policy", key, cfg)
    tries = [row.get("tries", 1) for row in runs.records(home / "edits.jsonl")]
    summary = summarise(scored, kept, base, rows)
    summary |= {"replayed": len(again), "written_again": sum(tries) - len(tries)}
    runs.write_json(home / "summary.json", summary)
    if not metrics.has(f"round_{number}"):
        metrics.log(
            stage=f"round_{number}",
            write_s=round(wrote - start, 2),
            test_s=round(tested - wrote, 2),
            finetune_s=round(time.monotonic() - tested, 2),
            reward=summary["reward"]["mean"],
            reward_kept=summary["reward_kept"]["mean"] if kept else 0.0,
        )
    return home / "policy" if trained else policy, summary


def one_control_round(
    models: Policies,
    policy: Saved,
    task: Task,
    contexts: Sequence[Context],
    path: files.AnyPath,
    number: int,
    cfg: Config,
) -> Saved:
    """Returns where the control policy is after one round, on a random self-edit of each context.

    It writes its own self-edits with the keys of the policy, so that the two differ in the choice
    alone.
    """
    home = path / "control" / f"round_{number}"
    key = outer.key_of(cfg, "write", number)
    edits = outer.write_edits(
        models.load(policy), task, contexts, cfg.sampling.n, home / "edits.jsonl", key, cfg
    )
    rng = np.random.default_rng(identity(cfg.seed, "control", number))
    kept = outer.keep_random(outer.gather(task, edits, []), rng)
    runs.write_lines(home / "kept.jsonl", [_kept_record(x) for x in kept])
    key = outer.key_of(cfg, "sft", number)
    trained = outer.train_policy(models.load(policy), kept, home / "policy", key, cfg)
    return home / "policy" if trained else policy


def _kept_record(x: outer.Scored, replayed: bool = False) -> runs.Record:
    """Returns a row of what the policy is finetuned on: kept for its reward, or drawn again."""
    return {
        "context": x.context,
        "index": x.index,
        "reward": x.reward if x.rewards else None,
        "replayed": replayed,
        "prompt": x.prompt,
        "completion": x.text,
    }


def summarise(
    scored: Sequence[outer.Scored],
    kept: Sequence[outer.Scored],
    base: Sequence[float],
    rows: Sequence[runs.Record],
) -> runs.Record:
    """Returns a round's figures; standard errors are over contexts.

    Those that could not be applied, and those that diverged, are counted as self-edits, in however
    many inner loops.
    """
    by_context, of_kept = _by_context(scored), _by_context(kept)
    # Figures in a reason (a step, a line, a count) would make every one its own.
    failed = {
        (row["context"], row["index"]): re.sub(r"\d+", "N", row["error"])
        for row in rows
        if row["error"] and not row["steps"]
    }
    diverged = {(row["context"], row["index"]) for row in rows if row["error"] and row["steps"]}
    return {
        "contexts": len(by_context),
        "self_edits": len(scored),
        "base": stats.mean_se(base).record(),
        "reward": stats.mean_se(map(stats.mean, by_context.values())).record(),
        "reward_best": stats.mean_se(max(own) for own in by_context.values()).record(),
        "reward_kept": stats.mean_se(map(stats.mean, of_kept.values())).record() if kept else None,
        "kept": len(kept),
        "not_applied": dict(sorted(Counter(failed.values()).items())),
        "diverged": len(diverged),
    }


def _by_context(scored: Sequence[outer.Scored]) -> dict[str, list[float]]:
    """Returns the rewards of each context's self-edits."""
    found: dict[str, list[float]] = {}
    for one in scored:
        found.setdefault(one.context, []).append(one.reward)
    return found


def print_report(report: Report) -> None:
    """Prints the report; of several processes the first one."""
    if multihost.leads():
        if text := str(report):  # of no round and nothing held out there is none
            print(text)
        progress.say(f"records: {report.folder}")
