"""The outer loop, ReST-EM: write self-edits, test each, keep the best, finetune on them, repeat.

Every stage first appends its records to the run folder and later reads them back from there, so a
run that was killed goes on where it stopped and ends with the records it would have had.
"""

import time
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from seal_jax import (
    files,
    multihost,
    progress,
    readers,
    rewards,
    runs,
    sampling,
    state,
    stats,
    writing,
)
from seal_jax import rows as rows_lib
from seal_jax.batching import SelfEdit, identity
from seal_jax.checkpoint import LM
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.sft import finetune
from seal_jax.tasks import Context, Task

# What the records of a run folder have to hold to be gone on with.
_EDIT: dict[str, type] = {"context": str, "index": int, "text": str}
_TESTED: dict[str, type] = {"context": str, "index": int, "seed": int, "reward": float}


class Scored(NamedTuple):
    """A self-edit and its rewards, one for each seed of the inner loop."""

    context: str
    index: int
    prompt: str
    text: str
    rewards: tuple[float, ...]

    @property
    def reward(self) -> float:
        """The mean, exactly rounded: equal scores in another order are equal."""
        return stats.mean(self.rewards)


def keep_best(
    candidates: Sequence[Scored], k: int = 1, min_reward: float | None = None
) -> list[Scored]:
    """Returns the k best self-edits of each context, contexts in order of appearance.

    Of equal ones the first wins. A blank self-edit among the best is dropped, not replaced, as the
    reference does.

    Args:
      k: 0 keeps all that reach `min_reward`.
      min_reward: Self-edits below it are not kept.
    """
    by_context: dict[str, list[Scored]] = {}
    for candidate in candidates:
        by_context.setdefault(candidate.context, []).append(candidate)
    kept = []
    for own in by_context.values():
        best = sorted(own, key=lambda candidate: -_equal(candidate.reward))[: k or None]
        good = lambda x: min_reward is None or _equal(x.reward) >= _equal(min_reward)
        kept += [x for x in best if x.text.strip() and good(x)]
    return kept


def _equal(reward: float) -> float:
    """Returns a reward such that as many right answers give the same, however the seeds share them:
    0 + 0 + .6 and 0 + .2 + .4 thirds of floats differ in the last bit."""
    return round(reward, 9)


def keep_random(candidates: Sequence[Scored], rng: np.random.Generator) -> list[Scored]:
    """Returns one self-edit of each context, whatever its reward: the control of `keep_best`."""
    by_context: dict[str, list[Scored]] = {}
    for candidate in candidates:
        by_context.setdefault(candidate.context, []).append(candidate)
    chosen = [own[rng.integers(len(own))] for own in by_context.values()]
    return [candidate for candidate in chosen if candidate.text.strip()]


def applied(
    scored: Sequence[Scored], rows: Sequence[runs.Record], kept: Sequence[Scored]
) -> list[Scored]:
    """Returns the self-edits that trained something and are not among the kept; no blank ones."""
    trained = {(row["context"], row["index"]) for row in rows if row["steps"]}
    chosen = {(x.context, x.index) for x in kept}
    others = trained - chosen
    return [x for x in scored if (x.context, x.index) in others and x.text.strip()]


def replay(candidates: Sequence[Scored], count: int, rng: np.random.Generator) -> list[Scored]:
    """Returns `count` self-edits drawn at random, or all if they are fewer."""
    return [candidates[i] for i in rng.permutation(len(candidates))[:count]]


def key_of(cfg: Config, *purpose: str | int) -> jax.Array:
    """Returns the key of one purpose; it depends on the run's seed and the purpose alone."""
    return jax.random.fold_in(jax.random.key(cfg.seed), identity(*purpose))


def write_edits(
    lm: LM, task: Task, contexts: Sequence[Context], n: int, file: Path, key: jax.Array, cfg: Config
) -> list[SelfEdit]:
    """Returns n self-edits for each context, from the file's records or newly written to it."""
    lm = readers.ready(lm, cfg.mesh)
    seen = {(row["context"], row["index"]) for row in runs.records(file, **_EDIT)}
    group = max(1, (cfg.sampling.chunk or rows_lib.usual(lm)) // n)
    longest = max(len(sampling.encode(lm, task.prompt(context))) for context in contexts)
    grammar = None if task.grammar is None else sampling.constrain(lm, task.grammar)
    with progress.track(f"write self-edits ({file.parent.name})", len(contexts) * n) as advance:
        for start in range(0, len(contexts), group):
            some = contexts[start : start + group]
            wanted = [(context.id, i) for context in some for i in range(n)]
            if not seen.issuperset(wanted):
                made = writing.write(lm, task, some, n, key, cfg, pad_to=longest, grammar=grammar)
                rows = [_edit_record(one) for of_context in made for one in of_context]
                runs.append(file, [r for r in rows if (r["context"], r["index"]) not in seen])
                multihost.check()
            advance(len(wanted))
    rows = runs.records(file, **_EDIT)
    by_place = {(row["context"], row["index"]): row["text"] for row in rows}
    _check_there(file, by_place, [(c.id, i) for c in contexts for i in range(n)])
    return [SelfEdit(c, i, by_place[c.id, i]) for c in contexts for i in range(n)]


def _edit_record(one: writing.Written) -> runs.Record:
    return {
        "context": one.edit.context.id,
        "index": one.edit.index,
        "text": one.edit.text,
        "tokens": one.tokens,
        "logprob": round(one.logprob, 6) if np.isfinite(one.logprob) else None,
        "ended": one.ended,
        "tries": one.tries,
    }


def test_edits(
    lm: LM,
    task: Task,
    edits: Sequence[SelfEdit],
    seeds: int,
    file: Path,
    key: jax.Array,
    cfg: Config,
    metrics: runs.Metrics,
) -> list[runs.Record]:
    """Returns a record for each self-edit and seed: its reward, answers, verdicts and losses."""
    lm = readers.ready(lm, cfg.mesh)
    seen = _tested(file, edits)
    label = f"adapt and test ({file.parent.name}/{file.stem})"
    with progress.track(label, len(edits) * seeds) as advance:
        advance(len(seen))
        for seed in range(seeds):
            done = lambda places, s=seed: seen.issuperset(
                (edits[i].context.id, edits[i].index, s) for i in places
            )
            start, total, count = time.monotonic(), rewards.Efficiency(), 0
            own = jax.random.fold_in(key, seed)
            for outcomes, part in rewards.evaluate(lm, task, edits, own, cfg, done=done):
                rows = [_reward_record(edits[x.at], seed, x) for x in outcomes]
                fresh = [r for r in rows if (r["context"], r["index"], seed) not in seen]
                runs.append(file, fresh)
                multihost.check()
                advance(len(fresh))
                count += len(rows)
                total = rewards.Efficiency(*(a + b for a, b in zip(total, part, strict=True)))
            if count:
                seconds = time.monotonic() - start
                metrics.log(
                    stage=f"{file.parent.name}/{file.stem}",
                    seed=seed,
                    seconds=round(seconds, 3),
                    candidates_per_second=round(count / seconds, 4),
                    token_efficiency=round(total.useful / max(total.processed, 1), 4),
                    step_efficiency=round(total.active / max(total.executed, 1), 4),
                )
    rows = runs.records(file, **_TESTED)
    places = ((edit.context.id, edit.index) for edit in edits)
    wanted = [(*place, seed) for place in places for seed in range(seeds)]
    _check_there(file, {(r["context"], r["index"], r["seed"]) for r in rows}, wanted)
    return rows


def _check_there(file: files.AnyPath, found: Container[tuple], wanted: Iterable[tuple]) -> None:
    """Raises SealError where records have gone that were read or written before."""
    if gone := [place for place in wanted if place not in found]:
        raise SealError(
            f"{file}: {len(gone)} records have gone since they were written: was the folder of the "
            "run deleted meanwhile?"
        )


def _tested(file: Path, edits: Sequence[SelfEdit]) -> set[tuple[str, int, int]]:
    """Returns the inner loops that a file has records of: context, index and seed.

    Raises:
      SealError: where one is of no self-edit that is tested here.
    """
    known = {(edit.context.id, edit.index) for edit in edits}
    rows = runs.records(file, **_TESTED)
    for number, row in enumerate(rows, 1):
        if (row["context"], row["index"]) not in known:
            raise SealError(
                f"{file}, line {number}: self-edit {row['index']} of context {row['context']!r} "
                "is none of this run's"
            )
    return {(row["context"], row["index"], row["seed"]) for row in rows}


def _reward_record(edit: SelfEdit, seed: int, outcome: rewards.Outcome) -> runs.Record:
    return {
        "context": edit.context.id,
        "index": edit.index,
        "seed": seed,
        "reward": outcome.grade.reward,
        "verdicts": [int(v) for v in outcome.grade.verdicts],
        "answers": outcome.answers,
        "steps": outcome.steps,
        "first_loss": outcome.first_loss,
        "last_loss": outcome.last_loss,
        "error": outcome.error,
    }


def base_rewards(
    lm: LM, task: Task, contexts: Sequence[Context], file: Path, cfg: Config
) -> list[float]:
    """Returns the un-adapted model's reward on each context: once per policy, kept on file."""
    kinds = {"context": str, "reward": float}
    found = {row["context"]: row["reward"] for row in runs.records(file, **kinds)}
    if any(context.id not in found for context in contexts):
        scores = rewards.score(readers.ready(lm, cfg.mesh), None, task, contexts, cfg)
        each = zip(contexts, scores.reward, scores.verdicts, scores.answers, strict=True)
        rows = [
            {
                "context": context.id,
                "reward": float(reward),
                "verdicts": [int(v) for v in verdicts],
                "answers": answers,
            }
            for context, reward, verdicts, answers in each
        ]
        runs.write_lines(file, rows)
        found = {row["context"]: row["reward"] for row in runs.records(file)}
    return [found[context.id] for context in contexts]


def gather(task: Task, edits: Sequence[SelfEdit], rows: Sequence[runs.Record]) -> list[Scored]:
    """Returns each self-edit with its rewards over seeds, stripped as the reference's are."""
    by_place: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        by_place.setdefault((row["context"], row["index"]), []).append((row["seed"], row["reward"]))
    return [
        Scored(
            edit.context.id,
            edit.index,
            task.prompt(edit.context),
            edit.text.strip(),
            tuple(r for _, r in sorted(by_place.get((edit.context.id, edit.index), []))),
        )
        for edit in edits
    ]


def train_policy(
    lm: LM, kept: Sequence[Scored], folder: files.AnyPath, key: jax.Array, cfg: Config
) -> bool:
    """Saves the model finetuned on kept self-edits; returns whether `folder` holds one.

    Without a kept self-edit there is none.
    """
    if state.is_saved(folder):
        return True
    if not kept:
        return False
    rows = [(x.prompt, x.text) for x in kept]
    params, losses = finetune(lm, rows, cfg.outer.sft, key)
    state.save_tree(folder, params)
    progress.say(
        f"finetune ({folder.parent.name}): {len(rows)} self-edits, {len(losses)} steps, "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    return True
