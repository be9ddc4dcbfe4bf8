"""Laws of the loss, the schedules and one AdamW step."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from seal_jax import optim, readers

pytestmark = pytest.mark.usefixtures("quick_compile")

CLOSE = dict(rtol=2e-5, atol=1e-6)  # float32 sums in another order

loss = jax.jit(optim.loss, static_argnames=("remat", "predicted"))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_loss_is_the_weighted_mean_of_next_token_surprise(params, adapter):
    tokens_bt = toys.tokens(2, 14)
    weights_bt = (np.random.default_rng(0).random((2, 14)) < 0.6).astype(np.int8)
    weights_bt[:, 0] = [1, 0]
    log_p = _log_softmax(toys.forward(params, adapter, tokens_bt))[:, :-1]
    nll = -np.take_along_axis(log_p, tokens_bt[:, 1:, None], -1)[..., 0]
    # A first token is never predicted, yet transformers' Trainer counts it in the divisor.
    expected = (nll * weights_bt[:, 1:]).sum() / weights_bt.sum()
    np.testing.assert_allclose(loss(params, adapter, tokens_bt, weights_bt), expected, **CLOSE)


def test_packing_texts_into_a_row_changes_no_loss(params, adapter):
    lengths = (6, 3, 5)
    row = toys.tokens(1, 14)
    segments = np.repeat([1, 2, 3], lengths)[None]
    weights = np.ones((1, 14), np.int8)
    apart = np.zeros((3, 14), np.int32)
    apart_weights = np.zeros((3, 14), np.int8)
    apart_segments = np.zeros((3, 14), np.int32)
    for i, (start, size) in enumerate(zip((0, 6, 9), lengths, strict=True)):
        weights[0, start] = 0
        apart[i, :size] = row[0, start : start + size]
        apart_weights[i, 1:size] = 1
        apart_segments[i, :size] = 1
    together = loss(params, adapter, row, weights, segments)
    np.testing.assert_allclose(
        together, loss(params, adapter, apart, apart_weights, apart_segments), **CLOSE
    )
    # No text's first token is predicted from the text before it, whatever its weight says.
    counted = np.ones((1, 14), np.int8)
    np.testing.assert_allclose(
        loss(params, adapter, row, counted, segments) * 14, together * 11, **CLOSE
    )


def test_logits_of_counted_places_alone_change_neither_loss_nor_gradient(params, adapter):
    tokens_bt = toys.tokens(2, 14)
    weights_bt = np.zeros((2, 14), np.int8)
    weights_bt[0, [0, 3, 6, 9, 13]] = 1  # 0 and 6 are first tokens of a text
    weights_bt[1, [1, 2, 12]] = 1  # fewer: room is left, which must not count the first ones twice
    segments_bt = np.repeat([[1, 2, 3]], (6, 3, 5), axis=1).repeat(2, axis=0)
    texts = (tokens_bt, weights_bt, segments_bt)
    whole = jax.jit(jax.value_and_grad(lambda a: optim.loss(params, a, *texts)))(adapter)
    for predicted in (5, 8):  # exactly as many as count at most, and more
        some = jax.value_and_grad(lambda a, n=predicted: optim.loss(params, a, *texts, predicted=n))
        chex.assert_trees_all_close(jax.jit(some)(adapter), whole, rtol=1e-4, atol=1e-6)
    assert float(whole[0]) > 0


def test_loss_in_parts_and_recomputed_has_the_same_value_and_gradient(monkeypatch):
    params = toys.params(toys.config(n_layers=1))
    adapter = toys.adapter(params.config, targets=("q", "down"))
    tokens_bt, weights_bt = toys.tokens(2, 14), np.ones((2, 14), np.int8)

    def value_and_grad(remat: bool):
        whole = lambda a: optim.loss(params, a, tokens_bt, weights_bt, remat=remat)
        return jax.jit(jax.value_and_grad(whole))(adapter)

    plain = value_and_grad(remat=False)
    monkeypatch.setattr(optim, "_LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(optim, "_LOSS_CHUNK", 4)  # 13 predictions: the last part is not full
    chex.assert_trees_all_close(value_and_grad(remat=True), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [lambda params: params, readers.apart], ids=["stacked", "apart"])
def test_the_gradient_made_along_with_the_loss_is_the_one_of_it(params, layout):
    """What passes by a frozen head, with a weight for each place, against JAX's own gradient."""
    params = layout(params)
    x_btd = jax.random.normal(jax.random.key(0), (2, 7, params.config.d_model))
    targets_bt = jax.random.randint(jax.random.key(1), (2, 7), 0, params.config.vocab_size)
    weights_bt = jax.random.normal(jax.random.key(2), (2, 7))

    def value(x_btd, frozen):
        return jnp.sum(optim.token_nll(params, x_btd, targets_bt, frozen) * weights_bt)

    ours, theirs = (jax.value_and_grad(value)(x_btd, frozen) for frozen in (True, False))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_adapter_is_sound_up_to_a_limit_of_either_sign():
    numbers = lambda x: {"a": jnp.zeros(3), "b": jnp.array([[0.5, x]])}
    for x in (0.0, 999.0, -999.0):
        assert optim.sound(numbers(x))
    for x in (1001.0, -1001.0, math.inf, -math.inf, math.nan):
        assert not optim.sound(numbers(x))


def test_nothing_to_predict_is_no_loss_and_no_gradient(params, adapter):
    tokens_bt, weights_bt = toys.tokens(2, 14), np.zeros((2, 14), np.int8)
    zero = lambda a: optim.loss(params, a, tokens_bt, weights_bt)
    value, grads = jax.jit(jax.value_and_grad(zero))(adapter)
    assert value == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(np.zeros_like, adapter))


# Peak 2, 12 steps, 4 of them warm-up: transformers' get_*_schedule_with_warmup, in closed form.
_SHAPES = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


@pytest.mark.parametrize("kind", sorted(_SHAPES))
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_those_of_transformers(kind, warmup):
    total, peak = 12, 2.0
    found = [
        optim.learning_rate(kind, jnp.int32(i), jnp.float32(peak), jnp.int32(total), warmup)
        for i in range(total + 1)
    ]
    expected = [
        peak * (i / warmup if i < warmup else _SHAPES[kind]((i - warmup) / (total - warmup)))
        for i in range(total + 1)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    # Whoever stops during the warm-up divides by nothing.
    assert np.isfinite(optim.learning_rate(kind, jnp.int32(1), peak, jnp.int32(2), warmup))


@pytest.mark.parametrize(
    ("clip", "decay", "b2"), [(1.0, 0.0, 0.999), (0.0, 0.0, 0.999), (0.3, 0.1, 0.95)]
)
def test_steps_are_torch_s_adamw_after_clipping(clip, decay, b2):
    """AdamW as in Loshchilov & Hutter (and torch), written out in float64."""
    w = np.array([0.5, -1.0, 2.0, 0.0])
    target = np.array([1.0, 1.0, -1.0, 0.25])
    rate = lambda step: 0.1 / (1 + step)
    state = optim.init({"w": jnp.asarray(w, jnp.float32)}, b2=b2)
    loss_of = lambda tree: jnp.sum((tree["w"] - target) ** 3 / 3 + (tree["w"] - target) ** 2)
    m, v = np.zeros(4), np.zeros(4)
    step = jax.jit(
        lambda state: optim.step(state, loss_of, rate, clip=clip, weight_decay=decay, b2=b2)
    )
    for i in range(5):
        state, measures = step(state)
        gap = w - target
        gradient = gap**2 + 2 * gap
        norm = np.sqrt((gradient**2).sum())
        np.testing.assert_allclose(measures.loss, (gap**3 / 3 + gap**2).sum(), rtol=1e-5)
        np.testing.assert_allclose(measures.grad_norm, norm, rtol=1e-5)
        np.testing.assert_allclose(measures.learning_rate, rate(i), rtol=1e-6)
        if clip:
            gradient = gradient * min(1, clip / (norm + 1e-6))
        m, v = 0.9 * m + 0.1 * gradient, b2 * v + (1 - b2) * gradient**2
        change = (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - b2 ** (i + 1))) + 1e-8)
        w = w * (1 - rate(i) * decay) - rate(i) * change
        np.testing.assert_allclose(state.trained["w"], w, rtol=1e-5, atol=1e-6)
    assert state.step == 5


def test_norms_and_biases_do_not_decay(params):
    state, _ = optim.update(
        optim.init(params),
        jnp.zeros(()),
        jax.tree.map(jnp.zeros_like, params),
        lambda step: jnp.float32(0.5),
        weight_decay=0.1,
    )
    kept = lambda path: any(str(x).strip(".[]'").endswith(("norm", "bias")) for x in path)
    pairs = jax.tree_util.tree_leaves_with_path(params)
    assert 0 < sum(kept(path) for path, _ in pairs) < len(pairs)
    for (path, before), after in zip(pairs, jax.tree.leaves(state.trained), strict=True):
        factor = 1.0 if kept(path) else 0.95
        np.testing.assert_allclose(after, factor * before, rtol=1e-6, err_msg=str(path))


def test_a_step_keeps_the_type_of_what_it_trains():
    state = optim.init({"w": jnp.ones(3, jnp.bfloat16)})
    loss_of = lambda tree: jnp.sum(tree["w"] ** 2).astype(jnp.float32)
    state, _ = jax.jit(lambda state: optim.step(state, loss_of, lambda i: 0.1))(state)
    assert state.trained["w"].dtype == jnp.bfloat16
