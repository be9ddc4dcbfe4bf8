"""The reference's grading by a language model: the prompt, and how its reply is read.

Used by judges that are models (an endpoint, or a loaded model); the offline judge needs neither.
"""

import re
from collections.abc import Callable, Sequence

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


def verdicts(
    items: Sequence[Item], judge: Callable[[Sequence[Item]], Sequence[bool]]
) -> list[bool]:
    """Returns whether each answer is right; a blank one is wrong and never reaches the judge."""
    answered = [i for i, (_, _, answer) in enumerate(items) if answer.strip()]
    made = dict(zip(answered, judge([items[i] for i in answered]), strict=True)) if answered else {}
    return [bool(made.get(i, False)) for i in range(len(items))]
