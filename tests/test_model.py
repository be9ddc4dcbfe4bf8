"""Laws of the decoder: causal, blind across texts, and the same with a cache."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from seal_jax import attention, model, readers, rotary

pytestmark = pytest.mark.usefixtures("quick_compile")

# float32 on one CPU: sums of up to 40 products in another order.
CLOSE = dict(rtol=2e-5, atol=2e-5)

forward = toys.forward


def test_no_token_sees_a_later_one(family):
    t, watched = 8, 4
    config = toys.config(family, tied=False)
    params = toys.params(config)
    adapter = toys.adapter(config)
    tokens_bt = jnp.arange(1, t + 1)[None]  # each position has an embedding of its own

    @jax.jit
    def sensitivity(embed):
        logits = lambda embed: model.forward(params.replace(embed=embed), adapter, tokens_bt)
        return jax.grad(lambda embed: jnp.sum(jnp.sin(logits(embed)[0, watched])))(embed)

    seen_t = np.abs(sensitivity(params.embed)[tokens_bt[0]]).max(-1)
    assert (seen_t[: watched + 1] > 1e-6).all(), "an earlier token has no influence"
    assert (seen_t[watched + 1 :] == 0).all(), "a later token has influence"


def test_packed_texts_are_read_as_if_alone(family, models):
    params = models[family]
    adapter = toys.adapter(params.config)
    lengths = (5, 3, 4)
    row = toys.tokens(1, 14)
    segments = np.zeros((1, 14), np.int32)
    segments[0, :12] = np.repeat([1, 2, 3], lengths)
    packed = forward(params, adapter, row, segments)
    for start, size in zip((0, 5, 8), lengths, strict=True):
        alone = forward(params, adapter, row[:, start : start + size])
        chex.assert_trees_all_close(packed[:, start : start + size], alone, **CLOSE)


def test_padding_is_seen_by_nobody_and_trained_padding_sees_its_text(params):
    row = toys.tokens(1, 9)
    other = row.copy()
    other[0, 6:] = 1
    segments = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    before, after = (forward(params, None, x, segments) for x in (row, other))
    chex.assert_trees_all_equal(before[:, :6], after[:, :6])
    # -1 is the reference's trained padding: pad i sees the text, but neither itself nor other pads,
    # and has its own position; so the others of its kind can be changed without a trace.
    trained = np.array([[1, 1, 1, 1, 1, 1, -1, -1, -1]])
    last = row.copy()
    last[0, 6:8] = 1
    before, after = (forward(params, None, x, trained) for x in (row, last))
    chex.assert_trees_all_equal(before[:, 8], after[:, 8])
    first = row.copy()
    first[0, 0] = 36 - first[0, 0]
    assert np.abs(forward(params, None, first, trained) - before)[0, 8].max() > 1e-3


def test_a_query_that_sees_nothing_gives_finite_numbers_and_gradients():
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 3, 2, 4)).astype(np.float32)
    mask = np.array([[[True, False, False], [False, False, False], [True, True, True]]])
    total = lambda q, k, v: jnp.sum(attention.attend(q, k, v, mask) ** 2)
    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    chex.assert_tree_all_finite(both(q, k, v))


def test_positions_start_anew_in_each_text():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, -1, -1, 2, 2, 2]])
    np.testing.assert_array_equal(
        model.segment_positions(segments), [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    )


@pytest.mark.parametrize("layout", [lambda params: params, readers.apart], ids=["stacked", "apart"])
def test_cached_decoding_equals_the_full_forward_pass(family, models, layout):
    stacked = models[family]
    params, adapter = layout(stacked), toys.adapter(stacked.config)
    samples, room = 2, 4
    lengths = np.array([6, 3])
    prompts = np.where(np.arange(6) < lengths[:, None], toys.tokens(2, 6), 0)
    new = toys.tokens(2, samples, room, seed=1)
    prefill = jax.jit(model.prefill, static_argnames=("samples", "room"))
    logits_bv, cache = prefill(params, adapter, prompts, lengths, samples=samples, room=room)
    step = jax.jit(model.decode_step)
    found = []
    for i in range(room):
        logits_bqv, cache = step(params, adapter, new[:, :, i], cache)
        found.append(logits_bqv)
    assert cache.step == room
    for b, length in enumerate(lengths):
        for q in range(samples):
            whole = np.concatenate([prompts[b, :length], new[b, q]])
            full_tv = forward(stacked, adapter, whole)[0]
            chex.assert_trees_all_close(logits_bv[b], full_tv[length - 1], **CLOSE)
            for i in range(room):
                chex.assert_trees_all_close(found[i][b, q], full_tv[length + i], **CLOSE)


def test_rotary_angles_are_the_same_looked_up_and_computed(family):
    positions = jnp.array([[0, 1, 2, 0, 1], [7, 3, 40, 41, 99]])
    config = toys.FAMILIES[family]
    computed = rotary.angles(positions, config)
    looked_up = rotary.angles(positions, config, 100)
    # NumPy's cosine and XLA's differ in the last bit.
    chex.assert_trees_all_close(looked_up, computed, atol=1e-6, rtol=0)
    assert jnp.abs(computed[0]).min() < 0.9


def test_the_scan_over_layers_equals_the_unrolled_layers(params, monkeypatch):
    tokens_bt = toys.tokens(2, 5)
    # A new function each time, or the second trace would come from the first one's cache.
    unrolled = jax.jit(lambda p, x: model.forward(p, None, x))(params, tokens_bt)
    monkeypatch.setattr(model, "UNROLLED_LAYERS", 0)
    looped = jax.jit(lambda p, x: model.forward(p, None, x))(params, tokens_bt)
    chex.assert_trees_all_close(unrolled, looped, **CLOSE)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_the_textbook_formula(groups):
    b, t, n, h = 2, 5, 4, 6
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(b, t, x, h)) for x in (n, n // groups, n // groups))
    mask = np.tril(np.ones((t, t), bool))[None] & (rng.random((b, 1, t)) < 0.8)
    mask |= np.eye(t, dtype=bool)
    scores = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, groups, 2)) / np.sqrt(h)
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, groups, 2))
    found = attention.attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_table_names_every_tensor_once(family):
    config = toys.FAMILIES[family]
    rows = model.table(config)
    sources = [w.source.format(l=l) for w in rows.values() for l in range(config.n_layers)]
    per_layer = 9 + 3 * config.qkv_bias + 2 * config.qk_norm
    assert len(set(sources)) == per_layer * config.n_layers + 2 + (not config.tied)
    assert ("head" in rows) == (not config.tied)
