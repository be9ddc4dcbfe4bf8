"""The paper's three settings on any model or policy, with records in a run folder."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from seal_jax import (
    checkpoint,
    files,
    held_out,
    judge_model,
    multihost,
    outer,
    policies,
    progress,
    readers,
    runs,
    runtime,
    sharding,
    state,
    stats,
)
from seal_jax.batching import SelfEdit, identity
from seal_jax.checkpoint import LM
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.evals import continual, cpt, engine, inner_loop, single_passage
from seal_jax.evals.inner_loop import Reply, Request
from seal_jax.formats import continual as continual_file
from seal_jax.formats import cpt as cpt_file
from seal_jax.formats import results
from seal_jax.stats import Estimate
from seal_jax.table import Row
from seal_jax.tasks import Context, Task
from seal_jax.tasks.registry import load_task


class Study(NamedTuple):
    """What an evaluation came to: its folder, and rewards, the un-edited model's first.

    `unit` is what the rewards are of, and what standard errors are over.
    """

    folder: Path
    rows: tuple[Row, ...]
    unit: str

    @property
    def gains(self) -> list[Estimate]:
        """Each row minus the first, paired."""
        return [stats.paired(row.rewards, self.rows[0].rewards) for row in self.rows]

    def __str__(self) -> str:
        lines = [f"{'condition':<22} {'accuracy (s.e.)':<18} {'trials':>6}  minus {self.first}"]
        for i, (row, gain) in enumerate(zip(self.rows, self.gains, strict=True)):
            change = stats.text(gain) if i else ""
            text = stats.text(row.estimate)
            lines.append(f"{row.name:<22} {text:<18} {row.trials:>6}  {change}".rstrip())
        n = len(self.rows[0].rewards)
        return "\n".join([*lines, f"{n} {self.unit}; standard errors over {self.unit}."])

    @property
    def first(self) -> str:
        return self.rows[0].name


class _Subject(NamedTuple):
    """What is evaluated: the models, which of them, on what, and where the records go."""

    models: policies.Policies
    policy: policies.Saved
    task: Task
    contexts: list[Context]
    home: Path
    metrics: runs.Metrics

    def load(self, cfg: Config) -> LM:
        """Returns the model that is edited."""
        return readers.ready(self.models.load_adapted(self.policy), cfg.mesh)


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
    checkpoint.read_config(checkpoint.find(cfg.model.path, cfg.model.revision))
    policy = None if cfg.evaluation.policy is None else files.path(cfg.evaluation.policy)
    if policy is not None and not files.exists(policy):
        raise SealError(f"evaluation.policy: {policy}: no such folder")
    mesh = sharding.make(cfg.mesh)
    runs.check_trackers(cfg.trackers)
    path = runs.open_run(cfg, folder)
    with runs.alone(path):
        models = policies.Policies(checkpoint.load_model(cfg.model, mesh=mesh), cfg.outer.adapt)
        metrics = runs.Metrics(path, cfg.trackers, cfg.name)
        home = path / "eval" / setting
        study = SETTINGS[setting](_Subject(models, policy, task, contexts, home, metrics), cfg)
        record = {"unit": study.unit, "n": len(study.rows[0].rewards)}
        for row, gain in zip(study.rows, study.gains, strict=True):
            own = {"trials": row.trials, "gain": gain.record(), "rewards": row.rewards}
            record[row.name] = {**row.estimate.record(), **own}
        runs.write_json(home / "summary.json", record)
    return study._replace(folder=path)


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
    if setting == "single":
        return
    if not all(context.questions for context in contexts):
        raise SealError(f"eval {setting}: needs passages with questions; see task.name, task.path")
    if cfg.inner.pad_loss:
        raise SealError(f"inner.pad_loss=true: eval {setting} does not train on padding")
    if setting == "continual" and settings.continual.length > len(contexts):
        raise SealError(
            f"evaluation.continual.length={settings.continual.length}: there are {len(contexts)} "
            "passages"
        )


def _self_edits(subject: _Subject, n: int, cfg: Config) -> list[SelfEdit]:
    """Returns the self-edits to apply, up to n of each context, contexts in order."""
    task, contexts, kind = subject.task, subject.contexts, cfg.evaluation.self_edits
    if kind == "own":
        lm, key = subject.models.load(subject.policy), outer.key_of(cfg, "write", "held-out")
        file = subject.home / "edits.jsonl"
        return outer.write_edits(lm, task, contexts, n, file, key, cfg)
    if kind != "file":
        return held_out.reference_edits(task, kind, contexts)
    return [
        SelfEdit(context, i, text)
        for context in contexts
        for i, text in enumerate(inner_loop.candidates(context, n))
    ]


def _by_context(edits: Sequence[SelfEdit], contexts: Sequence[Context]) -> list[list[str]]:
    own: dict[str, list[str]] = {context.id: [] for context in contexts}
    for one in edits:
        own[one.context.id].append(one.text)
    return [own[context.id] for context in contexts]


def _write_result(subject: _Subject, content: dict) -> None:
    """Writes a result file in the reference's layout."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    runs.write_text(subject.home / "result.json", text)


def _single(subject: _Subject, cfg: Config) -> Study:
    """Returns the accuracy on each context after an inner loop of its own (n = 1)."""
    task, contexts, home, seeds = subject.task, subject.contexts, subject.home, cfg.evaluation.seeds
    lm = subject.models.load_adapted(subject.policy)
    bare = outer.base_rewards(lm, task, contexts, home / "base.jsonl", cfg)
    edits = _self_edits(subject, cfg.evaluation.n, cfg)
    lm, key = subject.models.load_adapted(subject.policy), outer.key_of(cfg, "inner", "held-out")
    file = home / "rewards.jsonl"
    rows = outer.test_edits(lm, task, edits, seeds, file, key, cfg, subject.metrics)
    if all(context.questions for context in contexts):
        _write_single(subject, edits, rows, cfg)
    name = f"{cfg.evaluation.self_edits} self-edits"
    by_context: dict[str, dict[int, list[float]]] = {context.id: {} for context in contexts}
    for row in rows:
        by_context[row["context"]].setdefault(row["index"], []).append(row["reward"])
    each = [stats.mean(stats.mean(own) for own in x.values()) for x in by_context.values()]
    made = (Row("no self-edit", tuple(bare), len(bare)), Row(name, tuple(each), len(rows)))
    return Study(home, made, "contexts")


def _write_single(subject: _Subject, edits, rows: Sequence[runs.Record], cfg: Config) -> None:
    """Writes the result file of single passages."""
    bare = {row["context"]: row for row in runs.records(subject.home / "base.jsonl")}
    found = {(row["context"], row["index"], row["seed"]): row for row in rows}
    own = _by_context(edits, subject.contexts)
    articles = []
    for context, texts in zip(subject.contexts, own, strict=True):
        replies = [
            _reply(bare[context.id], found[context.id, index, seed])
            for index in range(len(texts))
            for seed in range(cfg.evaluation.seeds)
        ]
        prompt = subject.task.prompt(context)
        articles.append(single_passage.article(context, texts, replies, prompt))
    content = results.result(
        articles,
        name=cfg.name,
        dataset=cfg.task.held_out or cfg.task.path or cfg.task.name,
        split_newlines=cfg.task.split_newlines,
        k=max(len(texts) for texts in own),
        seeds=cfg.evaluation.seeds,
        lora=results.lora_params(cfg.lora, cfg.inner),
    )
    _write_result(subject, content)


def _reply(before: runs.Record, after: runs.Record) -> Reply:
    right = [tuple(bool(v) for v in row["verdicts"]) for row in (before, after)]
    return Reply(tuple(before["answers"]), tuple(after["answers"]), *right)


def _cpt(subject: _Subject, cfg: Config) -> Study:
    """Returns the accuracy on each context after one training on the self-edits of all."""
    task, contexts = subject.task, subject.contexts
    own = _by_context(_self_edits(subject, cfg.evaluation.n, cfg), contexts)
    request = cpt.request(task, contexts, own, cfg.evaluation.cpt.questions)
    prompts = [item.question.prompt for item in request.asked]
    lm = subject.load(cfg)
    before = engine.answer(lm, prompts, cfg)
    saved = subject.home / "policy"
    if files.exists(saved):
        trained = lm._replace(params=state.load_tree(saved, lm.params), reader=None)
    else:
        progress.say(f"continued pretraining: {len(request.texts)} texts")
        trained = engine.pretrain(lm, request.texts, outer.key_of(cfg, "cpt"), cfg)
        state.save_tree(saved, trained.params)
    after = engine.answer(readers.ready(trained, cfg.mesh), prompts, cfg)
    right = [engine.verdicts(task, request.asked, answers, cfg) for answers in (before, after)]
    reply = Reply(tuple(before), tuple(after), *right)
    content = cpt_file.result(
        request,
        reply,
        dataset=cfg.task.held_out or cfg.task.path or cfg.task.name,
        n_articles=len(contexts),
        k=max(len(texts) for texts in own),
        split_newlines=cfg.task.split_newlines,
        lora=results.lora_params(cfg.lora, cfg.inner),
    )
    _write_result(subject, content)
    each = [_shares(request, verdicts) for verdicts in right]
    name = f"{cfg.evaluation.self_edits} self-edits"
    rows = (Row("before training", each[0], len(prompts)), Row(name, each[1], len(prompts)))
    return Study(subject.home, rows, "contexts")


def _shares(request: Request, right: Sequence[bool]) -> tuple[float, ...]:
    """Returns the share of right answers of each context that was asked about."""
    groups: dict[str, list[bool]] = {}
    for item, verdict in zip(request.asked, right, strict=True):
        groups.setdefault(item.context.id, []).append(verdict)
    return tuple(stats.mean(own) for own in groups.values())


def _continual(subject: _Subject, cfg: Config) -> Study:
    """Returns the accuracy of each sequence: before, right after each edit, and at the end."""
    settings, task = cfg.evaluation.continual, subject.task
    rng = random.Random(identity(cfg.seed, "continual"))
    chosen = [rng.sample(subject.contexts, settings.length) for _ in range(settings.sequences)]
    file = subject.home / "sequences.jsonl"
    done = {row["sequence"] for row in runs.records(file)}
    texts = {}
    if cfg.evaluation.self_edits != "own":
        given = _by_context(_self_edits(subject, 1, cfg), subject.contexts)
        prompts = [task.prompt(context) for context in subject.contexts]
        texts = {prompt: own[0] for prompt, own in zip(prompts, given, strict=True)}
    with progress.track("continual self-edits", settings.sequences) as advance:
        for number, sequence in enumerate(chosen):
            if number not in done:
                base = subject.load(cfg)
                own = _sequence_engine(task, number, texts, cfg)
                (outcome,) = continual.run(task, [sequence], own, base)
                record = {
                    "sequence": number,
                    "contexts": [context.id for context in sequence],
                    "self_edits": list(outcome.self_edits),
                    "matrix": outcome.matrix,
                }
                runs.append(file, [record])
                multihost.check()
            advance(1)
    matrices = [row["matrix"] for row in sorted(runs.records(file), key=lambda x: x["sequence"])]
    dataset = cfg.task.held_out or cfg.task.path or cfg.task.name
    _write_result(subject, continual_file.summary(matrices, dataset, cfg.model.path))
    mean = lambda cells: stats.mean(cells)
    n = settings.length
    rows = (
        Row("before", tuple(mean(m[0]) for m in matrices), n * len(matrices)),
        Row(
            "right after its edit",
            tuple(mean(m[i + 1][i] for i in range(n)) for m in matrices),
            n * len(matrices),
        ),
        Row("all, at the end", tuple(mean(m[n]) for m in matrices), n * len(matrices)),
    )
    return Study(subject.home, rows, "sequences")


def _sequence_engine(
    task: Task, number: int, texts: dict[str, str], cfg: Config
) -> continual.Engine:
    """Returns what the edits of one sequence need; self-edits come from `texts` where given."""
    wkey = outer.key_of(cfg, "write", "continual", number)
    ikey = outer.key_of(cfg, "inner", "continual", number)

    def write(models: Sequence[LM], prompts: Sequence[str]) -> list[str]:
        if texts:
            return [texts[prompt] for prompt in prompts]
        return [engine.write(lm, [p], wkey, cfg)[0] for lm, p in zip(models, prompts, strict=True)]

    def answer(models: Sequence[LM], requests: Sequence[Request]):
        made = []
        for lm, request in zip(models, requests, strict=True):
            replies = engine.answer(lm, [item.question.prompt for item in request.asked], cfg)
            made.append(engine.verdicts(task, request.asked, replies, cfg))
        return made

    def edit(models: Sequence[LM], requests: Sequence[Request]):
        edited = [
            engine.edit(lm, request.texts, identity(number, request.candidate), ikey, cfg)
            for lm, request in zip(models, requests, strict=True)
        ]
        return edited, answer(edited, requests)

    return continual.Engine(write, answer, edit)


SETTINGS: dict[str, Callable[[_Subject, Config], Study]] = {
    "single": _single,
    "cpt": _cpt,
    "continual": _continual,
}


def print_study(study: Study) -> None:
    """Prints the table; of several processes the first one."""
    if multihost.leads():
        print(study)
        progress.say(f"records: {study.folder}")
