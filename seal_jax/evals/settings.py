"""The paper's three settings of evaluation, each on a subject.

Each returns rows of rewards, the un-edited model's first, and what the rewards are of; it leaves
records beside them, and a result file as the reference writes it.
"""

import random
from collections.abc import Callable, Sequence

from seal_jax import (
    held_out,
    multihost,
    outer,
    progress,
    readers,
    runs,
    state,
    stats,
    writing,
)
from seal_jax.batching import SelfEdit, identity
from seal_jax.checkpoint import LM
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.evals import continual as continual_lib
from seal_jax.evals import cpt as cpt_lib
from seal_jax.evals import engine, inner_loop, single_passage
from seal_jax.evals.inner_loop import Reply, Request
from seal_jax.evals.subject import Subject
from seal_jax.formats import continual as continual_file
from seal_jax.formats import cpt as cpt_file
from seal_jax.formats import results
from seal_jax.table import Row
from seal_jax.tasks import Context, Task

Found = tuple[tuple[Row, ...], str]
"""Rows, and what their rewards are of."""


def single(subject: Subject, cfg: Config) -> Found:
    """Returns the accuracy on each context after an inner loop of its own (n = 1)."""
    models, policy, task, contexts, home, metrics = subject
    file = home / "base.jsonl"
    bare = outer.base_rewards(models.load_adapted(policy), task, contexts, file, cfg)
    edits = subject.self_edits(cfg.evaluation.n, cfg)
    key, file = outer.key_of(cfg, "inner", "held-out"), home / "rewards.jsonl"
    lm, seeds = models.load_adapted(policy), cfg.evaluation.seeds
    rows = outer.test_edits(lm, task, edits, seeds, file, key, cfg, metrics)
    if one_each(contexts, runs.records(home / "base.jsonl")):
        subject.write_result(_single_result(subject, edits, rows, cfg))
    kind = cfg.evaluation.self_edits
    rewards = held_out.mean_rewards(kind, edits, rows)
    made = (
        Row("no self-edit", tuple(bare), len(bare)),
        Row(f"{kind} self-edits", rewards, len(rows)),
    )
    return made, "contexts"


def one_each(contexts: Sequence[Context], bare: Sequence[runs.Record]) -> bool:
    """Returns whether each question of passages was asked once and has a verdict of its own.

    A result file holds nothing else; a task may ask, and grade, in other ways.
    """
    found = {row["context"]: (row["answers"], row["verdicts"]) for row in bare}
    counts = [{len(x.questions), *map(len, found[x.id])} for x in contexts]
    return any(x.questions for x in contexts) and all(len(own) == 1 for own in counts)


def _single_result(
    subject: Subject, edits: Sequence[SelfEdit], rows: Sequence[runs.Record], cfg: Config
) -> dict:
    bare = {row["context"]: row for row in runs.records(subject.home / "base.jsonl")}
    found = {(row["context"], row["index"], row["seed"]): row for row in rows}
    own = subject.by_context(edits)
    articles = []
    for context, texts in zip(subject.contexts, own, strict=True):
        replies = [
            _reply(bare[context.id], found[context.id, index, seed])
            for index in range(len(texts))
            for seed in range(cfg.evaluation.seeds)
        ]
        prompt = subject.task.prompt(context)
        articles.append(single_passage.article(context, texts, replies, prompt))
    return results.result(
        articles,
        name=cfg.name,
        dataset=_dataset(cfg),
        split_newlines=cfg.task.split_newlines,
        k=max(len(texts) for texts in own),
        seeds=cfg.evaluation.seeds,
        lora=results.lora_params(cfg.lora, cfg.inner),
    )


def _reply(before: runs.Record, after: runs.Record) -> Reply:
    right = [tuple(bool(v) for v in row["verdicts"]) for row in (before, after)]
    return Reply(tuple(before["answers"]), tuple(after["answers"]), *right)


def _dataset(cfg: Config) -> str:
    return cfg.task.held_out or cfg.task.path or cfg.task.name


def cpt(subject: Subject, cfg: Config) -> Found:
    """Returns the accuracy on each context after one training on the self-edits of all.

    The trained model stays in the folder `policy`.
    """
    task, contexts, home = subject.task, subject.contexts, subject.home
    own = subject.texts(cfg.evaluation.n, cfg)
    request = cpt_lib.request(task, contexts, own, cfg.evaluation.cpt.questions)
    if request.refused:
        progress.say(f"{len(request.refused)} self-edits cannot be applied: {request.refused[0]}")
        runs.write_json(home / "refused.json", list(request.refused))
    if not request.texts:
        reason = request.refused[0] if request.refused else "all are empty"
        raise SealError(f"eval cpt: no self-edit can be applied: {reason}")
    prompts = [item.question.prompt for item in request.asked]
    lm = subject.models.load_adapted(subject.policy)
    before = engine.answer(lm, prompts, cfg)
    multihost.check()
    saved = home / "policy"
    if state.is_saved(saved):
        trained = lm._replace(params=state.load_tree(saved, lm.params))
    else:
        progress.say(f"continued pretraining: {len(request.texts)} texts")
        trained = engine.pretrain(lm, request.edit, outer.key_of(cfg, "cpt"), cfg)
        state.save_tree(saved, trained.params)
    multihost.check()
    after = engine.answer(trained, prompts, cfg)
    right = [engine.verdicts(task, request.asked, answers, cfg) for answers in (before, after)]
    content = cpt_file.result(
        request,
        Reply(tuple(before), tuple(after), *right),
        dataset=_dataset(cfg),
        n_articles=len(contexts),
        k=max(len(texts) for texts in own),
        split_newlines=cfg.task.split_newlines,
        lora=results.lora_params(cfg.lora, cfg.inner),
    )
    subject.write_result(content)
    names = ("before training", f"{cfg.evaluation.self_edits} self-edits")
    shares = [_shares(request, verdicts) for verdicts in right]
    rows = [Row(name, own, len(prompts)) for name, own in zip(names, shares, strict=True)]
    return tuple(rows), "contexts"


def _shares(request: Request, right: Sequence[bool]) -> tuple[float, ...]:
    """Returns the share of right answers of each context that was asked about."""
    groups: dict[str, list[bool]] = {}
    for item, verdict in zip(request.asked, right, strict=True):
        groups.setdefault(item.context.id, []).append(verdict)
    return tuple(stats.mean(own) for own in groups.values())


def continual(subject: Subject, cfg: Config) -> Found:
    """Returns the accuracy of each sequence: before, right after each edit, and at the end."""
    settings, file = cfg.evaluation.continual, subject.home / "sequences.jsonl"
    n, count = settings.length, settings.sequences
    rng = random.Random(identity(cfg.seed, "continual"))
    chosen = [rng.sample(range(len(subject.contexts)), n) for _ in range(count)]
    given = None if cfg.evaluation.self_edits == "own" else subject.texts(1, cfg)
    kinds = {"sequence": int, "matrix": list}
    done = {row["sequence"] for row in runs.records(file, **kinds)}
    with progress.track("continual self-edits", count) as advance:
        for number, places in enumerate(chosen):
            if number not in done:
                sequence = [subject.contexts[place] for place in places]
                texts = given and [given[place][0] for place in places]
                runs.append(file, [_edit_sequence(subject, number, sequence, texts, cfg)])
                multihost.check()
            advance(1)
    matrices = [row["matrix"] for row in sorted(runs.records(file), key=lambda x: x["sequence"])]
    subject.write_result(continual_file.summary(matrices, _dataset(cfg), cfg.model.path))
    parts = {
        "before": lambda m: m[0],
        "right after its edit": lambda m: [m[i + 1][i] for i in range(n)],
        "all, at the end": lambda m: m[n],
    }
    means = lambda part: tuple(stats.mean(part(m)) for m in matrices)
    return tuple(Row(name, means(part), n * count) for name, part in parts.items()), "sequences"


def _edit_sequence(
    subject: Subject, number: int, sequence: list[Context], given: list[str] | None, cfg: Config
) -> runs.Record:
    own = _sequence_engine(subject.task, number, sequence, given, cfg)
    base = subject.models.load_adapted(subject.policy)
    (outcome,) = continual_lib.run(subject.task, [sequence], own, base)
    return {
        "sequence": number,
        "contexts": [context.id for context in sequence],
        "self_edits": list(outcome.self_edits),
        "refused": list(outcome.refused),
        "matrix": outcome.matrix,
    }


def _sequence_engine(
    task: Task, number: int, sequence: list[Context], given: list[str] | None, cfg: Config
) -> continual_lib.Engine:
    """Returns what the edits of one sequence need.

    Args:
      given: Self-edits to apply, one of each passage; None has each model write its own.
    """
    write_key = outer.key_of(cfg, "write", "continual", number)
    inner_key = outer.key_of(cfg, "inner", "continual", number)
    waiting, steps = iter(given or ()), iter(sequence)

    def write(models: Sequence[LM], prompts: Sequence[str]) -> list[str]:
        if given:
            return [next(waiting)]
        lm = readers.ready(models[0], cfg.mesh)
        ((one,),) = writing.sample_edits(lm, task, [next(steps)], 1, key=write_key, cfg=cfg)
        return [one.text]

    def answer(models: Sequence[LM], requests: Sequence[Request]) -> list[Sequence[bool]]:
        prompts = [item.question.prompt for item in requests[0].asked]
        replies = engine.answer(models[0], prompts, cfg)
        return [engine.verdicts(task, requests[0].asked, replies, cfg)]

    def edit(models: Sequence[LM], requests: Sequence[Request]):
        step, made = requests[0].candidate, requests[0].edit
        if given:  # a blank one is meant, not a model's silence: it is not replaced
            made, _ = inner_loop.read(task, sequence[step], given[step])
        name = identity(number, step)
        edited = [engine.apply(models[0], made, name, inner_key, cfg)]
        return edited, answer(edited, requests)

    return continual_lib.Engine(write, answer, edit)


SETTINGS: dict[str, Callable[[Subject, Config], Found]] = {
    "single": single,
    "cpt": cpt,
    "continual": continual,
}
