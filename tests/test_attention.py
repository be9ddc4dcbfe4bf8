"""Laws of attention: the TPU kernel, run as plain JAX, is the XLA form in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seal_jax import attention

pytestmark = pytest.mark.usefixtures("quick_compile")

# Texts 1 and 2, trained padding of 2 that nothing sees, text 3, its trained padding, padding.
PACKED = [1] * 50 + [2] * 20 + [-2] * 11 + [3] * 60 + [-3] * 5 + [0] * 4
LONG = [1] * 100 + [2] * 50
NAMES = ("q", "k", "v")


def mask_of(segments: np.ndarray | None, t: int) -> np.ndarray:
    """Returns which keys each query sees, written out from `model.hidden`'s docstring."""
    seen = np.zeros((1 if segments is None else len(segments), t, t), bool)
    for row, own in enumerate([np.ones(t, int)] if segments is None else segments):
        for query in range(t):
            for key in range(query + 1):
                seen[row, query, key] = own[key] == abs(own[query])
    return seen


def inputs(t: int, b: int = 2, n: int = 4, k: int = 2, h: int = 64, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = [(b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def values_and_gradients(attend, q, k, v, weight):
    out, back = jax.vjp(attend, q, k, v)
    return out, back(weight)


@pytest.mark.parametrize("segments", [None, [PACKED, LONG]], ids=["one text", "packed"])
def test_the_kernel_is_the_plain_form_in_values_and_gradients(segments):
    segments = segments and np.array(segments, np.int32)
    t = len(PACKED)
    q, k, v, weight = inputs(t)
    mask = mask_of(segments, t)
    if segments is not None:
        weight = weight * (segments != 0)[:, :, None, None]  # what padding says is nothing's law
    kernel = functools.partial(attention.splash, segments_bt=segments, interpret=True)
    plain = functools.partial(attention.attend, mask_bts=mask)
    out, grads = jax.jit(functools.partial(values_and_gradients, kernel))(q, k, v, weight)
    want, want_grads = values_and_gradients(plain, q, k, v, weight)
    real = np.ones((2, t), bool) if segments is None else segments != 0
    # Two orders of summing 150 float32 terms.
    np.testing.assert_allclose(out[real], want[real], atol=2e-6)
    for name, got, expected in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_gradient_is_the_one_that_jax_derives(k):
    q, key, v, weight = inputs(len(PACKED), k=k, h=16)
    mask = mask_of(np.array([PACKED, LONG]), len(PACKED))

    def written_out(q, key, v):
        b, t, n, h = q.shape
        scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(b, t, k, n // k, h), key) * h**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), -1)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)

    out, grads = values_and_gradients(
        functools.partial(attention.attend, mask_bts=mask), q, key, v, weight
    )
    want, want_grads = values_and_gradients(written_out, q, key, v, weight)
    np.testing.assert_allclose(out, want, atol=2e-6)
    for name, got, expected in zip(NAMES, grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("attend", [attention.attend, attention.attend_long])
def test_the_only_key_that_is_seen_gets_no_gradient_of_a_score(attend):
    q, key, v, weight = inputs(2, h=16)
    mask = np.broadcast_to(np.eye(2, dtype=bool), (2, 2, 2))
    _, (by_q, by_k, _) = values_and_gradients(
        functools.partial(attend, mask_bts=mask), q, key, v, weight
    )
    assert not np.any(by_q) and not np.any(by_k)  # not rounding, which Adam would scale up


def test_under_two_vmaps_every_candidate_and_row_is_its_own():
    t = 130
    segments = np.array([[[1] * 70 + [2] * 60], [[1] * 30 + [-1] * 100]], np.int32)
    q, k, v, _ = (jnp.stack([x, x[:, ::-1]]) for x in inputs(t, b=1))
    together = jax.jit(jax.vmap(functools.partial(attention.splash, interpret=True)))
    out = together(q, k, v, segments)
    for c in range(2):
        alone = attention.attend(q[c], k[c], v[c], mask_of(segments[c], t))
        np.testing.assert_allclose(out[c], alone, atol=2e-6)


def test_a_text_of_padding_alone_is_finite():
    q, k, v, weight = inputs(128, b=1)
    segments = np.full((1, 128), -1, np.int32)
    kernel = functools.partial(attention.splash, segments_bt=segments, interpret=True)
    for x in jax.tree.leaves(values_and_gradients(kernel, q, k, v, weight)):
        assert np.isfinite(x).all()


def test_on_other_machines_the_choice_changes_no_bit_and_leaves_no_trace():
    q, k, v, weight = inputs(128)
    segments = np.array([[1] * 60 + [2] * 68] * 2, np.int32)
    mask = mask_of(segments, 128)
    run = lambda attend: jax.jit(functools.partial(values_and_gradients, attend))
    chosen = run(
        lambda q, k, v: attention.attend_rows(q, k, v, mask, segments, recomputed=True)
    ).lower(q, k, v, weight)
    plain = run(lambda q, k, v: attention.attend(q, k, v, mask))
    for got, want in zip(
        jax.tree.leaves(chosen.compile()(q, k, v, weight)),
        jax.tree.leaves(plain(q, k, v, weight)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    assert "tpu_custom_call" not in chosen.as_text()


def test_a_gradient_that_keeps_activations_never_traces_the_kernel(monkeypatch):
    def refuse(*args):
        raise AssertionError("traced")

    monkeypatch.setattr(attention, "splash", refuse)

    def trace(t: int, h: int, recomputed: bool) -> None:
        rows = inputs(t, b=1, h=h)[:3]
        one = functools.partial(attention.attend_rows, recomputed=recomputed, segments_bt=None)
        jax.make_jaxpr(one)(*rows, mask_bts=mask_of(None, t))

    trace(128, 64, False)
    trace(128, 16, True)  # narrow heads
    trace(64, 64, True)  # short rows
    with pytest.raises(AssertionError, match="traced"):
        trace(128, 64, True)


@pytest.mark.parametrize("k", [1, 4])
def test_long_rows_some_queries_at_a_time_are_the_plain_form(k):
    t = 600  # two parts and a piece
    segments = np.array([[1] * 290 + [2] * 300 + [-2] * 10, [1] * 600], np.int32)
    q, key, v, weight = inputs(t, k=k, h=16)
    mask = mask_of(segments, t)
    for own in (mask, mask[1:]):  # of each row, or one for all
        out, grads = values_and_gradients(
            functools.partial(attention.attend_long, mask_bts=own), q, key, v, weight
        )
        want, want_grads = values_and_gradients(
            functools.partial(attention.attend, mask_bts=own), q, key, v, weight
        )
        np.testing.assert_allclose(out, want, atol=2e-6)
        for name, got, expected in zip(NAMES, grads, want_grads, strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("recomputed", [True, False])
def test_the_scores_of_a_long_row_are_never_there_at_once(recomputed):
    t, n = 2048, 4
    q, key, v, weight = inputs(t, b=1, n=n, h=64)
    mask = np.tril(np.ones((1, t, t), bool))
    attend = lambda q, key, v: attention.attend_rows(q, key, v, mask, None, recomputed=recomputed)
    run = jax.jit(functools.partial(values_and_gradients, attend))
    needed = run.lower(q, key, v, weight).compile().memory_analysis().temp_size_in_bytes
    assert needed < 4 * n * t * t  # of these alone
