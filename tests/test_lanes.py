"""Laws of lanes: the same steps in the same order as in lockstep, one at a time, little padded."""

import collections
import functools

import chex
import jax
import numpy as np
import pytest
import toys

from seal_jax import batching, inner, lanes, residents, rewards, visits
from seal_jax import slots as slots_lib
from seal_jax.config import ALL_TARGETS, Inner, Lora

KEY = jax.random.key(5)
WRITTEN = [
    ";".join(toys.text(n, (who, n)) for n in lengths) + f";epochs={epochs}"
    for who, (lengths, epochs) in enumerate(
        [((9, 30, 4), 3), ((12,), 1), ((50, 3, 8, 20, 21), 2), ((6, 6), 4), ((17, 90), 0)]
    )
] + ["bad"]
EVEN = [";".join(toys.text(14, (who, n)) for n in range(4)) + ";epochs=2" for who in range(3)]


def taken(batch: batching.Batch, chunk: int, tokens: int, packed=None) -> dict[int, list[list]]:
    """Returns the texts of each step of every candidate, in the order in which it takes them."""
    found: dict[int, list[list]] = {i: [] for i in range(len(batch))}
    for part in lanes.arrange(batch, chunk, KEY, tokens, packed):
        for visit in part.slots.visits:
            for i, j, _ in visit.lanes:
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


@pytest.mark.parametrize("batch_size", [1, 2, 0])
@pytest.mark.parametrize(("chunk", "tokens"), [(2, 64), (4, 256), (3, 1024), (0, 4096)])
def test_packed_steps_and_their_order_are_those_of_lockstep(batch_size, chunk, tokens):
    batch = toys.batch(WRITTEN, Inner(batch_size=batch_size))
    assert taken(batch, chunk, tokens, packed=True) == in_lockstep(batch)


# Long prompts, which are not predicted, and short texts, which are.
ASKED = [";".join(f"{toys.text(70 + n, n)}>{n}" for n in range(1, 5))] * 6 + EVEN * 2


@pytest.mark.parametrize("written", [WRITTEN * 3, ASKED], ids=["texts", "prompts"])
@pytest.mark.parametrize(("chunk", "tokens"), [(2, 64), (3, 512), (16, 1024)])
def test_in_packed_calls_every_step_fits_and_places_are_left_when_done(chunk, tokens, written):
    batch = toys.batch(written, Inner(batch_size=2))
    for part in lanes.arrange(batch, chunk, KEY, tokens, packed=True):
        home, done = {}, []
        for move in part.slots.start:
            home[move.enters] = move.resident
        for visit in part.slots.visits:
            rows = [[] for _ in range(visit.width)]
            places = {lane.at for lane in visit.lanes}
            assert len(places) == len(visit.lanes)
            assert places <= set(range(visit.width * visit.size.places))
            assert len(home) <= chunk and {lane.candidate for lane in visit.lanes} <= set(home)
            for i, j, at in visit.lanes:
                rows[at // visit.size.places].append(part.slots.steps[i][j])
            for row in rows:
                assert len(row) <= visit.size.places
                assert sum(map(visits.tokens_of, row)) <= visit.size.t
                assert sum(map(visits.counted, row)) <= visit.size.predicted
            for resident, leaves, enters in visit.moves:
                assert home.pop(leaves) == resident
                done.append(leaves)
                if enters >= 0:
                    home[enters] = resident
        assert not home
        assert sorted(done) == list(np.flatnonzero(part.slots.total_c))


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_reckoned_by_the_call_with_the_most_tokens(packed):
    for batch_size, chunk, tokens in ((1, 1, 64), (2, 2, 64), (2, 4, 256), (0, 16, 1024)):
        batch = toys.batch(WRITTEN * 3, Inner(batch_size=batch_size))
        parts = list(lanes.arrange(batch, chunk, KEY, tokens, packed))
        call, slots = lanes.largest_call(batch, chunk, tokens, packed), parts[0].slots
        assert (call.residents, call.chunk, call.room) == (
            slots.residents,
            len(parts[0].index),
            slots.room,
        )
        planned = [v for part in parts for v in part.slots.visits]
        assert call.width * call.size.rows * call.size.t >= max(v.tokens for v in planned)
        most = max(v.width * v.size.rows * v.size.predicted for v in planned)
        assert call.width * call.size.rows * call.size.predicted >= most


def test_packed_calls_are_few_shapes_and_well_filled():
    rng = np.random.default_rng(0)
    written = [
        ";".join(toys.text(int(n), (who, k)) for k, n in enumerate(rng.integers(8, 60, 8)))
        for who in range(64)
    ]
    parts = list(lanes.arrange(toys.batch(written, Inner(epochs=4)), 16, KEY, 1024, packed=True))
    shapes = {(v.width, v.size) for part in parts for v in part.slots.visits}
    assert len(shapes) <= 2
    assert sum(p.useful for p in parts) > 0.85 * sum(p.processed for p in parts)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("targets", [("q", "v"), ALL_TARGETS])
@pytest.mark.parametrize(
    ("written", "settings", "chunk", "tokens", "width", "places"),
    [
        (WRITTEN, Inner(), 2, 256, 1, 2),
        (EVEN, Inner(batch_size=2), 2, 16, 1, 1),
        (WRITTEN, Inner(batch_size=2, pad_loss=True, max_length=60), 8, 512, 2, 4),
    ],
)
def test_packed_calls_train_as_lanes_of_their_own(
    params, targets, written, settings, chunk, tokens, width, places
):
    """Steps beside others' in a row, places taken over: the same adapters and losses."""
    batch = toys.batch(written, settings)
    ids = np.array([c.id for c in batch.candidates], np.uint32)
    own = Lora(rank=2, alpha=4.0, targets=targets)

    def trained(parts, remat):
        found = {}
        for part in parts:
            some = np.where(part.index >= 0, ids[part.index], 0).astype(np.uint32)
            program = {"settings": inner.loop_settings(settings), "remat": remat}
            adapters, losses = residents.run(params, part.slots, some, KEY, own, **program)
            for at, i in enumerate(part.index):
                if i >= 0:
                    found[int(i)] = jax.tree.map(lambda x, at=at: x[at], (adapters, losses))
        return found

    packed = list(lanes.arrange(batch, chunk, KEY, tokens, packed=True))
    calls = [visit for part in packed for visit in part.slots.visits]
    assert {v.size.places for v in calls} == {places} and max(v.width for v in calls) == width
    together, apart = trained(packed, True), trained(lanes.arrange(batch, 0, KEY), False)
    assert apart.keys() == together.keys() == set(range(len(batch)))
    for i, (adapter, losses) in apart.items():
        np.testing.assert_allclose(together[i][1], losses, rtol=2e-5)
        close = dict(rtol=0, atol=0.05 * settings.learning_rate)
        chex.assert_trees_all_close(together[i][0], adapter, **close)


@pytest.mark.parametrize(("chunk", "tokens"), [(2, 64), (0, 256)])
def test_a_call_takes_one_step_of_a_candidate_and_every_step_fits(chunk, tokens):
    batch = toys.batch(WRITTEN, Inner(batch_size=2))
    for part in lanes.arrange(batch, chunk, KEY, tokens):
        for visit in part.slots.visits:
            who = [i for i, _, _ in visit.lanes]
            assert len(set(who)) == len(who) <= visit.width
            for i, j, _ in visit.lanes:
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
    assert {width * size.rows * size.t for width, size in sizes} <= {40, 48, 64}
    assert len(sizes) <= 4


@pytest.mark.parametrize("length", [1, 24, 25, 768, 769, 1024, 5000])
def test_a_size_holds_the_steps_it_is_for(length):
    text = batching.Text(np.ones(length, np.int32), np.ones(length, np.int8), length)
    for rows in (1, 2, 3, 8):
        size = visits.size_of([[text]] * rows)
        assert rows <= size.rows < 2 * rows and length <= size.predicted <= size.t
        assert size.t <= max(24, 1.35 * length)


def test_a_size_of_few_steps_joins_a_larger_one_unless_it_is_worth_its_program():
    size = lambda rows, t, predicted: visits.Size(rows, t, predicted)
    steps = {size(1, 24, 24): 100, size(1, 32, 32): 2, size(1, 96, 24): 50, size(1, 96, 96): 3}
    steps |= {size(2, 48, 48): 1}
    for program, left in ((0, 5), (190, 5), (200, 4), (1700, 4), (2000, 3), (1e6, 2)):
        found = visits.few(steps, visits.Price(program, 0.5))
        assert found.keys() == steps.keys() and len(set(found.values())) == left
        for own, other in found.items():
            assert all(a <= b for a, b in zip(own, other, strict=True))
            assert other.t in {x.t for x in steps} and other.rows in {x.rows for x in steps}
    steps = {size(1, 96, 24): 50, size(1, 96, 96): 3}
    for predicted, left in ((0.1, {size(1, 96, 96)}), (0.5, set(steps))):  # 360 and 1,800 tokens
        assert set(visits.few(steps, visits.Price(1000, predicted)).values()) == left


@pytest.mark.parametrize("program", [50, 1e9])
def test_shared_programs_take_the_same_steps_in_sizes_that_no_chunk_changes(program):
    batch = toys.batch(WRITTEN, Inner(batch_size=2))
    price, sizes = visits.Price(program, 0.2), []
    for chunk in (1, 2, 4):
        parts = list(lanes.arrange(batch, chunk, KEY, 16, price=price))
        sizes.append({v.size for part in parts for v in part.slots.visits})
        found = {i: [] for i in range(len(batch))}
        for part in parts:
            for visit in part.slots.visits:
                for i, j, _ in visit.lanes:
                    rows = part.slots.steps[i][j]
                    assert all(
                        a <= b for a, b in zip(visits.size_of(rows), visit.size, strict=True)
                    )
                    found[int(part.index[i])].append([tuple(x.tokens) for r in rows for x in r])
        assert found == taken(batch, chunk, 16)
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(sizes[0]) < len(
        {visits.size_of(x) for part in parts for s in part.slots.steps for x in s}
    )


def test_useful_and_processed_tokens_are_counted():
    batch = toys.batch(WRITTEN)
    parts = list(lanes.arrange(batch, 2, KEY, 64))
    every = [step for steps in taken(batch, 2, 64).values() for step in steps]
    assert sum(part.useful for part in parts) == sum(len(x) for step in every for x in step)
    for part in parts:
        size = sum(v.width * v.size.rows * v.size.t for v in part.slots.visits)
        assert part.processed == size >= part.useful
    total = functools.reduce(rewards.Efficiency.plus, parts, rewards.Efficiency())
    assert total.active == len(every)
    assert total[:2] == (sum(part.useful for part in parts), sum(part.processed for part in parts))
    assert total.executed == sum(v.width for part in parts for v in part.slots.visits)
