"""Laws of the inner loop: many are as one, nobody touches a neighbour, the base has one copy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import provenance
import pytest
import toys

from seal_jax import inner, lanes, lora, optim, residents, sft
from seal_jax import slots as slots_lib
from seal_jax.config import Config, Inner, Lora, Sft
from seal_jax.slots import Slots

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(3)
RATE = 0.01
# Texts of 3 to 23 tokens: buckets of 16 and 24. Unequal numbers of texts, epochs and rates.
WRITTEN = [
    f"lr={RATE};epochs=3;" + ";".join(toys.text(n, (0, n)) for n in (20, 7, 4)),
    f"lr={RATE / 4};epochs=4;" + ";".join(toys.text(n, (1, n)) for n in (22, 5)),
    f"lr={RATE};epochs=1;" + toys.text(9, 2),
    "bad",
    f"lr={RATE};epochs=2;" + ";".join(f"{toys.text(4, (3, n))}>{toys.text(n, n)}" for n in (5, 16)),
]
STEPS = [9, 8, 1, 0, 4]
# Gradients have norms of 0.7 to 2.5: some are clipped, some are not.
SETTINGS = Inner(warmup_steps=2, weight_decay=0.01, clip=1.7, chunk=5)
CFG = Config(lora=Lora(rank=2, alpha=4.0, targets=("q", "v", "down")), inner=SETTINGS)

# Adam turns the rounding of a gradient near zero into a step of up to the learning rate, so states
# are compared in units of it; losses as float32 sums.
LOSS_CLOSE = dict(rtol=2e-5)
STATE_CLOSE = dict(rtol=0, atol=0.05 * RATE)


def run(params, written, chunk=5, **changes):
    """Returns adapters and losses, all five candidates in one program unless told otherwise."""
    settings = dataclasses.replace(SETTINGS, chunk=chunk, **changes)
    return inner.adapt_many(params, toys.batch(written, settings), KEY, CFG)


@pytest.fixture(scope="module")
def together(params):
    return run(params, WRITTEN)


@pytest.fixture(scope="module")
def fresh(params):
    """The adapters before the inner loop."""
    ids = np.array([c.id for c in toys.batch(WRITTEN).candidates], np.uint32)
    return inner.init_many(params.config, CFG.lora, KEY, ids)


def unlike(one: lora.Adapter, other: lora.Adapter) -> float:
    """Returns the largest difference between two adapters."""
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), one, other)
    return max(jax.tree.leaves(gaps))


def test_vmap_equals_one_candidate_at_a_time(params, fresh, together):
    adapters, losses = together
    chunk = next(slots_lib.arrange(toys.batch(WRITTEN, SETTINGS), 5, KEY))
    one = jax.jit(functools.partial(inner.adapt, settings=inner.loop_settings(SETTINGS)))
    for at, index in enumerate(chunk.index):
        axes = {name: None if name in slots_lib.SHARED else at for name in inner._AXES}
        alone = Slots(
            **{
                name: jax.tree.map(lambda x, a=axis: x if a is None else x[a], value)
                for name, axis in axes.items()
                for value in [getattr(chunk.slots, name)]
            }
        )
        adapter, measures = one(params, lora.take(fresh, index), alone)
        n = STEPS[index]
        np.testing.assert_allclose(losses[index][:n], measures.loss[:n], **LOSS_CLOSE)
        chex.assert_trees_all_close(lora.take(adapters, index), adapter, **STATE_CLOSE)
        if n > 1:  # the first step of the warm-up has rate 0
            assert unlike(adapter, lora.take(fresh, index)) > RATE / 4


def test_all_that_the_loop_reads_reaches_it_and_nothing_else_makes_another_program():
    read = dict(schedule="constant", warmup_steps=3, weight_decay=0.2, clip=0.5)
    for of, settings in ((inner.loop_settings, Inner), (sft.program, Sft)):
        assert of(settings(**read, learning_rate=0.1, epochs=9, batch_size=4)) == settings(**read)


def test_losses_are_given_for_the_steps_taken_and_nan_after(together):
    _, losses = together
    for row, n in zip(losses, STEPS, strict=True):
        assert np.isfinite(row[:n]).all() and np.isnan(row[n:]).all()
    assert losses[0][6:9].mean() < losses[0][:3].mean()  # an epoch of three texts


def test_no_nan_is_made_on_the_way(params, together):
    with jax.debug_nans(True):
        adapters, losses = run(params, WRITTEN, chunk=5)
    chex.assert_trees_all_equal((adapters, losses), together)


def test_the_chunk_size_changes_nothing(params, together):
    adapters, losses = run(params, WRITTEN, chunk=2)  # the last chunk holds one, and a filler
    for i, n in enumerate(STEPS):
        np.testing.assert_allclose(losses[i][:n], together[1][i][:n], **LOSS_CLOSE)
    chex.assert_trees_all_close(adapters, together[0], **STATE_CLOSE)


def test_more_candidates_than_move_at_once_train_like_few(params):
    count = residents._MOVES + 3
    written = [f"lr={RATE};epochs=2;" + toys.text(5 + n, (9, n)) for n in range(count)]
    adapters, losses = run(params, written, chunk=count)  # all are resident from the start
    few, of_few = run(params, written, chunk=2)
    np.testing.assert_allclose(losses, of_few, **LOSS_CLOSE)
    chex.assert_trees_all_close(adapters, few, **STATE_CLOSE)


def test_learning_rate_0_changes_nothing_to_the_last_bit(params, fresh):
    written = [WRITTEN[0].replace(f"lr={RATE}", "lr=0"), *WRITTEN[1:]]
    adapters, losses = run(params, written)
    chex.assert_trees_all_equal(lora.take(adapters, 0), lora.take(fresh, 0))
    chex.assert_trees_all_equal(lora.take(adapters, 3), lora.take(fresh, 3))  # "bad": no steps
    assert np.isfinite(losses[0][:9]).all()
    assert unlike(lora.take(adapters, 1), lora.take(fresh, 1)) > RATE / 8


@pytest.mark.parametrize(
    ("change", "finite"),
    [((toys.text(7, (0, 7)), toys.text(7, "other")), True), ((f"lr={RATE};", "lr=1e38;"), False)],
    ids=["other data", "divergence"],
)
def test_a_neighbour_is_untouched_to_the_last_bit(params, together, change, finite):
    assert change[0] in WRITTEN[0]
    written = [WRITTEN[0].replace(*change), *WRITTEN[1:]]
    adapters, losses = run(params, written)
    others = [1, 2, 3, 4]
    chex.assert_trees_all_equal(lora.take(adapters, others), lora.take(together[0], others))
    np.testing.assert_array_equal(losses[1:], together[1][1:])
    assert not np.array_equal(losses[0][:9], together[1][0][:9])
    diverged = inner.diverged(toys.batch(written, SETTINGS), adapters, losses)
    np.testing.assert_array_equal(diverged, [not finite, False, False, False, False])


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 6), (2, 4), (0, 2)])
def test_who_has_diverged_is_seen_in_every_step_and_after_the_last(batch_size, steps):
    written = ["epochs=2;" + ";".join(toys.text(4, i) for i in range(3))] * 4
    batch = toys.batch(written, Inner(batch_size=batch_size))
    losses = np.where(np.arange(9) < steps, 1.0, np.full((4, 9), np.nan))
    losses[1, 0] = losses[2, steps - 1] = np.nan
    adapters = lora.stack([toys.adapter(toys.config("qwen2"))] * 4)
    adapters = adapters.replace(b=adapters.b | {"q": adapters.b["q"].at[3].add(np.inf)})
    assert inner.diverged(batch, adapters, losses).tolist() == [False, True, True, True]


def run_lanes(params, written, packed):
    batch = toys.batch(written, SETTINGS)
    (chunk,) = lanes.arrange(batch, 0, KEY, packed=packed)
    ids = np.array([batch.candidates[i].id if i >= 0 else 0 for i in chunk.index], np.uint32)
    static = {"settings": inner.loop_settings(SETTINGS), "remat": False}
    adapters, losses = residents.run(params, chunk.slots, ids, KEY, CFG.lora, **static)
    back = np.argsort(chunk.index)[-len(written) :]
    return lora.take(adapters, back), np.asarray(losses)[back]


def run_lockstep(params, fresh, written):
    chunk = next(slots_lib.arrange(toys.batch(written, SETTINGS), len(written), KEY))
    static = {"settings": inner.loop_settings(SETTINGS), "remat": False}
    start = lora.take(fresh, list(chunk.index))
    _, measures = inner.adapt_slots(params, start, chunk.slots, **static)
    return np.asarray(measures.loss)[np.argsort(chunk.index)]


def test_who_has_diverged_does_not_depend_on_the_layout(params, fresh):
    """A rate of 1e4: a model as small as this one still makes numbers of such adapters."""
    text = ";".join(toys.text(7, (0, j)) for j in range(4))
    written = [f"lr={rate};{text}" for rate in (1e4, 1, RATE, RATE, RATE)]
    steps = np.array([2, 4, 4, 4, 4])  # the first is taken at a rate of 0
    expected = np.arange(4) < steps[:, None]
    for losses in (
        run_lanes(params, written, packed=True)[1],
        run_lanes(params, written, packed=False)[1],
        run_lockstep(params, fresh, written),
    ):
        np.testing.assert_array_equal(np.isfinite(losses[:, :4]), expected)


def test_who_diverges_in_a_shared_row_leaves_its_neighbours_alone(params):
    """As on accelerators, where rows hold steps of several candidates."""
    texts = [";".join(toys.text(7, (i, j)) for j in range(3)) for i in range(6)]
    bad = [f"lr=1e38;{texts[0]}", *texts[1:]]

    adapters, losses = run_lanes(params, texts, packed=True)
    found, seen = run_lanes(params, bad, packed=True)
    n = len(texts)
    assert np.isfinite(losses[:, :3]).all() and not np.isfinite(seen[0][:3]).all()
    chex.assert_trees_all_equal(lora.take(found, range(1, n)), lora.take(adapters, range(1, n)))
    np.testing.assert_array_equal(seen[1:], losses[1:])


def test_each_candidate_follows_its_own_schedule(params, fresh):
    batch = toys.batch(WRITTEN, SETTINGS)
    chunk = next(slots_lib.arrange(batch, 5, KEY))
    settings = inner.loop_settings(SETTINGS)
    start = lora.take(fresh, list(chunk.index))
    _, measures = inner.adapt_slots(params, start, chunk.slots, settings=settings, remat=False)
    for at, index in enumerate(chunk.index):
        n, peak = STEPS[index], batch.candidates[index].learning_rate
        expected = [peak * (i / 2 if i < 2 else 1 - (i - 2) / (n - 2)) for i in range(n)]
        np.testing.assert_allclose(measures.learning_rate[at][:n], expected, rtol=1e-6)
        assert not measures.learning_rate[at][n:].any()
        assert (measures.grad_norm[at][:n] > 0).all()


def test_all_texts_in_one_step_are_packed_without_a_trace():
    params = toys.params(toys.config(n_layers=1))
    lengths = (9, 7, 5)
    written = "epochs=1;" + ";".join(toys.text(n, n) for n in lengths)
    batch = toys.batch([written], dataclasses.replace(SETTINGS, batch_size=0))
    _, losses = inner.adapt_many(params, batch, KEY, CFG)
    rows, weights = np.zeros((2, 3, 10), np.int32)
    for i, text in enumerate(batch.candidates[0].texts):
        rows[i, : lengths[i] + 1] = text.tokens
        weights[i, 1 : lengths[i] + 1] = 1
    ids = np.array([batch.candidates[0].id], np.uint32)
    start = lora.take(inner.init_many(params.config, CFG.lora, KEY, ids), 0)
    apart = jax.jit(optim.loss)(params, start, rows, weights)
    np.testing.assert_allclose(losses[0], [apart], **LOSS_CLOSE)


def test_a_second_call_of_the_same_shape_compiles_nothing(params, together):
    before = inner.adapt_slots._cache_size()
    other = [w.replace(f"lr={RATE}", "lr=0.003") for w in WRITTEN]
    run(params, [*other[:2], "bad", f"epochs=3;{toys.text(14, 1)}", f"epochs=4;{toys.text(3, 1)}"])
    assert inner.adapt_slots._cache_size() == before
    run(params, WRITTEN * 3)  # three chunks
    assert inner.adapt_slots._cache_size() <= before + 1


def test_the_base_weights_never_gain_a_candidate_axis(params):
    c = 5  # no dimension of the toy model is 5
    batch = toys.batch(WRITTEN, SETTINGS)
    chunk = next(slots_lib.arrange(batch, c, KEY))
    settings, config = inner.loop_settings(SETTINGS), params.config
    adapters = jax.vmap(lambda key: lora.init(config, CFG.lora, key))(jax.random.split(KEY, c))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    many = functools.partial(inner.adapt_slots, settings=settings)
    found = provenance.uses(many, names, params, adapters, chunk.slots)
    assert all(found.values()), "a weight is not used at all: this test would see nothing"
    assert {n: s for n, shapes in found.items() for s in shapes if c in s} == {}

    # Negative control: with a base of its own for each candidate, every weight is reported.
    def wasteful(params, adapters, slots):
        one = functools.partial(inner.adapt, settings=settings)
        return jax.vmap(one, in_axes=(0, 0, Slots(**inner._AXES)))(params, adapters, slots)

    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (c, *x.shape)), params)
    found = provenance.uses(wasteful, names, copies, adapters, chunk.slots)
    assert all(any(c in shape for shape in shapes) for shapes in found.values())


def test_no_gradient_of_a_base_weight_is_ever_formed(params, adapter):
    tokens_bt, weights_bt = toys.tokens(2, 9), np.ones((2, 9), np.int8)
    products = set()

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                products.add(eqn.outvars[0].aval.shape)
            for value in eqn.params.values():
                for body in value if isinstance(value, tuple) else (value,):
                    body = getattr(body, "jaxpr", body)
                    if hasattr(body, "eqns"):
                        collect(body)

    weights = {
        shape for x in jax.tree.leaves(params.layers) for shape in [x.shape[1:]] if len(shape) > 1
    }
    weights |= {x[::-1] for x in weights}
    whole = lambda params, a: optim.loss(params, a, tokens_bt, weights_bt)
    collect(jax.make_jaxpr(jax.grad(whole, argnums=1))(params, adapter).jaxpr)
    assert not products & weights
    collect(jax.make_jaxpr(jax.grad(whole, argnums=0))(params, adapter).jaxpr)
    assert products & weights, "negative control"


def test_a_fresh_adapter_depends_on_the_candidate_alone(params, fresh):
    config, ids = params.config, [c.id for c in toys.batch(WRITTEN).candidates]
    assert len(set(ids)) == 5
    some = inner.init_many(config, CFG.lora, KEY, np.array([ids[3], ids[0]], np.uint32))
    chex.assert_trees_all_equal(some, lora.take(fresh, [3, 0]))
    assert unlike(lora.take(fresh, 0), lora.take(fresh, 3)) > 0.1
