"""One passage in, adapted model and answers out: the method on a single context."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from seal_jax import (
    batching,
    checkpoint,
    files,
    inner,
    judge,
    judge_model,
    lora,
    multihost,
    outer,
    peft,
    readers,
    rewards,
    runtime,
    sharding,
    writing,
)
from seal_jax.batching import SelfEdit
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.tasks import Context, Task, passages, squad
from seal_jax.tasks.registry import load_task


class Lesson(NamedTuple):
    """What one context taught: candidates by index, and the answers before and after.

    Of each question its text and the right answer.
    """

    context: Context
    edits: list[SelfEdit]
    losses: np.ndarray
    rewards: np.ndarray
    best: int
    questions: list[tuple[str, str]]
    before: list[str]
    after: list[str]
    saved: Path | None


def teach(cfg: Config, passage: Path | None = None, out: Path | None = None) -> Lesson:
    """Returns the lesson of one passage: `sampling.n` self-edits, each applied and tested.

    Without questions the first self-edit counts as the best; one that diverged never does.

    Args:
      passage: JSON in SEAL's format, or a text file: title on the first line, then the passage.
        None takes the task's first held-out context.
      out: Folder for the best adapter, in PEFT's format.

    Raises:
      SealError: for unreadable files, before the model is loaded.
    """
    runtime.set_flags(cfg.compiler)
    with multihost.together(cfg.distributed, heed=False):  # nothing is saved before the end
        return _teach(cfg, passage, out)


def _teach(cfg: Config, passage: Path | None, out: Path | None) -> Lesson:
    task = _task(cfg, passage)
    context = _context(task, passage)
    judge.check(cfg.task)
    if out is not None:
        multihost.agree(lambda: files.check_free(out) or b"")
    lm = checkpoint.load_model(cfg.model, mesh=sharding.make(cfg.mesh))
    key = outer.key_of(cfg, "lesson")
    ready = readers.ready(lm, cfg.mesh)
    (edits,) = writing.sample_edits(ready, task, [context], key=key, cfg=cfg)
    batch = batching.pack(task, edits, lm.tokenizer, cfg.inner, eos_id=checkpoint.eos(lm))
    adapters, losses = inner.adapt_many(readers.readable(ready), batch, key, cfg)
    losses = sharding.fetch(losses)
    bad = inner.diverged(batch, adapters, losses)
    if bad.all():
        raise SealError(
            f"all inner loops diverged; lower inner.learning_rate, {cfg.inner.learning_rate:g}"
        )
    reward, before, answers = np.zeros(len(edits)), [], []
    questions = _questions(task, context)
    if questions:
        before = rewards.score(ready, None, task, [context], cfg).answers[0]
        scores = rewards.score(ready, adapters, task, [context], cfg)
        reward = multihost.broadcast(scores.reward)  # process 0 asked the judge
        answers = scores.answers
    best = int(np.argmax(np.where(bad, -1, reward)))
    after = answers[best] if answers else []
    if out is not None:
        adapter = sharding.fetch(lora.take(adapters, best))
        multihost.agree(lambda: str(peft.save_peft(adapter, out, cfg)).encode())
    return Lesson(context, edits, losses, reward, best, questions, before, after, out)


def _questions(task: Task, context: Context) -> list[tuple[str, str]]:
    """Returns what a context asks, in few words, and what is right."""
    asked = task.questions(context)
    if context.questions:
        return [(own.text or own.prompt, own.gold) for own in context.questions]
    return [(f"question {i}", own.gold) for i, own in enumerate(asked, 1)]


def _task(cfg: Config, passage: Path | None) -> Task:
    """Returns the configured task; with a passage in hand it needs no file of contexts."""
    replies = judge_model.replies_of(cfg)
    if passage is not None and cfg.task.name in ("arc", "tiny-grids"):
        raise SealError(f"task.name={cfg.task.name!r} does not learn from passages")
    if passage is None or cfg.task.name == "tiny-world" or cfg.task.path:
        return load_task(cfg.task, replies)
    if cfg.task.name != "squad":
        raise SealError(f"task.name={cfg.task.name!r} does not learn from passages")
    return squad.make([], cfg.task, judge.load(cfg.task, replies))


def _context(task: Task, passage: Path | None) -> Context:
    if passage is None:
        found = [*task.held_out, *task.contexts]
        if not found:
            raise SealError("no passage: give --passage FILE")
        return found[0]
    if passage.name.removesuffix(".gz").endswith((".json", ".jsonl")):
        return passages.load(passage)[0]
    if not passage.exists():
        raise SealError(f"{passage}: no such file")
    try:
        first, _, rest = passage.read_text(encoding="utf-8-sig").strip().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SealError(f"{passage}: not a readable text file") from error
    title, text = first.strip(), rest.strip()
    if not text:
        raise SealError(f"{passage}: expected a title on the first line and a passage below it")
    return Context(passages.context_id(title, text), title, text)


def print_lesson(lesson: Lesson) -> None:
    """Prints the best self-edit and each question with its answers before and after."""
    if not multihost.leads():
        return
    asked = bool(lesson.questions)
    untested = "" if asked else ", no question to choose by"
    print(f"{lesson.context.title or lesson.context.id}: {len(lesson.edits)} self-edits{untested}")
    for edit, reward, losses in zip(lesson.edits, lesson.rewards, lesson.losses, strict=True):
        real = losses[np.isfinite(losses)]
        change = f"loss {real[0]:.3f} to {real[-1]:.3f}" if len(real) else "trained nothing"
        mark = " <- best" if asked and edit.index == lesson.best else ""
        earned = f"reward {reward:.3f}, " if asked else ""
        print(f"  {edit.index}: {earned}{change}{mark}")
    chosen = "Best self-edit" if asked else f"Self-edit {lesson.best}"
    print(f"\n{chosen}:\n{lesson.edits[lesson.best].text}\n")
    for (text, gold), before, after in zip(
        lesson.questions, lesson.before, lesson.after, strict=True
    ):
        print(f"{text}\n  gold: {gold.strip()}")
        print(f"  before: {before.strip()}\n  after: {after.strip()}")
    if lesson.saved is not None:
        print(f"\nadapter: {lesson.saved}")
