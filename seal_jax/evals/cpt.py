"""Many passages at once (continued pretraining): one adapter for all, tested on all questions."""

from collections.abc import Sequence

from seal_jax.evals import inner_loop
from seal_jax.evals.inner_loop import Engine, Reply, Request
from seal_jax.tasks import Context, Edit, Example, Task, squad


def request(
    task: Task,
    contexts: Sequence[Context],
    self_edits: Sequence[Sequence[str]],
    question_limit: int = 0,
) -> Request:
    """Returns the one inner loop: every text of every self-edit, and the questions of all passages.

    Each self-edit brings its passage along, so a passage is trained on as often as it has
    self-edits. Learning rates and epochs that self-edits ask for do not count; what one trains on
    with all its tokens is a text without a prompt.

    Args:
      question_limit: Ask a sample of this size (seed 43, as the reference); 0 asks all.
    """
    examples, refused = [], []
    for context, written in zip(contexts, self_edits, strict=True):
        for self_edit in written:
            edit, reason = inner_loop.read(task, context, self_edit)
            whole = edit.loss_on == "all"
            examples += [Example(x.prompt + x.completion) if whole else x for x in edit.examples]
            refused += reason
    asked = inner_loop.asked(task, contexts)
    if question_limit:
        asked = tuple(squad.limit_questions(asked, question_limit))
    return Request(Edit(tuple(examples)), asked, refused=tuple(refused))


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
