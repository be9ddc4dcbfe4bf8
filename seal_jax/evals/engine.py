"""What the evaluations ask of a language model, done in this process: answer, judge, be edited.

A copy of the weights laid out for reading is made for each call, so that none outlives it.
"""

import json
from collections.abc import Sequence

import jax

from seal_jax import (
    batching,
    checkpoint,
    inner,
    lora,
    multihost,
    readers,
    rewards,
    sampling,
    sft,
    sharding,
)
from seal_jax.checkpoint import LM
from seal_jax.config import Config, Sft
from seal_jax.errors import SealError
from seal_jax.evals import inner_loop
from seal_jax.evals.inner_loop import Asked
from seal_jax.tasks import Edit, Task


def answer(lm: LM, prompts: Sequence[str], cfg: Config) -> list[str]:
    """Returns the greedy answer to each prompt."""
    if not prompts:
        return []
    settings = cfg.answers
    rows = [sampling.encode(lm, prompt) for prompt in prompts]
    lm = readers.ready(lm, cfg.mesh)
    (out,) = sampling.decode(
        lm, [rows], max_tokens=settings.max_tokens, chunk=settings.chunk, logprobs=False
    )
    return [sampling.text(lm, one[0]) for one in out]


def verdicts(
    task: Task, asked: Sequence[Asked], answers: Sequence[str], cfg: Config
) -> tuple[bool, ...]:
    """Returns the verdict on each answer; of several processes the first one asks the judge."""

    def judge() -> bytes:
        grades = lambda pairs: rewards.grade(task, pairs, cfg)
        found = inner_loop.verdicts(task, asked, answers, grades)
        return json.dumps([bool(right) for right in found]).encode()

    return tuple(json.loads(multihost.agree(judge)))


def pretrain(lm: LM, edit: Edit, key: jax.Array, cfg: Config) -> LM:
    """Returns the model trained on all examples, by `cfg.evaluation.cpt.method` and `cfg.inner`."""
    settings = Sft(
        method=cfg.evaluation.cpt.method,
        lora=cfg.lora,
        learning_rate=cfg.inner.learning_rate,
        epochs=cfg.inner.epochs,
        batch_size=cfg.inner.batch_size,
        schedule=cfg.inner.schedule,
        warmup_steps=cfg.inner.warmup_steps,
        weight_decay=cfg.inner.weight_decay,
        clip=cfg.inner.clip,
        max_length=cfg.inner.max_length,
    )
    rows = [(example.prompt, example.completion) for example in edit.examples]
    params, _ = sft.finetune(lm, rows, settings, key)
    return lm._replace(params=params)


def apply(lm: LM, edit: Edit, name: int, key: jax.Array, cfg: Config) -> LM:
    """Returns the model after one inner loop, its adapter merged.

    Args:
      name: 32 bits; the adapter's beginning depends on key and name alone.

    Raises:
      SealError: where the loss is not finite: nothing could follow on such a model.
    """
    end = checkpoint.eos(lm)
    candidate = batching.candidate(edit, name, lm.tokenizer, end, cfg.inner)
    if not candidate.texts:
        return lm
    batch = batching.Batch((candidate,), cfg.inner, end)
    reader = readers.readable(readers.ready(lm, cfg.mesh))
    adapters, losses = inner.adapt_many(reader, batch, key, cfg)
    del reader
    if inner.diverged(batch, adapters, losses)[0]:
        raise SealError(
            f"an inner loop diverged; lower inner.learning_rate, {cfg.inner.learning_rate:g}"
        )
    mesh = sharding.of(lm.params)
    adapter = sharding.share(sharding.fetch(lora.take(adapters, 0)), mesh)
    with sharding.use(mesh):
        params = lora.merge(lm.params, adapter)
    if mesh is not None:
        params = sharding.place(params, jax.tree.map(lambda x: x.sharding, lm.params))
    return lm._replace(params=params)
