"""Self-edits written: n of each context, again where one cannot be applied."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from seal_jax import config as config_lib
from seal_jax import sampling
from seal_jax.batching import SelfEdit, identity
from seal_jax.checkpoint import LM
from seal_jax.errors import SelfEditError
from seal_jax.grammar import Grammar
from seal_jax.tasks import Context, Task


class Written(NamedTuple):
    """A self-edit with how it came about.

    Attributes:
      logprob: Mean of its tokens'.
      ended: By itself, not by the limit.
      tries: More than 1 where those before could not be applied.
    """

    edit: SelfEdit
    tokens: int
    logprob: float
    ended: bool
    tries: int = 1


def write(
    lm: LM,
    task: Task,
    contexts: Sequence[Context],
    n: int,
    key: jax.Array,
    cfg: config_lib.Config,
    *,
    pad_to: int = 0,
    grammar: Grammar | None = None,
) -> list[list[Written]]:
    """Returns n self-edits for each context, drawn by the context's own key.

    One that cannot be applied is written again up to `cfg.sampling.retries` times, by keys of its
    own; the last try stays. (The reference tries for ever.)

    Args:
      grammar: The task's, over this model's tokens; made here if not given.
    """
    if grammar is None and task.grammar is not None:
        grammar = sampling.constrain(lm, task.grammar)
    draw = lambda key: _draw(lm, task, contexts, n, key, cfg, pad_to, grammar)
    written = draw(key)
    for attempt in range(1, cfg.sampling.retries + 1):
        bad = [
            (c, i)
            for c, own in enumerate(written)
            for i, one in enumerate(own)
            if one.tries == attempt and not _applies(task, one.edit)
        ]
        if not bad:
            break
        # All are drawn again, in the program that there is, and the good ones left as they were.
        again = draw(jax.random.fold_in(key, attempt))
        for c, i in bad:
            written[c][i] = again[c][i]._replace(tries=attempt + 1)
    return written


def _applies(task: Task, written: SelfEdit) -> bool:
    try:
        task.edit(written.context, written.text)
    except SelfEditError:
        return False
    return True


def _draw(lm, task, contexts, n: int, key, cfg, pad_to: int, grammar) -> list[list[Written]]:
    """Returns n self-edits for each context, whatever they say."""
    settings = cfg.sampling
    prompts = [sampling.encode(lm, task.prompt(context)) for context in contexts]
    out = sampling.decode(
        lm,
        [prompts],
        samples=n,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        key=key,
        ids=[[identity(context.id) for context in contexts]],
        chunk=settings.chunk,
        pad_to=pad_to,
        grammar=grammar,
    )[0]
    return [
        [
            Written(
                SelfEdit(context, i, sampling.text(lm, one)),
                len(one.tokens),
                float(np.mean(one.logprobs)) if len(one.logprobs) else 0.0,
                one.ended,
            )
            for i, one in enumerate(samples)
        ]
        for context, samples in zip(contexts, out, strict=True)
    ]


def sample_edits(
    lm: LM,
    task: Task,
    contexts: Sequence[Context],
    n: int | None = None,
    *,
    key: jax.Array,
    cfg: config_lib.Config,
) -> list[list[SelfEdit]]:
    """Returns, for each context, n self-edits (`cfg.sampling.n` by default)."""
    written = write(lm, task, contexts, cfg.sampling.n if n is None else n, key, cfg)
    return [[one.edit for one in of_context] for of_context in written]
