"""The paper's three settings on any model or policy, with records in a run folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seal_jax import (
    checkpoint,
    files,
    judge,
    judge_model,
    multihost,
    params,
    policies,
    progress,
    runs,
    runtime,
    sharding,
    state,
    stats,
)
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.evals import inner_loop
from seal_jax.evals.settings import SETTINGS
from seal_jax.evals.subject import Subject
from seal_jax.stats import Estimate
from seal_jax.table import Row
from seal_jax.tasks import Context, Task
from seal_jax.tasks.registry import load_task


class Study(NamedTuple):
    """What an evaluation came to: its folder, and rewards, the un-edited model's first.

    `unit` is what the rewards are of, and what standard errors are over.
    """

    folder: files.AnyPath
    rows: tuple[Row, ...]
    unit: str

    @property
    def gains(self) -> list[Estimate]:
        """Each row minus the first, paired."""
        return [stats.paired(row.rewards, self.rows[0].rewards) for row in self.rows]

    def record(self) -> runs.Record:
        """Returns it as JSON can hold it."""
        record = {"unit": self.unit, "n": len(self.rows[0].rewards)}
        for row, gain in zip(self.rows, self.gains, strict=True):
            own = {"trials": row.trials, "gain": gain.record(), "rewards": row.rewards}
            record[row.name] = {**row.estimate.record(), **own}
        return record

    def __str__(self) -> str:
        first = self.rows[0].name
        lines = [f"{'condition':<22} {'accuracy (s.e.)':<18} {'trials':>6}  minus {first}"]
        for i, (row, gain) in enumerate(zip(self.rows, self.gains, strict=True)):
            change = stats.text(gain) if i else ""
            text = stats.text(row.estimate)
            lines.append(f"{row.name:<22} {text:<18} {row.trials:>6}  {change}".rstrip())
        n = len(self.rows[0].rewards)
        return "\n".join([*lines, f"{n} {self.unit}; standard errors over {self.unit}."])

    __repr__ = __str__  # what a notebook shows


def run(cfg: Config, setting: str, folder: str | Path | None = None) -> Study:
    """Returns an evaluation, new or gone on with.

    Beside its records it leaves `eval/SETTING/result.json` as the reference writes it (for tasks of
    passages) and `summary.json` with standard errors.

    Args:
      setting: single, cpt or continual.
      folder: Of the run; by default `runs/NAME-SETTING`.

    Raises:
      SealError: for settings that do not fit, before any model is loaded.
    """
    if setting not in SETTINGS:
        raise SealError(f"eval: {setting!r} is unknown: expected one of {', '.join(SETTINGS)}")
    runtime.set_flags(cfg.compiler)
    with multihost.together(cfg.distributed):
        return _run(cfg, setting, folder or Path("runs") / f"{cfg.name}-{setting}")


def _run(cfg: Config, setting: str, folder: str | Path) -> Study:
    task = load_task(cfg.task, judge_model.replies_of(cfg))
    contexts = _contexts(task, cfg)
    _check(task, contexts, setting, cfg)
    judge.check(cfg.task)
    policy = _policy(cfg)
    mesh = sharding.make(cfg.mesh)
    runs.check_trackers(cfg.trackers)
    every = (*task.contexts, *task.held_out)
    base = checkpoint.fingerprint(checkpoint.find(cfg.model.path, cfg.model.revision))
    with runs.opened(cfg, folder, every, base) as path:
        home = path / "eval" / setting
        _check_policy(policy, home)
        models = policies.Policies(checkpoint.load_model(cfg.model, mesh=mesh), cfg.outer.adapt)
        metrics = runs.Metrics(path, cfg.trackers, cfg.name)
        found = SETTINGS[setting](Subject(models, policy, task, contexts, home, metrics), cfg)
        study = Study(path, *found)
        if not metrics.has(f"{setting}/summary"):
            means = {f"{setting}/{row.name}": row.estimate.mean for row in study.rows}
            metrics.log(stage=f"{setting}/summary", **means)
        runs.write_json(home / "summary.json", study.record())
    return study


def _contexts(task: Task, cfg: Config) -> list[Context]:
    """Returns the held-out contexts; all, where none are held out."""
    found = list(task.held_out or task.contexts)
    wanted = cfg.evaluation.contexts
    if wanted > len(found) or not found:
        raise SealError(
            f"evaluation.contexts={wanted}: the task has {len(found)} (task.path, task.held_out, "
            "task.size)"
        )
    return found[: wanted or None]


def _check(task: Task, contexts: Sequence[Context], setting: str, cfg: Config) -> None:
    """Raises SealError where the settings do not fit the task."""
    settings = cfg.evaluation
    kinds = ("own", "file", *task.references)
    if settings.self_edits not in kinds:
        raise SealError(
            f"evaluation.self_edits={settings.self_edits!r}: expected one of {', '.join(kinds)}"
        )
    if settings.self_edits == "file" and not inner_loop.has_candidates(contexts):
        raise SealError("evaluation.self_edits=file: none came with the contexts (`completions`)")
    unused = setting == "continual" or settings.self_edits != "own"  # in what is tested
    if settings.policy and cfg.outer.adapt == "base" and unused:
        raise SealError(
            f"evaluation.policy: with outer.adapt=base eval {setting} of {settings.self_edits} "
            "self-edits makes no use of it; set outer.adapt=policy"
        )
    if setting == "single":
        return
    if not any(context.questions for context in contexts):
        raise SealError(f"eval {setting}: needs passages with questions; see task.name, task.path")
    if cfg.inner.pad_loss or cfg.inner.max_steps:
        raise SealError(f"inner.pad_loss, inner.max_steps: eval {setting} has neither")
    if setting == "continual" and settings.continual.length > len(contexts):
        raise SealError(
            f"evaluation.continual.length={settings.continual.length}: there are {len(contexts)} "
            "passages"
        )


def _policy(cfg: Config) -> policies.Saved:
    """Returns the folder of the policy, which fits the model; a round's folder holds one."""
    config = checkpoint.read_config(checkpoint.find(cfg.model.path, cfg.model.revision))
    if cfg.evaluation.policy is None:
        return None
    folder = files.path(cfg.evaluation.policy)
    folder = folder / "policy" if files.exists(folder / "policy") else folder
    if not files.exists(folder):
        raise SealError(f"evaluation.policy: {folder}: no such folder")
    if files.exists(folder / "config.json"):
        raise SealError(f"evaluation.policy: {folder}: a model folder; name it as model.path")
    if files.exists(folder / "config.yaml"):
        raise SealError(f"evaluation.policy: {folder}: a run; name a round of it, as round_0")
    state.check_tree(folder, params.shapes(config))
    return folder


def _check_policy(policy: policies.Saved, home: files.AnyPath) -> None:
    """Raises SealError where an evaluation that goes on began with what another policy was then."""
    if policy is None:
        return
    file, now = home / "policy_sums.json", json.dumps(state.sums(policy), indent=2).encode()
    before = files.read(file)
    if before is None:
        files.write(file, now)
    elif before != now:
        raise SealError(
            f"{home}: began with another policy: {policy} (evaluation.policy) has changed"
        )


def print_study(study: Study) -> None:
    """Prints the table; of several processes the first one."""
    if multihost.leads():
        print(study)
        progress.say(f"records: {study.folder}")
