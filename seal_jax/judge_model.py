"""A loaded language model as judge: the policy itself or another one.

It gets the reference's grading prompt and answers greedily; the generating function is given.
"""

import functools
from collections.abc import Callable, Sequence

from seal_jax import checkpoint, config, sampling
from seal_jax.tasks import grading

_REPLY_TOKENS = 8  # as many as the reference lets its grader write
_TOGETHER = 64  # prompts at a time


class Judge:
    """A function from items to the model's verdicts; blank answers are wrong, never asked about.

    Args:
      generate: Prompts to replies, greedily; a few tokens are enough.
    """

    def __init__(self, generate: Callable[[list[str]], list[str]]) -> None:
        self._generate = generate
        self._replies = grading.Replies("model")

    def __call__(self, items: Sequence[grading.Item]) -> list[bool]:
        """Returns verdicts; equal items are asked once.

        Raises:
          SealError: the model cannot judge; see `grading.Replies`.
        """
        return grading.verdicts(items, self._ask)

    def _ask(self, items: Sequence[grading.Item]) -> list[bool]:
        prompts = [grading.prompt(*item) for item in items]
        distinct = list(dict.fromkeys(prompts))
        replies = dict(zip(distinct, self._generate(distinct), strict=True))
        self._replies.count(list(replies.values()))
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
