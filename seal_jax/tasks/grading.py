"""The reference's grading by a language model: the prompt, and how its reply is read.

Used by judges that are models (an endpoint, or a loaded model); the offline judge needs neither.
"""

import re
import warnings
from collections.abc import Callable, Sequence

from seal_jax.errors import SealError

Item = tuple[str, str, str]
"""Question, gold answer, answer."""

_INSTRUCTION = (
    "You are a grading assistant. Your job is to determine whether a student's answer correctly "
    "answers the question based solely on the provided gold answer. Do not use any outside "
    "knowledge. The student answer can include additional information, but it must at least fully "
    "convey the gold answer and must not contradict it. Ignore style, phrasing, or extra details "
    "that do not affect correctness. Respond ONLY with 'yes' or 'no'."
)
_YES = re.compile(r"\byes\b", re.IGNORECASE)
_NO = re.compile(r"\bno\b", re.IGNORECASE)
_ENOUGH = 50  # replies, before a judge is called none: a passage has a question or a few


def prompt(question: str, gold: str, answer: str) -> str:
    """Returns the text that asks a model for a verdict.

    Args:
      question: As the student saw it; the reference puts `Topic: {title}` on a line before it
        (`topic`).
      gold: The right answer.
      answer: The student's; surrounding blanks are dropped.
    """
    return (
        f"{_INSTRUCTION}\n\nQuestion: {question}\nGold answer: {gold}\n"
        f"Student answer: {answer.strip()}\n"
        "Is the student answer correct based solely on the gold answer? Respond 'yes' or 'no'."
    )


def topic(title: str, question: str) -> str:
    """Returns a question that names its subject, for it is asked without the passage."""
    return f"Topic: {title}\n{question}"


def parse_yes_no(text: str) -> bool:
    """Returns whether a grader's reply says yes: the word yes, and nowhere the word no."""
    return bool(_YES.search(text)) and not _NO.search(text)


def is_odd(text: str) -> bool:
    """Returns whether a grader's reply says neither yes nor no."""
    return not _YES.search(text) and not _NO.search(text)


class Replies:
    """Counts a judge's replies, and the odd ones among them.

    One that says neither yes nor no counts as no, as in the reference, and is warned of; a judge
    most of whose replies are of that kind is none.

    Args:
      name: Of the judge, as in `task.judge`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._all = self._odd = 0

    def count(self, texts: Sequence[str]) -> None:
        """Counts replies, or raises SealError where more than half so far, of enough, are odd."""
        odd = [text for text in texts if is_odd(text)]
        before = self._odd
        self._all += len(texts)
        self._odd += len(odd)
        if not odd:
            return
        told = f"{self._odd} of {self._all} replies say neither yes nor no, as {odd[0][:60]!r}"
        if self._all >= _ENOUGH and 2 * self._odd > self._all:
            raise SealError(f"task.judge={self._name}: this model cannot judge: {told}")
        if self._odd.bit_length() > before.bit_length():  # not every time
            said = f"task.judge={self._name}: {told}; they count as no"
            warnings.warn(said, stacklevel=4)


def verdicts(
    items: Sequence[Item], judge: Callable[[Sequence[Item]], Sequence[bool]]
) -> list[bool]:
    """Returns whether each answer is right; a blank one is wrong and never reaches the judge."""
    answered = [i for i, (_, _, answer) in enumerate(items) if answer.strip()]
    made = dict(zip(answered, judge([items[i] for i in answered]), strict=True)) if answered else {}
    return [bool(made.get(i, False)) for i in range(len(items))]
