"""Is this answer right? One verdict for each (question, gold, answer).

`offline` agrees with GPT-4.1 as far as a small lexical model can, without network or key; `exact`
is for generated worlds, where the right answer has one form. `load` returns the judge a task asks
for. Blank answers are wrong for every judge.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from seal_jax import config
from seal_jax.errors import SealError

Item = tuple[str, str, str]
"""Question, gold answer, answer."""
Judge = Callable[[Sequence[Item]], list[bool]]


def load(settings: config.Task, generate: Callable[[list[str]], list[str]] | None = None) -> Judge:
    """Returns the judge named by `settings.judge`, a function from items to verdicts.

    Args:
      settings: Of the task; `settings.openai` is read for that judge only.
      generate: Prompts to replies, greedily; the judge `model` needs it.
    """
    if settings.judge == "openai":
        from seal_jax import judge_openai  # lazily, as its imports would be circular

        budget = judge_openai.Budget(settings.openai.max_calls)  # one for all calls of this judge
        return lambda items: judge_openai.judge_many(items, settings.openai, budget)
    if settings.judge == "model":
        from seal_jax import judge_model

        if generate is None:
            raise SealError("task.judge=model: no model was given to judge with")
        return lambda items: judge_model.judge_many(items, generate)
    one = {"offline": offline, "exact": exact}[settings.judge]
    return lambda items: [one(*item) for item in items]


def exact(question: str, gold: str, answer: str) -> bool:
    """Returns whether the answer's first line is the gold, up to case, spaces and punctuation."""
    lines = answer.strip().splitlines()
    found = _plain(lines[0]) if lines else ""
    return bool(found) and found == _plain(gold)


def offline(question: str, gold: str, answer: str) -> bool:
    """Returns whether three quarters of the gold's words are in the answer."""
    words, found = _plain(gold).split(), set(_plain(answer).split())
    return bool(found) and sum(word in found for word in words) >= 0.75 * len(words)


_APOSTROPHES = re.compile(r"['’`]")
_GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(r"(?:(?<!\d)\.|\.(?!\d)|(?<!\s)-|-(?!\d)|[^\w\s.-]|_)+")


def _plain(text: str) -> str:
    """Returns the text in lower case, with single spaces and without punctuation.

    Decimal points and signs stay: 1.5 is not 15, and -5 not 5.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    folded = _GROUPED_DIGITS.sub("", _APOSTROPHES.sub("", folded))
    return " ".join(_PUNCTUATION.sub(" ", " " + folded).split())
