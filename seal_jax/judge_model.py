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
_TOGETHER = 64  # prompts at a time
_ENOUGH = 50  # replies, before a judge is called none: a passage has a question or a few
_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class Judge:
    """A function from items to the model's verdicts; blank answers are wrong, never asked about.

    A reply with neither yes nor no counts as no, as in the reference, and is warned of; a model
    most of whose replies are of that kind is no judge.

    Args:
      generate: Prompts to replies, greedily; a few tokens are enough.
    """

    def __init__(self, generate: Callable[[list[str]], list[str]]) -> None:
        self._generate = generate
        self._replies = self._odd = 0

    def __call__(self, items: Sequence[grading.Item]) -> list[bool]:
        """Returns verdicts; equal items are asked once.

        Raises:
          SealError: more than half of its replies so far say neither yes nor no, of enough.
        """
        return grading.verdicts(items, self._ask)

    def _ask(self, items: Sequence[grading.Item]) -> list[bool]:
        prompts = [grading.prompt(*item) for item in items]
        distinct = list(dict.fromkeys(prompts))
        replies = dict(zip(distinct, self._generate(distinct), strict=True))
        odd = [reply for reply in replies.values() if not _VERDICT.search(reply)]
        before = self._odd
        self._replies += len(distinct)
        self._odd += len(odd)
        if odd:
            told = (
                f"{self._odd} of {self._replies} replies say neither yes nor no, as {odd[0][:60]!r}"
            )
            if self._replies >= _ENOUGH and 2 * self._odd > self._replies:
                raise SealError(f"task.judge=model: this model cannot judge: {told}")
            if self._odd.bit_length() > before.bit_length():  # not every time
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
    # A fixed chunk: process 0 alone judges, and choosing one asks all processes.
    tokens = {"max_tokens": _REPLY_TOKENS, "chunk": _TOGETHER}
    return lambda prompts: sampling.generate(load(), prompts, **tokens)
