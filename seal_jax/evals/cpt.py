"""Many passages at once (continued pretraining): one adapter for all, tested on all questions."""

from collections.abc import Sequence

from seal_jax.evals import inner_loop
from seal_jax.evals.inner_loop import Engine, Reply, Request
from seal_jax.tasks import Context, Task, squad


def request(
    task: Task,
    contexts: Sequence[Context],
    self_edits: Sequence[Sequence[str]],
    question_limit: int = 0,
) -> Request:
    """Returns the one inner loop: every text of every self-edit, and the questions of all passages.

    Each self-edit brings its passage along, so a passage is trained on as often as it has
    self-edits.

    Args:
      question_limit: Ask a sample of this size (seed 43, as the reference); 0 asks all.
    """
    texts = [
        text
        for context, written in zip(contexts, self_edits, strict=True)
        for self_edit in written
        for text in inner_loop.texts(task, context, self_edit)
    ]
    asked = inner_loop.asked(task, contexts)
    if question_limit:
        asked = tuple(squad.limit_questions(asked, question_limit))
    return Request(tuple(texts), asked)


def run(
    task: Task,
    contexts: Sequence[Context],
    self_edits: Sequence[Sequence[str]],
    engine: Engine,
    *,
    question_limit: int = 0,
) -> tuple[Request, Reply]:
    """Returns the request and its reply, for `formats.cpt.result`."""
    made = request(task, contexts, self_edits, question_limit)
    (answer,) = engine([made])
    return made, answer
