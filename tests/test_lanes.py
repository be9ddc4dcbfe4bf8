"""Laws of lanes: the same steps in the same order as in lockstep, one at a time, little padded."""

import collections

import jax
import numpy as np
import pytest
import toys

from seal_jax import batching, lanes
from seal_jax import slots as slots_lib
from seal_jax.config import Inner

KEY = jax.random.key(5)
WRITTEN = [
    ";".join(toys.text(n, (who, n)) for n in lengths) + f";epochs={epochs}"
    for who, (lengths, epochs) in enumerate(
        [((9, 30, 4), 3), ((12,), 1), ((50, 3, 8, 20, 21), 2), ((6, 6), 4), ((17, 90), 0)]
    )
] + ["bad"]


def taken(batch: batching.Batch, chunk: int, tokens: int) -> dict[int, list[list]]:
    """Returns the texts of each step of every candidate, in the order in which it takes them."""
    found: dict[int, list[list]] = {i: [] for i in range(len(batch))}
    for part in lanes.arrange(batch, chunk, KEY, tokens):
        for visit in part.slots.visits:
            for i, j in visit.lanes:
                rows = part.slots.steps[i][j]
                found[int(part.index[i])].append([tuple(x.tokens) for row in rows for x in row])
    return found


def in_lockstep(batch: batching.Batch) -> dict[int, list[list]]:
    """Returns the same of `slots`."""
    found: dict[int, list[list]] = {i: [] for i in range(len(batch))}
    for part in slots_lib.arrange(batch, 0, KEY):
        slots = part.slots
        for at, index in enumerate(part.index):
            for i in np.flatnonzero(slots.active_ci[at]):
                place = (at, slots.row_i[i])
                tokens, segments = (
                    x[slots.bucket_i[i]][place] for x in (slots.tokens, slots.segments)
                )
                texts = [
                    tuple(row[own == n])
                    for row, own in zip(tokens, segments, strict=True)
                    for n in range(1, own.max() + 1)
                ]
                found[int(index)].append(texts)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 0])
@pytest.mark.parametrize(("chunk", "tokens"), [(1, 16), (2, 64), (4, 256), (0, 4096)])
def test_steps_and_their_order_are_those_of_lockstep(batch_size, chunk, tokens):
    batch = toys.batch(WRITTEN, Inner(batch_size=batch_size))
    assert taken(batch, chunk, tokens) == in_lockstep(batch)


@pytest.mark.parametrize(("chunk", "tokens"), [(2, 64), (0, 256)])
def test_a_call_takes_one_step_of_a_candidate_and_every_step_fits(chunk, tokens):
    batch = toys.batch(WRITTEN, Inner(batch_size=2))
    for part in lanes.arrange(batch, chunk, KEY, tokens):
        for visit in part.slots.visits:
            who = [i for i, _ in visit.lanes]
            assert len(set(who)) == len(who) <= visit.width
            for i, j in visit.lanes:
                step = part.slots.steps[i][j]
                assert len(step) <= visit.size.rows
                assert max(sum(len(x.tokens) for x in row) for row in step) <= visit.size.t
                counted = max(sum(np.count_nonzero(x.weights) for x in row) for row in step)
                assert counted <= visit.size.predicted


def test_a_program_is_named_by_its_size_alone():
    """Other texts and another number of them run in programs of the same few sizes."""
    sizes = collections.Counter()
    for seed in range(3):
        written = [
            ";".join(toys.text(n, (seed, who, n)) for n in range(5, 40, 3 + seed)) + ";epochs=2"
            for who in range(6)
        ]
        for part in lanes.arrange(toys.batch(written), 4, KEY, 64):
            sizes.update((v.width, v.size) for v in part.slots.visits)
            assert part.slots.room == 512 and len(part.index) == 4
    assert {width * size.rows * size.t for width, size in sizes} <= {48, 64}
    assert len(sizes) <= 4


def test_useful_and_processed_tokens_are_counted():
    batch = toys.batch(WRITTEN)
    parts = list(lanes.arrange(batch, 2, KEY, 64))
    every = [step for steps in taken(batch, 2, 64).values() for step in steps]
    assert sum(part.useful for part in parts) == sum(len(x) for step in every for x in step)
    for part in parts:
        size = sum(v.width * v.size.rows * v.size.t for v in part.slots.visits)
        assert part.processed == size >= part.useful
