"""What a task is: data and four functions. The loops know tasks only through this interface."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from seal_jax.grammar import Automaton

LossOn = Literal["all", "output"]


@dataclass(frozen=True)
class Context:
    """Something new to learn: a passage with its questions, or an ARC task.

    `id` is unique in its task and names the context in records and random keys. `data` is whatever
    else the task needs; it never reaches the model except through the task's own functions.
    """

    id: str
    title: str = ""
    passage: str = ""
    questions: tuple["Question", ...] = ()
    data: Any = field(default=None, compare=False)


class Question(NamedTuple):
    """A question as the model sees it, without the context.

    `prompt` is the whole text given to the model; `text` the bare question, for judges.
    """

    prompt: str
    gold: str
    text: str = ""


class Example(NamedTuple):
    """A training text: a document (empty prompt), or a completion that follows a prompt.

    With a prompt, the loss is on the completion alone unless the edit says `loss_on="all"`.
    """

    completion: str
    prompt: str = ""


class Edit(NamedTuple):
    """A parsed self-edit: what to train on and how. None takes the configuration's value."""

    examples: tuple[Example, ...]
    learning_rate: float | None = None
    epochs: int | None = None
    loss_on: LossOn = "output"


class Grade(NamedTuple):
    """The reward of one set of answers, in [0, 1], and the verdict on each answer."""

    reward: float
    verdicts: tuple[bool, ...]


class Task(NamedTuple):
    """Contexts, and how to ask for, read and test self-edits.

    Attributes:
      contexts: To train on, in the order in which rounds take them.
      prompt: Asks for a self-edit.
      edit: Parses one; raises SelfEditError with the reason.
      questions: Asked without the context.
      grade: Judges the answers to all questions of a context.
      held_out: Contexts for evaluation; disjoint from `contexts`.
      references: Self-edits to compare with, by name: made without a model, one or several for a
        context. Of several by the name of `oracle` the best counts, else their mean.
      name: For tables and records.
      grammar: Language that sampled self-edits are held to, if any.
    """

    contexts: Sequence[Context]
    prompt: Callable[[Context], str]
    edit: Callable[[Context, str], Edit]
    questions: Callable[[Context], list[Question]]
    grade: Callable[[Context, list[str]], Grade]
    held_out: Sequence[Context] = ()
    references: Mapping[str, Callable[[Context], str | Sequence[str]]] = MappingProxyType({})
    name: str = "task"
    grammar: Automaton | None = None
