"""Attention of queries over keys: causal, grouped-query, block-diagonal over packed texts.

XLA's form everywhere, of long rows some queries at a time; on a TPU Pallas' splash kernel, which
never stores the scores. The choice is made when a program is lowered, so that what is compiled for
a TPU elsewhere is what runs there.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from seal_jax import sharding

_MASKED = -1e30  # finite: a row that sees nothing gives a uniform average, never a NaN
_BLOCKS = (512, 256, 128)  # tokens the kernel takes at a time; 128 is its least
_HEAD = 64  # heads must be a multiple of this width for the kernel
_LONG = 512  # tokens of a row above which its scores, t², are never there at once
_QUERIES = 256  # queries of such a row whose scores are there at once


def attend_rows(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    mask_bts: jax.Array,
    segments_bt: jax.Array | None,
    *,
    recomputed: bool,
) -> jax.Array:
    """Returns `attend`, of long rows `attend_long`; by the splash kernel where a TPU gains by it.

    Args:
      mask_bts: The causal mask within segments; `segments_bt` says the same, as in `model.hidden`.
      recomputed: Whether no gradient keeps what the attention computes (static). If one does, the
        kernel would save nothing: both forms' intermediates are stored, whichever runs.
    """
    t, h = q_btnh.shape[1], q_btnh.shape[3]
    plain = attend if t <= _LONG else attend_long
    if not recomputed or t < _BLOCKS[-1] or h % _HEAD:
        return plain(q_btnh, k_bskh, v_bskh, mask_bts)

    def choose(q, k, v, mask, *segments):
        return jax.lax.platform_dependent(
            q,
            k,
            v,
            mask,
            *segments,
            tpu=lambda q, k, v, mask, *segments: splash(q, k, v, *segments),
            default=lambda q, k, v, mask, *segments: plain(q, k, v, mask),
        )

    segments = () if segments_bt is None else (segments_bt,)
    return sharding.per_device(choose, q_btnh, k_bskh, v_bskh, mask_bts, *segments)


def splash(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segments_bt: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns causal attention within segments by Pallas' kernel for TPUs, [b, t, n, h].

    Args:
      segments_bt: See `model.hidden`. A query of segment -n looks for keys of n, and no query looks
        for keys of -n: the kernel takes the segments of queries and keys apart.
      interpret: Run it as plain JAX, on any machine.
    """
    t, n, h = q_btnh.shape[1:]
    size = t + -t % _BLOCKS[-1]
    block = next(x for x in _BLOCKS if size % x == 0)
    # Padding stands last, where no causal query sees it; its own rows see its first token.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, size - t), (0, 0), (0, 0))).swapaxes(1, 2)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash_lib.make_splash_mha(
        mask=splash_mask.MultiHeadMask([splash_mask.CausalMask((size, size))] * n),
        block_sizes=splash_lib.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    rows = (pad(q_btnh * h**-0.5), pad(k_bskh), pad(v_bskh))
    if segments_bt is None:
        out = jax.vmap(kernel)(*rows)
    else:
        kv = jnp.pad(segments_bt, ((0, 0), (0, size - t)))
        out = jax.vmap(kernel)(*rows, splash_lib.SegmentIds(jnp.abs(kv), kv))
    return out.swapaxes(1, 2)[:, :t]


@jax.custom_vjp
def attend(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    mask_bts: jax.Array,
) -> jax.Array:
    """Returns softmax(q·k / √h)·v, [b, t, n, h] in q's dtype.

    Scores are float32. Queries of one key head are folded into the token axis, so that all products
    are plain batched matrix products with the layouts written out; on a CPU this is several times
    faster than the einsum of the same meaning. So is the gradient written out, compared with JAX's
    own of a softmax.

    Args:
      mask_bts: True where a query may see a key; broadcast over heads.
    """
    return _attend(q_btnh, k_bskh, v_bskh, mask_bts)[0]


def _attend(q_btnh, k_bskh, v_bskh, mask_bts):
    """Returns `attend`, and what its gradient needs."""
    b, t, n, h = q_btnh.shape
    s, k = k_bskh.shape[1:3]
    g = n // k
    q = _folded(q_btnh * h**-0.5, k)
    scores = jnp.matmul(q, k_bskh.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
    scores = scores.reshape(b, k, g, t, s)
    scores = jnp.where(mask_bts[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, k, g * t, s)
    out = jnp.matmul(weights.astype(v_bskh.dtype), v_bskh.transpose(0, 2, 1, 3))
    return _unfolded(out, t), (q, k_bskh, v_bskh, weights, out)


def _attend_gradient(kept, change_btnh):
    """Returns the gradient with respect to q, k and v (None for the mask)."""
    by_q, by_k, by_v = _gradients(kept, change_btnh)
    _, k_bskh, v_bskh, *_ = kept
    return by_q, _last(by_k, k_bskh), _last(by_v, v_bskh), None


def _gradients(kept, change_btnh):
    """Returns the gradient with respect to q, and to k and v as float32 [b, k, h, s].

    The sum over keys in a softmax's gradient is one over the h of the output: weights and their
    changes need not be read for it.
    """
    q, k_bskh, v_bskh, weights, out = kept
    t, h = change_btnh.shape[1], change_btnh.shape[3]
    exact = {"preferred_element_type": jnp.float32}
    change = _folded(change_btnh, k_bskh.shape[2])
    by_weights = jnp.matmul(change, v_bskh.transpose(0, 2, 3, 1), **exact)
    mean = jnp.sum(change.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    # Of the only key that is seen it is 0, not rounding, which Adam would make a whole step of.
    by_scores = jnp.where(weights == 1, 0.0, weights * (by_weights - mean)).astype(q.dtype)
    by_q = jnp.matmul(by_scores, k_bskh.transpose(0, 2, 1, 3), **exact) * h**-0.5
    by_k = jnp.matmul(q.swapaxes(2, 3), by_scores, **exact)
    by_v = jnp.matmul(change.swapaxes(2, 3), weights.astype(change.dtype), **exact)
    return _unfolded(by_q, t).astype(q.dtype), by_k, by_v


def _last(x_bkhs: jax.Array, like: jax.Array) -> jax.Array:
    """Returns [b, s, k, h], heads last, of the dtype of `like`."""
    return x_bkhs.transpose(0, 3, 1, 2).astype(like.dtype)


attend.defvjp(_attend, _attend_gradient)


def queries_at_once(t: int) -> int:
    """Returns how many of a row's queries have scores at the same time."""
    return t if t <= _LONG else _QUERIES


@jax.custom_vjp
def attend_long(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, mask_bts: jax.Array
) -> jax.Array:
    """Returns `attend`, its queries taken some at a time, in the gradient once more."""
    one = lambda part: _attend(part[0], k_bskh, v_bskh, part[1])[0]
    return _joined(jax.lax.map(one, _parts(q_btnh, mask_bts)), q_btnh.shape[1])


def _attend_long(*arrays):
    return attend_long(*arrays), arrays


def _attend_long_gradient(kept, change_btnh):
    q_btnh, k_bskh, v_bskh, mask_bts = kept

    def one(sums, part):
        q, mask, change = part
        by_q, *more = _gradients(_attend(q, k_bskh, v_bskh, mask)[1], change)
        return [a + b for a, b in zip(sums, more, strict=True)], by_q

    zero = lambda x: jnp.zeros_like(x.transpose(0, 2, 3, 1), jnp.float32)
    start = [zero(k_bskh), zero(v_bskh)]
    (by_k, by_v), by_q = jax.lax.scan(one, start, _parts(q_btnh, mask_bts, change_btnh))
    by_q = _joined(by_q, q_btnh.shape[1])
    return by_q, _last(by_k, k_bskh), _last(by_v, v_bskh), None


attend_long.defvjp(_attend_long, _attend_long_gradient)


def _parts(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays [b, t, ...] as parts [p, b, t / p, ...], padded."""

    def one(x: jax.Array) -> jax.Array:
        b, t, *rest = x.shape
        x = jnp.pad(x, ((0, 0), (0, -t % _QUERIES), *[(0, 0)] * len(rest)))
        return x.reshape(b, -1, _QUERIES, *rest).swapaxes(0, 1)

    return tuple(map(one, arrays))


def _joined(x: jax.Array, t: int) -> jax.Array:
    """Returns parts [p, b, t / p, ...] as one array [b, t, ...], without the padding."""
    p, b, size, *rest = x.shape
    return x.swapaxes(0, 1).reshape(b, p * size, *rest)[:, :t]


def _folded(x_btnh: jax.Array, k: int) -> jax.Array:
    """Returns [b, k, g·t, h]: the g query heads of each key head in one token axis."""
    b, t, n, h = x_btnh.shape
    return x_btnh.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)


def _unfolded(x: jax.Array, t: int) -> jax.Array:
    """Returns [b, t, n, h] of [b, k, g·t, h]."""
    b, k, _, h = x.shape
    return x.reshape(b, k, -1, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, -1, h)


def attend_cached(
    q_bqnh: jax.Array,
    prefix_k_bkhs: jax.Array,
    prefix_v_bksh: jax.Array,
    suffix_k_bqkhm: jax.Array,
    suffix_v_bqkmh: jax.Array,
    new_k_bqkh1: jax.Array,
    new_v_bqk1h: jax.Array,
    length_b: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """Returns attention of one new token per sequence, [b, q, n, h] in q's dtype.

    The q sequences of a prompt share its keys (read once), and each has its own suffix.

    Args:
      prefix_k_bkhs: Keys of the prompts, padded on the right; `length_b` of them count.
      suffix_k_bqkhm: Keys of generated tokens; those before `step` count.
      new_k_bqkh1: Key of the new token, which sees itself.
    """
    b, samples, n, h = q_bqnh.shape
    k, s = prefix_k_bkhs.shape[1], prefix_k_bkhs.shape[3]
    g, m = n // k, suffix_k_bqkhm.shape[4]
    exact = {"preferred_element_type": jnp.float32}
    q = (q_bqnh * h**-0.5).reshape(b, samples, k, g, h)
    fold = lambda x: x.swapaxes(1, 2).reshape(b, k, samples * g, -1)  # of [b, q, k, g, ...]
    unfold = lambda x: x.reshape(b, k, samples, g, -1).swapaxes(1, 2)
    shared = jnp.matmul(fold(q), prefix_k_bkhs, **exact)
    shared = jnp.where((jnp.arange(s) < length_b[:, None])[:, None, None], shared, _MASKED)
    own = jnp.matmul(q, suffix_k_bqkhm, **exact)
    own = jnp.where(jnp.arange(m) < step, own, _MASKED)
    new = jnp.matmul(q, new_k_bqkh1, **exact)
    # One softmax over the three, of which only a number of each sequence and head is brought
    # together: the scores themselves would be copied at every step.
    most = lambda x: jnp.max(x, axis=-1, keepdims=True)
    top = jnp.maximum(jnp.maximum(unfold(most(shared)), most(own)), new)
    shared, own, new = jnp.exp(shared - fold(top)), jnp.exp(own - top), jnp.exp(new - top)
    total = unfold(jnp.sum(shared, -1, keepdims=True)) + jnp.sum(own, -1, keepdims=True) + new
    out = unfold(jnp.matmul(shared.astype(q.dtype), prefix_v_bksh, **exact))
    out += jnp.matmul(own.astype(q.dtype), suffix_v_bqkmh, **exact) + new * new_v_bqk1h
    return (out / total).astype(q.dtype).reshape(b, samples, n, h)
