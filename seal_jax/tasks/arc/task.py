"""ARC as a task of the loops: contexts are puzzles, self-edits configure test-time training."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.tasks import Context, Edit, Example, Grade, Question, Task
from seal_jax.tasks.arc import (
    baselines,
    compact,
    edits,
    generate,
    grids,
    predict,
    prompts,
    syntax,
    tasks,
    voting,
)
from seal_jax.tasks.arc.grids import Grid
from seal_jax.tasks.arc.predict import Query
from seal_jax.tasks.arc.tasks import ArcTask

Puzzles = Mapping[str, tuple[ArcTask, ...]]


class Format(NamedTuple):
    """How grids are written for a model, and read from its replies."""

    render: Callable[[ArcTask], tuple[str, str]]
    self_edit_prompt: Callable[[ArcTask], str]
    parse: Callable[[str], Grid | None]
    count_tokens: Callable[[ArcTask], int]


def task(settings: config_lib.Task) -> Task:
    """Returns the task in Kaggle's files `task.path` and `task.arc.solutions`.

    Raises:
      SealError: names the file, or the puzzle without a solution.
    """
    if settings.path is None:
        raise SealError("task.path: give the file with ARC challenges")
    shuffle = settings.order_seed
    puzzles = list(read(settings.path, settings.arc.solutions, shuffle).items())
    size = settings.size or len(puzzles)
    if settings.held_out is None:
        rest: Puzzles = dict(puzzles[size:])
    else:
        solutions = settings.arc.held_out_solutions
        others = read(settings.held_out, solutions, shuffle, "task.arc.held_out_solutions")
        rest = {key: group for key, group in others.items() if key not in dict(puzzles[:size])}
        if not rest:
            raise SealError(f"{settings.held_out}: every puzzle in it is also trained on")
    return make(dict(puzzles[:size]), settings, held_out=rest)


def read(
    path: str,
    solutions: str | None,
    order_seed: int | None,
    setting: str = "task.arc.solutions",
) -> Puzzles:
    """Returns the puzzles of a file by id, all with solutions, in file order or shuffled.

    Args:
      setting: What names the file with solutions.

    Raises:
      SealError: names the file, or the task without a solution.
    """
    found = tasks.load(path, solutions)
    for one in found:
        if one.test.output is None:
            where = setting if solutions is None else solutions
            raise SealError(f"{path}: task {one.name} has no solution; see {where}")
    return tasks.puzzles(found if order_seed is None else tasks.shuffled(found, order_seed))


def make(
    puzzles: Puzzles,
    settings: config_lib.Task,
    *,
    held_out: Puzzles | None = None,
    name: str = "arc",
) -> Task:
    """Returns the task of given puzzles: by id, one ArcTask for each test input."""
    arc = settings.arc
    form = _form(arc)

    def rng(context: Context, purpose: str) -> np.random.RandomState:
        if arc.reference_quirks:
            return np.random.RandomState(settings.seed)
        return np.random.RandomState(_hash(settings.seed, context.id, purpose))

    def asked(context: Context) -> list[list[Query]]:
        draws = rng(context, "questions")
        return [
            predict.queries(
                one,
                draws,
                permute=arc.permutations,
                max_tokens=arc.max_tokens,
                count_tokens=form.count_tokens,
                reference_quirks=arc.reference_quirks,
            )
            for one in context.data
        ]

    def prompt(context: Context) -> str:
        return form.self_edit_prompt(context.data[0])

    def edit(context: Context, text: str) -> Edit:
        parsed = edits.parse_self_edit(text)
        shown = generate.augmented_tasks(
            context.data[0],
            parsed,
            rng(context, "examples"),
            max_examples=arc.max_examples,
            max_tokens=arc.max_tokens,
            count_tokens=form.count_tokens,
            reference_quirks=arc.reference_quirks,
        )
        pairs = (form.render(one) for one in shown)
        return Edit(
            examples=tuple(
                Example(prompt=question, completion=answer) for question, answer in pairs
            ),
            learning_rate=parsed.training.learning_rate,
            epochs=parsed.training.num_train_epochs,
            loss_on=parsed.loss_on,
        )

    def questions(context: Context) -> list[Question]:
        return [
            Question(
                *form.render(query.task), text=f"{query.task.name} {query.inverter or ''}".strip()
            )
            for group in asked(context)
            for query in group
        ]

    def grade(context: Context, answers: list[str]) -> Grade:
        groups = asked(context)
        if len(answers) != sum(map(len, groups)):
            raise SealError(f"{name}: {context.id} has {sum(map(len, groups))} questions")
        rest = iter(answers)
        solved, verdicts = [], []
        for one, group in zip(context.data, groups, strict=True):
            found = predict.predictions(group, [next(rest) for _ in group], form.parse)
            right = [p is not None and grids.same(p.grid, one.test.output) for p in found]
            attempts = voting.vote([p for p in found if p is not None])
            solved.append(any(grids.same(grid, one.test.output) for grid in attempts))
            verdicts += right
        return Grade(float(all(solved)), tuple(verdicts))

    return Task(
        contexts=_contexts(puzzles),
        prompt=prompt,
        edit=edit,
        questions=questions,
        grade=grade,
        held_out=_contexts(held_out or {}),
        references=_references(settings),
        name=name,
        grammar=syntax.self_edits() if arc.grammar else None,
    )


def _references(settings: config_lib.Task) -> dict[str, Callable[[Context], str | list[str]]]:
    """Returns what the policy's self-edits are compared with, by name."""
    form = settings.arc.format

    def random(context: Context) -> list[str]:
        rng = np.random.default_rng(_hash(settings.seed, context.id, "reference"))
        return [baselines.written(baselines.random(rng), form) for _ in range(baselines.RANDOM)]

    return {
        "random": random,
        "fixed": lambda context: baselines.fixed(form),
        "oracle": lambda context: baselines.grid(form),
    }


def _contexts(puzzles: Puzzles) -> tuple[Context, ...]:
    return tuple(Context(id=key, title=key, data=group) for key, group in puzzles.items())


def _form(arc: config_lib.Arc) -> Format:
    if arc.format == "compact":
        return Format(
            compact.render, compact.self_edit_prompt, compact.parse_grid, compact.count_tokens
        )
    if arc.reference_quirks:
        return Format(
            _as_reference, prompts.self_edit_prompt, _read_as_reference, prompts.count_tokens
        )
    return Format(_one_bos, _one_bos_edit, grids.parse_grid, prompts.count_tokens)


def _one_bos(task: ArcTask) -> tuple[str, str]:
    """Returns prompt and answer; a Llama tokenizer writes the BOS."""
    prompt, answer = prompts.render(task)
    return prompt.removeprefix(prompts.BOS), answer


def _one_bos_edit(task: ArcTask) -> str:
    return prompts.self_edit_prompt(task).removeprefix(prompts.BOS)


def _as_reference(task: ArcTask) -> tuple[str, str]:
    """Returns prompt and answer as the reference trains on them: ready for yet another answer."""
    prompt, answer = prompts.render(task)
    return prompt, answer + prompts.EOT + prompts.ASSISTANT if answer else ""


def _read_as_reference(reply: str) -> Grid | None:
    """Returns the grid in a reply up to the end of the turn, where the reference's engine stops."""
    return grids.decode_as_reference(reply.partition(prompts.EOT)[0])


def _hash(*parts: object) -> int:
    """Returns a seed that depends on the parts alone, in every process."""
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8], 16)
