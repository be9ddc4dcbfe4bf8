"""Knowledge incorporation: a passage becomes training texts; its questions are asked without it.

Every prompt and splitting rule is the reference's, to the byte (`ki_goldens`), except where a
docstring says otherwise. Files are read by `seal_jax.tasks.passages`.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from seal_jax import config, progress
from seal_jax import judge as judges
from seal_jax.errors import SealError
from seal_jax.tasks import Context, Edit, Example, Grade, Question, Task, grading
from seal_jax.tasks.passages import from_entries as from_entries
from seal_jax.tasks.passages import load as load

Item = TypeVar("Item")
Judge = judges.Judge

_LIST = "produce a {}list of implications derived directly or indirectly from the content."
_STYLES = {
    # style: (what to do with the passage, what the self-edit follows)
    "implications": (_LIST.format(""), "Implications:\n"),
    "implications-long": (_LIST.format("long "), "Implications:\n"),
    "implications-very-long": (_LIST.format("very long "), "Implications:\n"),
    "rewrite": (
        "rewrite it in a few different ways, each one separated by a newline.",
        "Rewritten passages:\n",
    ),
    "self-qa": ("rewrite it in a question-answer format.", "Question 1: "),
}
# Words of the reference's second version; only these two differ in form from the others.
_THINK = (
    "Let's read the following passage, think step by step, and then "
    + _LIST.format("")
    + ' We should first generate a "Thought Process" and then "Implications"'
)
STYLES = (*_STYLES, "implications-chain-of-thought", "none", "compact")

_QUESTION = re.compile(r"Question\s+\d+:")
_ANSWER = re.compile(r"Answer\s*:")
_THOUGHTS = re.compile(r"\A.*?\nImplications:\s*", re.DOTALL)
_BEFORE_QUESTION = re.compile(r"\n(?=Question\s+\d+:)")


def prompt(title: str, passage: str, style: str = "implications", chat: bool = False) -> str:
    """Returns the text that asks for a self-edit.

    `none` gives the passage and leaves the rest to the model; `implications-chain-of-thought` asks
    for reasoning before the list; `compact` is the tiny world's.

    Args:
      chat: The variant for instruction-tuned models. As in the reference it always asks for
        implications, whatever the style.
    """
    _check_style(style, chat)
    if chat:
        return _chat(
            "You are an assistant tasked with analyzing the provided passage and producing a list "
            "of implications derived directly or indirectly from the content. ",
            f"{title}\n{passage}",
        )
    if style == "compact":
        return f"Passage: {passage}\nImplications:\n"
    shown = f"Passage:\n{title}\n{passage}\n\n"
    if style == "none":
        return shown
    if style == "implications-chain-of-thought":
        return f"{_THINK}\n\n{shown}Thought Process:\n"
    request, opening = _STYLES[style]
    request = f"Let's read the following passage and {request}"
    return f"{request}\n\n{shown}{opening}"


def answer_prompt(
    title: str, question: str, chat: bool = False, *, style: str = "implications"
) -> str:
    """Returns the text that asks a question without the passage.

    Args:
      chat: The variant for instruction-tuned models.
      style: Only `compact` makes a difference: its questions name no topic.
    """
    _check_style(style, chat)
    if style == "compact":
        return f"Question: {question} Answer:"
    question = grading.topic(title, question)
    if chat:
        return _chat("You are an assistant to answer a question directly and concisely.", question)
    return f"Let's answer a question directly and concisely.\nQuestion: {question}\nAnswer:\n"


def training_texts(
    self_edit: str,
    passage: str,
    title: str,
    split_newlines: bool = True,
    *,
    style: str = "implications",
) -> list[str]:
    """Returns the texts to train on: the parts of the self-edit, then the passage.

    Each is headed by the title. Parts are separated by `---`, and by newlines if asked:

    * a self-edit of numbered questions with answers is split before each `Question n:`, its
      first part headed by the `Question 1: ` of the prompt unless it begins with `Question`;
    * any other is split into lines without blank ones; where the second line begins a numbered
      list (`1.`), the first is its heading and left out.

    A part is not stripped where the reference does not strip it: a question keeps the newline
    that ends its paragraph. A blank self-edit is one blank part if not split, else none.

    Args:
      style: Of `compact` lines and passage stay as they are, without a title. After thinking, only
        what follows `Implications:` counts.
    """
    if style == "compact":
        return [*_lines(self_edit), passage.strip()]
    if style == "implications-chain-of-thought":
        self_edit = _THOUGHTS.sub("", self_edit, count=1)
    segments = [part.strip() for part in self_edit.split("---") if part.strip()]
    parts = segments or [self_edit.strip()]
    if split_newlines and _QUESTION.search(self_edit) and _ANSWER.search(self_edit):
        parts = _BEFORE_QUESTION.split(self_edit.strip())
        if not parts[0].startswith("Question"):
            parts[0] = f"Question 1: {parts[0].strip()}"
    elif split_newlines:
        parts = [line for part in parts for line in _lines(part)]
        if len(parts) > 1 and parts[1].startswith("1."):
            parts = parts[1:]
    return [f"{title}\n{part}" for part in [*parts, passage.strip()]]


def sample_sequences(
    items: Sequence[Item], n_sequences: int, length: int, seed: int
) -> list[list[Item]]:
    """Returns sequences of distinct items, each drawn afresh, for continual self-edits."""
    rng = random.Random(seed)
    return [rng.sample(items, length) for _ in range(n_sequences)]


def limit_questions(items: Sequence[Item], limit: int, seed: int = 43) -> list[Item]:
    """Returns at most `limit` items of a shuffled order: a sample of questions over passages."""
    return select(items, 0, limit, seed)


def select(items: Sequence[Item], start: int = 0, n: int = 0, seed: int | None = 42) -> list[Item]:
    """Returns `n` items of a shuffled order from `start` on; `n` <= 0: to the end.

    Args:
      seed: Of the shuffle, as Python's `random.seed`; None keeps the order.
    """
    order = list(items)
    if seed is not None:
        random.Random(seed).shuffle(order)
    return order[start : start + n] if n > 0 else order[start:]


def task(settings: config.Task, judge: Judge | None = None) -> Task:
    """Returns the task that a group of settings describes.

    Contexts beyond `size`, or those of the file `held_out`, are held out; a passage that is
    trained on never is. Passages without a question are left out, unless none has one.

    Args:
      judge: Says which answers are right; None loads the one that the settings name.

    Raises:
      SealError: where no file is given, one cannot be read, or none of its passages is left to hold
        out.
    """
    if settings.path is None:
        raise SealError("task.path: the squad task needs a file of passages or a hub id")
    order = select(_asked(load(settings.path), settings.path), seed=settings.order_seed)
    size = settings.size or len(order)
    contexts, others = order[:size], order[size:]
    if settings.held_out is not None:
        others = _asked(load(settings.held_out), settings.held_out)
        others = select(others, seed=settings.order_seed)
    # By what they say: of equal entries of a file the ids differ.
    seen = {(context.title, context.passage) for context in contexts}
    held_out = [x for x in others if (x.title, x.passage) not in seen]
    if settings.held_out is not None and not held_out:
        raise SealError(f"{settings.held_out}: every passage in it is also trained on")
    return make(contexts, settings, judge, held_out)


def _asked(contexts: list[Context], origin: str) -> list[Context]:
    """Returns the contexts with questions: without one there is no reward."""
    found = [context for context in contexts if context.questions]
    if found and len(found) < len(contexts):
        progress.say(f"{origin}: {len(contexts) - len(found)} passages without a question left out")
    return found or contexts


def make(
    contexts: Sequence[Context],
    settings: config.Task,
    judge: Judge | None = None,
    held_out: Sequence[Context] = (),
    references: Mapping[str, Callable[[Context], str]] = MappingProxyType({}),
    name: str = "squad",
) -> Task:
    """Returns the task of asking, splitting and testing these contexts.

    Args:
      settings: Their style, chat variant, splitting and judge; files are not read again.
      judge: Says which answers are right; None loads the one that the settings name. It never
        sees blank answers, which are wrong. Judges that are models see the topic, as in the
        reference.
    """
    style, chat = settings.style, settings.chat
    _check_style(style, chat)
    judge = judge or judges.load(settings)
    name_topic = settings.judge in ("openai", "model") and style != "compact"

    def edit(context: Context, self_edit: str) -> Edit:
        texts = training_texts(
            self_edit, context.passage, context.title, settings.split_newlines, style=style
        )
        return Edit(tuple(Example(text) for text in texts))

    def questions(context: Context) -> list[Question]:
        return [
            q._replace(prompt=answer_prompt(context.title, q.text, chat, style=style))
            for q in context.questions
        ]

    def grade(context: Context, answers: list[str]) -> Grade:
        items = [
            (grading.topic(context.title, q.text) if name_topic else q.text, q.gold, answer)
            for q, answer in zip(context.questions, answers, strict=True)
        ]
        verdicts = tuple(grading.verdicts(items, judge))
        return Grade(sum(verdicts) / len(verdicts) if verdicts else 0.0, verdicts)

    return Task(
        contexts=contexts,
        prompt=lambda context: prompt(context.title, context.passage, style, chat),
        edit=edit,
        questions=questions,
        grade=grade,
        held_out=held_out,
        references=references,
        name=name,
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _chat(system: str, user: str) -> str:
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def _check_style(style: str, chat: bool) -> None:
    if style not in STYLES:
        raise SealError(f"style {style!r} is unknown: choose one of {', '.join(STYLES)}")
    if chat and style == "compact":
        raise SealError("task.style=compact has no variant for chat models: set task.chat=false")
