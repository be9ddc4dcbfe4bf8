"""Training tasks from the demonstrations of one task, as a self-edit asks for them.

Leave-n tasks -> augmented by the chosen families, within 30 by 30 -> duplicates dropped -> each
once more in other colours and another order of examples -> capped. Duplicates are dropped in
first-seen order: unlike the reference's, the result does not depend on Python's hash seed.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from seal_jax.tasks.arc import augment, prompts, tasks
from seal_jax.tasks.arc.edits import ArcEdit
from seal_jax.tasks.arc.tasks import ArcTask


def augmented_tasks(
    task: ArcTask,
    edit: ArcEdit,
    rng: np.random.RandomState,
    *,
    leave: Sequence[int] = (1, 2),
    permute: int = 1,
    max_examples: int = 250,
    max_tokens: int = 8192,
    count_tokens: Callable[[ArcTask], int] = prompts.count_tokens,
    reference_quirks: bool = False,
) -> list[ArcTask]:
    """Returns the tasks to train on, each with its test example as the one to predict.

    Args:
      leave: How many demonstrations to take out: one becomes the test example.
      permute: How often each task is drawn again in other colours and another order.
      max_examples: More tasks are shuffled and cut.
      max_tokens: Tasks that are not shorter are dropped.
      count_tokens: Of a task's prompt and answer.
      reference_quirks: Begin each `leave`, and the cut, with the same draws, as the reference;
        see `initial_tasks` and `augment.apply` for the rest.

    Raises:
      TypeError: where `rng` is another kind of generator.
    """
    if not isinstance(rng, np.random.RandomState):
        raise TypeError("rng: expected np.random.RandomState, which the reference draws with")
    start = copy.deepcopy(rng)
    fresh = (lambda: copy.deepcopy(start)) if reference_quirks else (lambda: rng)
    made = []
    for n in leave:
        own = fresh()
        geometric = geometric_tasks(task, edit, n, own, reference_quirks)
        made += with_permuted(geometric, edit, own, permute)
    return capped(made, fresh(), max_examples, max_tokens, count_tokens)


def initial_tasks(task: ArcTask, leave: int, reference_quirks: bool = False) -> list[ArcTask]:
    """Returns a task for each demonstration as the test example and each choice of others.

    Tasks without any demonstration teach nothing but memorising; only the reference keeps them.
    """
    made = []
    for i, test in enumerate(task.train):
        rest = [pair for j, pair in enumerate(task.train) if j != i]
        for out in itertools.combinations(range(len(rest)), leave - 1):
            train = tuple(pair for j, pair in enumerate(rest) if j not in out)
            if train or reference_quirks:
                made.append(replace(task, train=train, test=test))
    return made


def geometric_tasks(
    task: ArcTask,
    edit: ArcEdit,
    leave: int,
    rng: np.random.RandomState,
    reference_quirks: bool = False,
) -> list[ArcTask]:
    """Returns the leave-n tasks and all their augmented versions that fit, without duplicates."""
    initial = initial_tasks(task, leave, reference_quirks)
    augmented = [
        augment.apply(part, one, rng, reference_quirks)
        for part in augment.families(**edit.families)
        for one in initial
    ]
    return tasks.unique([one for one in augmented if tasks.fits(one)] + initial)


def with_permuted(
    geometric: Sequence[ArcTask], edit: ArcEdit, rng: np.random.RandomState, permute: int = 1
) -> list[ArcTask]:
    """Returns the tasks and their permuted versions, without duplicates."""
    return tasks.unique([*geometric, *permuted(geometric, edit, rng, permute)])


def permuted(
    geometric: Sequence[ArcTask], edit: ArcEdit, rng: np.random.RandomState, permute: int = 1
) -> list[ArcTask]:
    """Returns each task in other colours (if any family is chosen) and another order."""
    recolour = any(edit.families.values())
    made = []
    for one in list(geometric) * permute:
        if recolour:
            one = augment.recoloured(one, rng)
        made.append(augment.reordered(one, rng))
    return made


def capped(
    made: Sequence[ArcTask],
    rng: np.random.RandomState,
    max_examples: int,
    max_tokens: int,
    count_tokens: Callable[[ArcTask], int],
) -> list[ArcTask]:
    """Returns at most `max_examples` tasks, none of them too long; shuffled only when cut."""
    kept = [one for one in made if count_tokens(one) < max_tokens]
    if len(kept) <= max_examples:
        return kept
    order = np.arange(len(kept))
    rng.shuffle(order)
    return [kept[i] for i in order[:max_examples]]
