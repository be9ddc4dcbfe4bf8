"""Continual self-edits: passages one after the other, each edit kept, all seen passages tested.

Several sequences advance in step, so that an engine may serve them in one program.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from seal_jax.evals import inner_loop
from seal_jax.evals.inner_loop import Request
from seal_jax.formats.continual import Matrix
from seal_jax.tasks import Context, Task

Verdicts = Sequence[bool]


class Engine(NamedTuple):
    """What continual self-edits need; a model is whatever the engine makes of it.

    Attributes:
      write: Models and prompts to one self-edit each.
      answer: Models and requests without texts to verdicts: nothing is trained.
      edit: Models and requests to the edited models, the adapters merged, and their verdicts.
    """

    write: Callable[[Sequence[Any], Sequence[str]], Sequence[str]]
    answer: Callable[[Sequence[Any], Sequence[Request]], Sequence[Verdicts]]
    edit: Callable[[Sequence[Any], Sequence[Request]], tuple[Sequence[Any], Sequence[Verdicts]]]


class Outcome(NamedTuple):
    """What became of one sequence: its accuracies, self-edits and last model.

    `refused` has the reason for each self-edit that could not be applied, and so changed nothing.
    """

    matrix: Matrix
    self_edits: tuple[str, ...]
    model: Any
    refused: tuple[str, ...] = ()


def run(
    task: Task,
    sequences: Sequence[Sequence[Context]],
    engine: Engine,
    base: Any,
) -> list[Outcome]:
    """Returns the outcome of each sequence, for `formats.continual.summary`.

    Args:
      sequences: Of equal length; `squad.sample_sequences` draws them as the reference does.
      base: The model that every sequence starts from.
    """
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) != 1:
        raise ValueError(f"sequences differ in length: {sorted(lengths)}")
    (n,) = lengths
    models: list[Any] = [base] * len(sequences)
    matrices = [[[0.0] * n for _ in range(n + 1)] for _ in sequences]
    written: list[list[str]] = [[] for _ in sequences]
    refused: list[list[str]] = [[] for _ in sequences]
    nothing = inner_loop.documents(())
    for i in range(n):
        before = [Request(nothing, inner_loop.asked(task, [sequence[i]])) for sequence in sequences]
        for matrix, right in zip(matrices, engine.answer(models, before), strict=True):
            matrix[0][i] = _share(right)
    for step in range(n):
        now = [sequence[step] for sequence in sequences]
        self_edits = engine.write(models, [task.prompt(context) for context in now])
        requests = [
            edit_request(task, sequence[: step + 1], self_edit, step)
            for sequence, self_edit in zip(sequences, self_edits, strict=True)
        ]
        edited, verdicts = engine.edit(models, requests)
        models = list(edited)
        for s, (request, right) in enumerate(zip(requests, verdicts, strict=True)):
            matrices[s][step + 1] = _row(sequences[s][: step + 1], request, right, n)
            written[s].append(self_edits[s])
            refused[s] += request.refused
    rows = zip(matrices, written, models, refused, strict=True)
    return [Outcome(matrix, tuple(texts), model, tuple(why)) for matrix, texts, model, why in rows]


def edit_request(task: Task, seen: Sequence[Context], self_edit: str, step: int) -> Request:
    """Returns the inner loop of the last passage seen, asking about all of them.

    Where nothing was written, the passage is its own self-edit, as in the reference.
    """
    context = seen[-1]
    text = self_edit if self_edit.strip() else context.passage
    edit, refused = inner_loop.read(task, context, text)
    return Request(edit, inner_loop.asked(task, seen), candidate=step, refused=refused)


def _row(seen: Sequence[Context], request: Request, right: Verdicts, n: int) -> list[float]:
    """Returns the accuracy on each passage seen, then zeros for those to come."""
    groups: dict[str, list[bool]] = {context.id: [] for context in seen}
    for item, verdict in zip(request.asked, right, strict=True):
        groups[item.context.id].append(verdict)
    return [_share(groups[context.id]) for context in seen] + [0.0] * (n - len(seen))


def _share(right: Verdicts) -> float:
    return sum(right) / len(right) if right else 0.0
