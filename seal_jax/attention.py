"""Attention of queries over keys: causal, grouped-query, block-diagonal over packed texts."""

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite: a row that sees nothing gives a uniform average, never a NaN


def attend(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    mask_bts: jax.Array,
) -> jax.Array:
    """Returns softmax(q·k / √h)·v, [b, t, n, h] in q's dtype.

    Scores are float32. Queries of one key head are folded into the token axis, so that the two
    products are plain batched matrix products with the layouts written out; on a CPU this is
    several times faster than the einsum of the same meaning.

    Args:
      mask_bts: True where a query may see a key; broadcast over heads.
    """
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    g = n // k
    q = (q_btnh * h**-0.5).reshape(b, t, k, g, h).transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h)
    scores = jnp.matmul(q, k_bskh.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scores = scores.reshape(b, k, g, t, s)
    scores = jnp.where(mask_bts[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_bskh.dtype).reshape(b, k, g * t, s)
    out = jnp.matmul(weights, v_bskh.transpose(0, 2, 1, 3)).reshape(b, k, g, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def attend_cached(
    q_bqnh: jax.Array,
    prefix_k_bksh: jax.Array,
    prefix_v_bksh: jax.Array,
    suffix_k_bqkmh: jax.Array,
    suffix_v_bqkmh: jax.Array,
    length_b: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """Returns attention of one new token per sequence, [b, q, n, h].

    The q sequences of a prompt share its keys (read once), and each has its own suffix.

    Args:
      prefix_k_bksh: Keys of the prompts, padded on the right; `length_b` of them count.
      suffix_k_bqkmh: Keys of generated tokens; those up to and including `step` count.
    """
    b, samples, n, h = q_bqnh.shape
    k, s = prefix_k_bksh.shape[1:3]
    g, m = n // k, suffix_k_bqkmh.shape[3]
    q = (q_bqnh * h**-0.5).reshape(b, samples, k, g, h)
    q_shared = q.transpose(0, 2, 1, 3, 4).reshape(b, k, samples * g, h)
    shared = jnp.matmul(q_shared, prefix_k_bksh.mT, preferred_element_type=jnp.float32)
    shared = jnp.where((jnp.arange(s) < length_b[:, None])[:, None, None], shared, _MASKED)
    shared = shared.reshape(b, k, samples, g, s).transpose(0, 2, 1, 3, 4)
    own = jnp.matmul(q, suffix_k_bqkmh.mT, preferred_element_type=jnp.float32)
    own = jnp.where(jnp.arange(m) <= step, own, _MASKED)
    weights = jax.nn.softmax(jnp.concatenate([shared, own], -1), axis=-1).astype(q.dtype)
    weights_shared = weights[..., :s].transpose(0, 2, 1, 3, 4).reshape(b, k, samples * g, s)
    out = jnp.matmul(weights_shared, prefix_v_bksh).reshape(b, k, samples, g, h)
    out = out.transpose(0, 2, 1, 3, 4) + jnp.matmul(weights[..., s:], suffix_v_bqkmh)
    return out.reshape(b, samples, n, h)
