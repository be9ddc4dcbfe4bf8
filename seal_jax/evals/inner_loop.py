"""What every evaluation asks of an inner loop, and what it gets back.

An evaluation turns self-edits into requests, and replies into records. What is between may train
and answer as it likes: this package, many candidates in one program (`settings`); an engine, one
after the other (`one_by_one`); or a recording (the tests).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from seal_jax.errors import SealError, SelfEditError
from seal_jax.formats import files
from seal_jax.tasks import Context, Edit, Example, Grade, Question, Task


class Asked(NamedTuple):
    """A question, the context it is about, and its place among that context's questions."""

    context: Context
    index: int
    question: Question


class Request(NamedTuple):
    """One inner loop: train as an edit says, then answer these questions.

    `candidate` and `seed` number the self-edit of its context and its repetition: the names of
    random keys. Without examples nothing is trained, and the un-adapted model's answers count.
    `refused` has the reason for each self-edit that cannot be applied, and so is not in it.
    """

    edit: Edit
    asked: tuple[Asked, ...]
    candidate: int = 0
    seed: int = 0
    refused: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """What is trained on, without the prompts that some tasks have."""
        return tuple(example.completion for example in self.edit.examples)


class Reply(NamedTuple):
    """Answers and verdicts, in the order of the questions, before and after adapting."""

    baseline_texts: tuple[str, ...]
    adapter_texts: tuple[str, ...]
    baseline_correct: tuple[bool, ...]
    adapter_correct: tuple[bool, ...]


Engine = Callable[[Sequence[Request]], Sequence[Reply]]
Answer = Callable[[list[str]], list[str]]
"""Prompts -> answers, by one model."""
Grades = Callable[[list[tuple[Context, list[str]]]], list[Grade]]
"""Contexts with the answers to all their questions -> grades."""


def asked(task: Task, contexts: Sequence[Context]) -> tuple[Asked, ...]:
    """Returns every question of these contexts, in order."""
    return tuple(
        Asked(context, i, question)
        for context in contexts
        for i, question in enumerate(task.questions(context))
    )


def documents(texts: Sequence[str]) -> Edit:
    """Returns an edit that trains on whole texts."""
    return Edit(tuple(Example(text) for text in texts))


def read(task: Task, context: Context, self_edit: str) -> tuple[Edit, tuple[str, ...]]:
    """Returns what a self-edit says; one that cannot be applied trains nothing, with the reason."""
    try:
        return task.edit(context, self_edit), ()
    except SelfEditError as error:
        return documents(()), (str(error),)


def candidates(context: Context, k: int) -> list[str]:
    """Returns the first `k` self-edits that are not blank, of those that came with a context.

    Old files have one, as `completion`. Without any there is one blank one: it trains on the
    passage alone.

    Raises:
      SealError: where they are no texts; null is a blank one.
    """
    return [text for text in _given(context) if text.strip()][:k] or [""]


def has_candidates(contexts: Sequence[Context]) -> bool:
    """Returns whether any of these contexts came with a self-edit; see `candidates`."""
    return any(text.strip() for context in contexts for text in _given(context))


def _given(context: Context) -> list[str]:
    data = context.data if isinstance(context.data, dict) else {}
    written = data.get("completions") or [data.get("completion")]
    texts = [text or "" for text in written] if isinstance(written, list) else None
    if texts is None or not all(map(files.is_text, texts)):
        raise SealError(f"{context.title!r}: its completions are not a list of texts")
    return texts


def verdicts(
    task: Task, pairs: Sequence[Asked], answers: Sequence[str], grades: Grades | None = None
) -> tuple[bool, ...]:
    """Returns the task's verdict on each answer.

    A task grades a context's questions together; those that were not asked count as blank.

    Args:
      grades: Grades many contexts' answers; by default one after the other.

    Raises:
      SealError: where the task has no verdict for each of a context's answers.
    """
    rows: dict[str, list[str]] = {}
    contexts = {item.context.id: item.context for item in pairs}
    for item, answer in zip(pairs, answers, strict=True):
        if item.context.id not in rows:
            rows[item.context.id] = [""] * len(task.questions(item.context))
        rows[item.context.id][item.index] = answer
    rowed = [(contexts[name], row) for name, row in rows.items()]
    graded = grades(rowed) if grades else [task.grade(*pair) for pair in rowed]
    made = {name: own.verdicts for name, own in zip(rows, graded, strict=True)}
    for name, row in rows.items():
        if len(made[name]) != len(row):
            said = f"{len(made[name])} verdicts on {len(row)} answers"
            raise SealError(f"{task.name}: grade returned {said} for {name!r}")
    return tuple(made[item.context.id][item.index] for item in pairs)


def reply(
    task: Task, request: Request, baseline_texts: Sequence[str], adapter_texts: Sequence[str]
) -> Reply:
    """Returns the graded answers to a request; the un-adapted model's are graded first."""
    before = verdicts(task, request.asked, baseline_texts)
    after = before if not request.texts else verdicts(task, request.asked, adapter_texts)
    return Reply(tuple(baseline_texts), tuple(adapter_texts), before, after)


def one_by_one(task: Task, base: Answer, adapt: Callable[[Request], Answer]) -> Engine:
    """Returns an engine that serves requests in turn.

    The un-adapted model answers each list of questions once, however many self-edits follow.

    Args:
      base: The un-adapted model.
      adapt: Trains on a request's texts and returns the adapted model.
    """

    def engine(requests: Sequence[Request]) -> list[Reply]:
        answered: dict[tuple[str, ...], list[str]] = {}
        replies = []
        for request in requests:
            prompts = [item.question.prompt for item in request.asked]
            if tuple(prompts) not in answered:
                answered[tuple(prompts)] = base(prompts) if prompts else []
            before = answered[tuple(prompts)]
            after = adapt(request)(prompts) if request.texts and prompts else before
            replies.append(reply(task, request, before, after))
        return replies

    return engine
