"""Tiny grids: few-shot tasks from procedural rules, and sequences for a tiny model to learn from.

Everything is drawn from a seed. Rule families of the RL tasks and of the held-out tasks are in no
pretraining sequence; the two kinds share none either.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seal_jax import config as config_lib
from seal_jax.tasks import Task
from seal_jax.tasks.arc import baselines, compact
from seal_jax.tasks.arc import task as arc_task
from seal_jax.tasks.arc.grids import Grid
from seal_jax.tasks.arc.tasks import ArcTask, Pair
from seal_jax.tiny import grid_tokens, rules
from seal_jax.tiny.rules import Family, Rng

DEMONSTRATIONS = 3
TRAIN_TASKS, HELD_OUT_TASKS = 18, 25
FILTERED = Path(__file__).parent / "grid_tasks.json"
OUTPUT_WEIGHT, FIRST_OUTPUT_WEIGHT, INPUT_WEIGHT, EDIT_WEIGHT = 1.0, 0.3, 0.05, 0.5
"""Weights in the loss of pretraining; nothing tells the first output, so it counts less."""
SELF_EDITS, LARGE = 0.4, 0.2
"""Shares of sequences that end in a self-edit, and of tasks with sides up to 6 (else 3 by 3)."""
SMALL_FIRST = 100_000
"""So many sequences are all 3 by 3: copying cells is learned there, at a third of the cost."""
MALFORMED = 0.06
"""Share of self-edits that are no valid JSON of the schema."""


def make_task(
    family: Family, rng: Rng, shape: tuple[int, int], pairs: int = DEMONSTRATIONS + 1
) -> tuple[Pair, ...]:
    """Returns pairs that follow one rule of a family; the last shows no new colour.

    Inputs differ from each other, and at least half of the outputs from their inputs.
    """
    while True:
        palette = [0, *(1 + rng.permutation(9)[: rng.integers(2, 4)]).tolist()]
        rule = family.draw(rng, shape, palette)
        black = rng.uniform(0.3, 0.6) if family.black else rng.uniform(0.1, 0.5)
        vary = not family.fixed and rng.random() < 0.1
        made: list[Pair] = []
        for _ in range(pairs):
            size = tuple(rng.permutation(shape).tolist()) if vary else shape
            grid = _input(rng, size, palette, black)
            made.append(Pair(grid, np.ascontiguousarray(rule(grid), np.int8)))
        if _good(made):
            return tuple(made)


def _input(rng: Rng, shape: tuple[int, ...], palette: list[int], black: float) -> Grid:
    colours = rng.choice(palette[1:], shape)
    return np.where(rng.random(shape) < black, 0, colours).astype(np.int8)


def _good(pairs: list[Pair]) -> bool:
    seen = set().union(*(np.unique(pair.input).tolist() for pair in pairs[:-1]))
    changed = sum(not np.array_equal(*pair) for pair in pairs)
    inputs = {(pair.input.shape, pair.input.tobytes()) for pair in pairs}
    return (
        set(np.unique(pairs[-1].input).tolist()) <= seen
        and not np.array_equal(*pairs[-1])
        and 2 * changed >= len(pairs)
        and len(inputs) == len(pairs)
    )


def shape(rng: Rng, large: float) -> tuple[int, int]:
    """Returns 3 by 3, or with probability `large` any shape of sides 3 to 6 but that."""
    if rng.random() >= large:
        return 3, 3
    sides = [size for size in itertools.product(range(3, 7), repeat=2) if size != (3, 3)]
    height, width = sides[rng.integers(len(sides))]
    return height, width


def puzzle(key: str) -> tuple[ArcTask, ...]:
    """Returns the 3 by 3 puzzle that a key names: its family, seed and number."""
    name, seed, number = key.rsplit("-", 2)
    family = next(group[name] for group in rules.SPLITS.values() if name in group)
    rng = _rng("task", name, int(seed), int(number))
    *train, test = make_task(family, rng, (3, 3))
    return (ArcTask(tuple(train), test, key),)


def puzzles(split: str, count: int, seed: int = 0) -> arc_task.Puzzles:
    """Returns puzzles of a split by key; its families take turns."""
    names = list(rules.SPLITS[split])
    keys = [f"{names[i % len(names)]}-{seed}-{i // len(names)}" for i in range(count)]
    return {key: puzzle(key) for key in keys}


def filtered(split: str) -> arc_task.Puzzles:
    """Returns the puzzles that are as hard as the paper's: failed in-context, solved by some edit.

    They are listed in grid_tasks.json, made by `benchmarks/filter_grids.py`.
    """
    return {key: puzzle(key) for key in json.loads(FILTERED.read_text())[split]}


def task(settings: config_lib.Task) -> Task:
    """Returns the tiny grids as a task: puzzles to train on, others held out.

    They are the filtered ones where there is a list and `size` is within it, and `seed` is 0; else
    puzzles are taken as they are drawn.
    """
    compact_arc = dataclasses.replace(settings.arc, format="compact")
    size = settings.size or TRAIN_TASKS
    listed = not settings.seed and FILTERED.exists()
    train = filtered("rl") if listed else {}
    held_out = filtered("held_out") if listed else {}
    if size > len(train):
        train = puzzles("rl", size, settings.seed)
        held_out = puzzles("held_out", HELD_OUT_TASKS, settings.seed)
    return arc_task.make(
        dict(list(train.items())[:size]),
        dataclasses.replace(settings, arc=compact_arc),
        held_out=held_out,
        name="tiny-grids",
    )


def edit_words(rng: Rng) -> list[str]:
    """Returns the words of a random self-edit: what the base policy writes."""
    words = compact.edit_text(baselines.random(rng)).split()
    if rng.random() >= MALFORMED:
        return words
    at = int(rng.integers(1, len(words) - 1))
    damage = rng.integers(3)
    if damage == 0:
        return words[:at] + words[at + 1 :]
    if damage == 1:
        return words[:at]
    return words[:at] + words[at : at + 1] * 2 + words[at + 1 :]


def sequence(
    rng: Rng, self_edits: float = SELF_EDITS, large: float = LARGE
) -> tuple[list[str], list[float]]:
    """Returns the words of a pretraining sequence, and the weight in the loss of each.

    Two to five pairs of one task; then, with probability `self_edits`, a random self-edit.
    """
    names = list(rules.PRETRAINING)
    family = rules.PRETRAINING[names[rng.integers(len(names))]]
    count = int(rng.choice([2, 3, 4, 5], p=[0.1, 0.4, 0.4, 0.1]))
    words: list[str] = []
    weights: list[float] = []
    pairs = make_task(family, rng, shape(rng, large), count)
    while max(side for pair in pairs for grid in pair for side in grid.shape) > compact.PLACES:
        pairs = make_task(family, rng, shape(rng, large), count)
    for i, pair in enumerate(pairs):
        asked, answer = compact.pair_words(pair)
        words += asked + answer
        weights += [INPUT_WEIGHT] * len(asked)
        weights += [OUTPUT_WEIGHT if i else FIRST_OUTPUT_WEIGHT] * len(answer)
    weights[0] = 0.0  # nothing comes before it
    if rng.random() < self_edits:
        edit = [*edit_words(rng), compact.END]
        words += [compact.EDIT, *edit]
        weights += [0.0] + [EDIT_WEIGHT] * len(edit)
    return words, weights


def pretraining_sequences(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields token ids and their weights in the loss, without end; the seed decides all."""
    for i in itertools.count():
        large = LARGE if i >= SMALL_FIRST else 0.0
        words, weights = sequence(_rng("sequence", seed, i), large=large)
        yield np.array(grid_tokens.encode(words), np.int32), np.array(weights, np.float32)


def _rng(*parts: object) -> Rng:
    """Returns a generator that depends on the parts alone, in every process."""
    return np.random.default_rng(list(hashlib.sha256(json.dumps(parts).encode()).digest()))
