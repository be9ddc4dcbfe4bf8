"""A loaded language model as judge: the policy itself or another one.

It gets the reference's grading prompt and answers greedily; the generating function is given.
"""

import functools
import re
import warnings
from collections.abc import Callable, Sequence

from seal_jax import checkpoint, config, sampling
from seal_jax.errors import SealError
from seal_jax.tasks import grading

_REPLY_TOKENS = 8  # as many as the reference lets its grader write
_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def judge_many(
    items: Sequence[grading.Item], generate: Callable[[list[str]], list[str]]
) -> list[bool]:
    """Returns the model's verdict on each answer; blank ones are wrong and never asked about.

    A reply with neither yes nor no counts as no, as in the reference, and is warned of; a model
    most of whose replies are of that kind is no judge.

    Args:
      items: Equal ones are asked once.
      generate: Prompts to replies, greedily; a few tokens are enough.

    Raises:
      SealError: more than half of the replies say neither yes nor no.
    """
    return grading.verdicts(items, lambda answered: _ask(answered, generate))


def _ask(items: Sequence[grading.Item], generate: Callable[[list[str]], list[str]]) -> list[bool]:
    prompts = [grading.prompt(*item) for item in items]
    distinct = list(dict.fromkeys(prompts))
    replies = dict(zip(distinct, generate(distinct), strict=True))
    odd = [reply for reply in replies.values() if not _VERDICT.search(reply)]
    if odd:
        told = f"{len(odd)} of {len(distinct)} replies say neither yes nor no, as {odd[0][:60]!r}"
        if 2 * len(odd) > len(distinct):
            raise SealError(f"task.judge=model: this model cannot judge: {told}")
        warnings.warn(f"task.judge=model: {told}; they count as no", stacklevel=3)
    return [grading.parse_yes_no(replies[text]) for text in prompts]


def replies_of(cfg: config.Config) -> Callable[[list[str]], list[str]] | None:
    """Returns what generates the verdicts of a run's judge, or None where it is no model.

    The model is loaded when the first verdict is asked for.
    """
    if cfg.task.judge != "model":
        return None
    chosen = config.Model(path=cfg.task.judge_model) if cfg.task.judge_model else cfg.model
    load = functools.lru_cache(1)(lambda: checkpoint.load_model(chosen))
    return lambda prompts: sampling.generate(load(), prompts, max_tokens=_REPLY_TOKENS)
