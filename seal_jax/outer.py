"""The outer loop, ReST-EM: write self-edits, test each, keep the best, finetune on them, repeat.

Every stage first appends its records to the run folder and later reads them back from there, so a
run that was killed goes on where it stopped and ends with the records it would have had.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import (
    batching,
    inner,
    lora,
    optim,
    progress,
    rewards,
    runs,
    sampling,
    sharding,
    state,
    stats,
)
from seal_jax import config as config_lib
from seal_jax import slots as slots_lib
from seal_jax.batching import SelfEdit, identity
from seal_jax.checkpoint import LM
from seal_jax.config import Config, Sft
from seal_jax.errors import SealError
from seal_jax.params import Params
from seal_jax.tasks import Context, Edit, Example, Task


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
        best = sorted(own, key=lambda candidate: -candidate.reward)[: k or None]
        kept += [
            x for x in best if x.text.strip() and (min_reward is None or x.reward >= min_reward)
        ]
    return kept


def keep_random(candidates: Sequence[Scored], rng: np.random.Generator) -> list[Scored]:
    """Returns one self-edit of each context, whatever its reward: the control of `keep_best`."""
    by_context: dict[str, list[Scored]] = {}
    for candidate in candidates:
        by_context.setdefault(candidate.context, []).append(candidate)
    chosen = [own[rng.integers(len(own))] for own in by_context.values()]
    return [candidate for candidate in chosen if candidate.text.strip()]


def finetune(
    lm: LM, rows: Iterable[tuple[str, str]], settings: Sft, key: jax.Array
) -> tuple[Params, np.ndarray]:
    """Returns weights finetuned on (prompt, self-edit) rows, and the loss of each step [i].

    The loss is on the self-edit and the token that ends it alone. By LoRA the adapter is merged.
    """
    edit = Edit(tuple(Example(completion, prompt) for prompt, completion in rows))
    if not edit.examples:
        raise SealError("nothing to finetune on: no self-edit was kept")
    loop = config_lib.Inner(batch_size=settings.batch_size, max_length=settings.max_length)
    texts = tuple(batching.tokenize(edit, lm.tokenizer, rewards.eos(lm), loop))
    one = batching.Candidate(texts, settings.learning_rate, settings.epochs, 0)
    batch = batching.Batch((one,), loop, rewards.eos(lm))
    (chunk,) = slots_lib.arrange(batch, 1, key)
    mesh = sharding.of(lm.params)
    slots = sharding.share(_one(chunk.slots, sharding.data_size(mesh)), mesh)
    program = {"settings": _program(settings), "remat": jax.default_backend() != "cpu"}
    with sharding.use(mesh):
        if settings.method == "full":
            params, losses = _fit_all(lm.params, slots, **program)
        else:
            own = sharding.share(key, mesh)
            adapter = jax.jit(lora.init, static_argnums=(0, 1))(lm.config, settings.lora, own)
            adapter, losses = _fit_lora(lm.params, adapter, slots, **program)
            params = lora.merge(lm.params, adapter)
    if mesh is not None:
        params = sharding.place(params, jax.tree.map(lambda x: x.sharding, lm.params))
    losses = sharding.fetch(losses)[: int(chunk.slots.total_c[0])]
    if not np.isfinite(losses).all():
        raise SealError(
            f"finetuning diverged: the loss is not finite at step "
            f"{int(np.argmin(np.isfinite(losses)))}; lower outer.sft.learning_rate"
        )
    return params, losses


def _one(slots: slots_lib.Slots, parts: int) -> slots_lib.Slots:
    """Returns the only candidate's arrays, rows filled up to a multiple of `parts`."""
    own = {
        name: jax.tree.map(lambda x: x[0], getattr(slots, name))
        for name in slots_lib.Slots.__dataclass_fields__
        if name not in slots_lib.SHARED
    }
    # Segment 0 and weight 0: rows that see nothing and count nothing.
    fill = lambda x: np.pad(x, ((0, 0), (0, -x.shape[1] % parts), (0, 0)))
    for name in ("tokens", "weights", "segments"):
        own[name] = tuple(fill(x) for x in own[name])
    return slots.replace(**own)


def _mean_loss(params, adapter, tokens_bt, weights_bt, segments_bt, *, remat: bool) -> jax.Array:
    """Returns `optim.loss`, the rows of the batch shared out over devices."""
    parts = sharding.data_size(sharding.current())
    if parts == 1:
        return optim.loss(params, adapter, tokens_bt, weights_bt, segments_bt, remat=remat)
    split = [x.reshape(parts, -1, x.shape[-1]) for x in (tokens_bt, weights_bt, segments_bt)]
    split = [sharding.constrain_rows(x) for x in split]
    one = functools.partial(optim.loss, params, adapter, remat=remat)
    count = jnp.sum(split[1].astype(jnp.float32), (1, 2))
    return jnp.sum(sharding.vmap(one)(*split) * count) / jnp.maximum(jnp.sum(count), 1e-9)


def _program(settings: Sft) -> Sft:
    """Returns only what shapes the program."""
    return Sft(
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )


@functools.partial(jax.jit, static_argnames=("settings", "remat"))
def _fit_lora(params, adapter, slots, *, settings: Sft, remat: bool):
    loss_of = functools.partial(_mean_loss, params, remat=remat)
    adapter, measures = inner.fit(loss_of, adapter, slots, settings)
    return adapter, sharding.whole(measures.loss)


@functools.partial(jax.jit, static_argnames=("settings", "remat"))
def _fit_all(params, slots, *, settings: Sft, remat: bool):
    # Trained in float32, used in the model's own type.
    used = jax.tree.map(lambda x: x.dtype, params)
    cast = lambda tree: jax.tree.map(lambda x, dtype: x.astype(dtype), tree, used)

    def loss_of(trained, tokens_bt, weights_bt, segments_bt):
        return _mean_loss(cast(trained), None, tokens_bt, weights_bt, segments_bt, remat=remat)

    start = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    trained, measures = inner.fit(loss_of, start, slots, settings)
    return cast(trained), sharding.whole(measures.loss)


def key_of(cfg: Config, *purpose: str | int) -> jax.Array:
    """Returns the key of one purpose; it depends on the run's seed and the purpose alone."""
    return jax.random.fold_in(jax.random.key(cfg.seed), identity(*purpose))


def write_edits(
    lm: LM, task: Task, contexts: Sequence[Context], n: int, file: Path, key: jax.Array, cfg: Config
) -> list[SelfEdit]:
    """Returns n self-edits for each context, from the file's records or newly written to it."""
    lm = sampling.ready(lm, cfg.mesh)
    seen = {(row["context"], row["index"]) for row in runs.records(file)}
    group = max(1, (cfg.sampling.chunk or 64) // n)
    longest = max(len(sampling.encode(lm, task.prompt(context))) for context in contexts)
    with progress.track(f"write self-edits ({file.parent.name})", len(contexts) * n) as advance:
        for start in range(0, len(contexts), group):
            some = contexts[start : start + group]
            wanted = [(context.id, i) for context in some for i in range(n)]
            if not seen.issuperset(wanted):
                made = rewards.write(lm, task, some, n, key, cfg, pad_to=longest)
                rows = [_edit_record(one) for of_context in made for one in of_context]
                runs.append(file, [r for r in rows if (r["context"], r["index"]) not in seen])
            advance(len(wanted))
    by_place = {(row["context"], row["index"]): row["text"] for row in runs.records(file)}
    return [SelfEdit(c, i, by_place[c.id, i]) for c in contexts for i in range(n)]


def _edit_record(one: rewards.Written) -> runs.Record:
    return {
        "context": one.edit.context.id,
        "index": one.edit.index,
        "text": one.edit.text,
        "tokens": one.tokens,
        "logprob": round(one.logprob, 6),
        "ended": one.ended,
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
    lm = sampling.ready(lm, cfg.mesh)
    seen = {(r["context"], r["index"], r["seed"]) for r in runs.records(file)}
    label = f"adapt and test ({file.parent.name}/{file.stem})"
    with progress.track(label, len(edits) * seeds) as advance:
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
                advance(len(rows))
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
                )
    return runs.records(file)


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


def gather(task: Task, edits: Sequence[SelfEdit], rows: Sequence[runs.Record]) -> list[Scored]:
    """Returns each self-edit with its rewards over seeds."""
    by_place: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        by_place.setdefault((row["context"], row["index"]), []).append((row["seed"], row["reward"]))
    return [
        Scored(
            edit.context.id,
            edit.index,
            task.prompt(edit.context),
            edit.text,
            tuple(r for _, r in sorted(by_place.get((edit.context.id, edit.index), []))),
        )
        for edit in edits
    ]


def train_policy(lm: LM, kept: Sequence[Scored], folder: Path, key: jax.Array, cfg: Config) -> LM:
    """Returns the model finetuned on kept self-edits: restored from `folder`, or saved to it.

    Without a kept self-edit the model stays as it is.
    """
    if not folder.exists() and kept:
        rows = [(x.prompt, x.text) for x in kept]
        params, losses = finetune(lm, rows, cfg.outer.sft, key)
        state.save_tree(folder, params)
        progress.say(
            f"finetune ({folder.parent.name}): {len(rows)} self-edits, {len(losses)} steps, "
            f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
        )
    if not folder.exists():
        return lm
    return lm._replace(params=state.load_tree(folder, lm.params))
