"""Self-edits applied and tested: what each candidate is worth."""

import concurrent.futures
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seal_jax import (
    batching,
    checkpoint,
    chunks,
    inner,
    judge_openai,
    lora,
    multihost,
    readers,
    sampling,
    sharding,
    streams,
)
from seal_jax import config as config_lib
from seal_jax import slots as slots_lib
from seal_jax.batching import SelfEdit
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError
from seal_jax.lora import Adapter
from seal_jax.tasks import Context, Grade, Task


class Scores(NamedTuple):
    """Of each candidate: its reward [c], and its answers and verdicts, question by question."""

    reward: np.ndarray
    answers: list[list[str]]
    verdicts: list[tuple[bool, ...]]


def answer(
    lm: LM,
    task: Task,
    contexts: Sequence[Context | None],
    adapters: Adapter | None,
    cfg: config_lib.Config,
    *,
    pad_to: int = 0,
) -> list[list[str]]:
    """Returns the greedy answers to every question of each context, without the context.

    Args:
      contexts: One for each adapter (or any number of them without adapters); None for a filler.
      adapters: Stacked [c, ...], or None for the bare model.
      pad_to: See `sampling.decode`.
    """
    questions = [task.questions(context) if context else () for context in contexts]
    prompts = [[sampling.encode(lm, q.prompt) for q in own] for own in questions]
    out = sampling.decode(
        lm,
        prompts,
        adapters,
        max_tokens=cfg.answers.max_tokens,
        chunk=cfg.answers.chunk,
        pad_to=pad_to,
        logprobs=False,
    )
    return [[sampling.text(lm, one[0]) for one in rows] for rows in out]


def _longest_question(lm: LM, task: Task, contexts: Sequence[Context]) -> int:
    """Returns the tokens of the longest question, so that all chunks are padded alike."""
    unique = {context.id: context for context in contexts}.values()
    lengths = (len(sampling.encode(lm, q.prompt)) for c in unique for q in task.questions(c))
    return max(lengths, default=0)


def score(
    lm: LM,
    adapters: Adapter | None,
    task: Task,
    contexts: Sequence[Context],
    cfg: config_lib.Config,
) -> Scores:
    """Returns the reward, answers and verdicts of each adapter.

    Args:
      adapters: Stacked [c, ...], an equal number for each context, in order of contexts. A single
        one, or None for the bare model, is scored once for each context.

    Raises:
      SealError: where the adapters cannot be shared out among the contexts, or the judge fails.
    """
    if adapters is not None and not adapters.count:
        adapters = lora.stack([adapters] * len(contexts))
    c = len(contexts) if adapters is None else adapters.count
    if not contexts or c % len(contexts):
        raise SealError(f"{c} adapters cannot be shared out among {len(contexts)} contexts")
    each = [context for context in contexts for _ in range(c // len(contexts))]
    answers = answer(lm, task, each, adapters, cfg)
    grades = grade(task, list(zip(each, answers, strict=True)), cfg)
    return Scores(np.array([g.reward for g in grades]), answers, [g.verdicts for g in grades])


class Outcome(NamedTuple):
    """What one inner loop of one candidate came to.

    Attributes:
      at: Its place in the batch.
      steps: Steps it took; 0 if they changed nothing.
    """

    at: int
    grade: Grade
    answers: list[str]
    steps: int
    first_loss: float | None
    last_loss: float | None
    error: str | None


class Efficiency(NamedTuple):
    """How much of the work of inner loops counts.

    Attributes:
      useful, processed, executed: See `slots.Chunk`.
      active: Steps that candidates took.
    """

    useful: int = 0
    processed: int = 0
    active: int = 0
    executed: int = 0


def evaluate(
    lm: LM,
    task: Task,
    edits: Sequence[SelfEdit],
    key: jax.Array,
    cfg: config_lib.Config,
    *,
    done: Callable[[list[int]], bool] = lambda places: False,
) -> Iterator[tuple[list[Outcome], Efficiency]]:
    """Yields, chunk by chunk, what each self-edit is worth: adapt, answer, grade.

    Which candidates share a chunk depends on all `edits`, not on what is done, so that a run that
    was interrupted repeats the same programs on the same data.

    Args:
      done: Says that the candidates at these places need not run again.
    """
    batch = batching.pack(task, edits, lm.tokenizer, cfg.inner, eos_id=checkpoint.eos(lm))
    params = readers.readable(lm)
    settings = chunks.choose(params, batch, cfg)
    batch = batching.Batch(batch.candidates, settings, batch.eos_id)
    longest = _longest_question(lm, task, [edit.context for edit in edits])
    rank = np.argsort(slots_lib.by_work(batch))  # however the devices share them out

    def work(chunk: slots_lib.Chunk):
        adapters, losses = inner.adapt_chunk(params, batch, chunk, key, cfg.lora)
        contexts = [edits[i].context if i >= 0 else None for i in chunk.index]
        answers = answer(lm, task, contexts, adapters, cfg, pad_to=longest)
        return chunk, answers, *sharding.fetch((losses, inner.sound(adapters)))

    todo = (c for c in inner.arrange(params, batch, key) if not done(_places(c)))
    at_once = inner.chunks_at_once(params)
    for chunk, answers, losses, sound in streams.ordered(work, todo, at_once):
        steps, places = np.asarray(chunk.slots.total_c), _places(chunk)
        rows = np.flatnonzero(chunk.index >= 0)
        pairs = [(edits[i].context, answers[j]) for i, j in zip(places, rows, strict=True)]
        outcomes = [
            _outcome(i, own, answers[j], losses[j, : steps[j]], sound[j], batch.candidates[i], cfg)
            for i, j, own in zip(places, rows, grade(task, pairs, cfg), strict=True)
        ]
        active = int(np.sum(steps))
        some = Efficiency(chunk.useful, chunk.processed, active, chunk.executed)
        yield sorted(outcomes, key=lambda x: rank[x.at]), some


def _places(chunk: slots_lib.Chunk) -> list[int]:
    """Returns the places in the batch of a chunk's candidates, fillers left out."""
    return [int(i) for i in chunk.index if i >= 0]


def _outcome(place, graded, answers, losses, sound, candidate, cfg) -> Outcome:
    error = candidate.error if sound else "diverged at the last step"
    if not np.isfinite(losses).all():
        step = int(np.argmin(np.isfinite(losses)))
        # A fresh adapter changes nothing.
        error = f"diverged at step {step}" if step else "the bare model's loss is not finite"
    first, last = (_number(losses[i]) for i in (0, -1)) if len(losses) else (None, None)
    steps = len(losses)
    if not candidate.learning_rate or (steps == 1 and cfg.inner.warmup_steps):
        steps = 0  # at a rate of 0, which a warm-up begins with
    if not steps and not cfg.outer.reward_untrained:
        graded = graded._replace(reward=0.0)
    return Outcome(place, graded, answers, steps, first, last, error)


def grade(
    task: Task, pairs: Sequence[tuple[Context, list[str]]], cfg: config_lib.Config
) -> list[Grade]:
    """Returns the grade of each context's answers.

    Of several processes only the one that writes records asks the judge; the others get rewards of
    0. A judge behind an endpoint is waited for, so it is asked about many at a time.

    Raises:
      SealError: where the judge fails, or the task's `grade` returns no Grade from 0 to 1.
    """
    if not multihost.leads():
        return [Grade(0.0, ()) for _ in pairs]
    if cfg.task.judge != "openai" or len(pairs) < 2:
        return [_grade(task, *pair) for pair in pairs]
    with concurrent.futures.ThreadPoolExecutor(cfg.task.openai.concurrency) as pool:
        futures = [pool.submit(_grade, task, *pair) for pair in pairs]
        try:
            over = concurrent.futures.wait(futures, return_when="FIRST_EXCEPTION").done
            for future in over:
                future.result()
            return [future.result() for future in futures]
        except BaseException:  # a call failed for good, or Ctrl-C: the others are not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                judge_openai.cancel()
                time.sleep(0.05)
            raise


def _grade(task: Task, context: Context, answers: list[str]) -> Grade:
    made = task.grade(context, answers)
    if not isinstance(made, Grade) or not 0 <= made.reward <= 1:
        raise SealError(
            f"{task.name}: grade returned {made} for {context.id!r}: expected a Grade whose reward "
            "is from 0 to 1"
        )
    return made


def _number(value: Any) -> float | None:
    """Returns a float that JSON can hold: NaN and infinities become None."""
    return float(value) if np.isfinite(value) else None
