"""The decoder of Qwen2/2.5, Qwen3 and Llama 3, as pure functions of its weights.

Layers are stacked, so that `lax.scan` runs over them and a weight is one array of the whole model.
Programs that run often take the layers apart first, where that pays (`readers`).
An adapter is a separate argument and may be None.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seal_jax import attention, dims, lora, rotary, sharding
from seal_jax.lora import Adapter
from seal_jax.params import ModelConfig, Params, RopeScaling, init, shapes, table

__all__ = ["ModelConfig", "Params", "RopeScaling", "init", "shapes", "table"]

# Up to here programs run over layers one by one: the steps of a CPU loop cost more than they save.
UNROLLED_LAYERS = 4


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns x scaled to unit root mean square over its last axis, then by weight."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (weight * x32.astype(x.dtype)).astype(x.dtype)


def _layer(x_btd, weights, factors, scale, config, rope, attend, pick=lambda x: x, ranks=None):
    """Returns the residual stream after one layer.

    Args:
      attend: The caller's attention, a function of q, k and v.
      pick: Takes the positions that go on from here, of all that are seen.
      ranks: See `hidden`.
    """

    def project(name: str, x: jax.Array) -> jax.Array:
        bias = weights.get(f"{name}_bias")
        return lora.project(x, weights[name], bias, factors.get(name), scale, ranks)

    def project_qkv(x: jax.Array) -> list[jax.Array]:
        if "qkv" not in weights:
            return [project(name, x) for name in "qkv"]
        y = lora.project(x, weights["qkv"], weights.get("qkv_bias"))
        ends = np.cumsum([dims.sizes(config)[lora.PROJECTIONS[name][1]] for name in "qk"])
        return [
            part + lora.change(x, factors[name], scale, ranks) if name in factors else part
            for name, part in zip("qkv", jnp.split(y, ends, axis=-1), strict=True)
        ]

    y = rms_norm(x_btd, weights["attention_norm"], config.rms_eps)
    q, k, v = (x.reshape(*x.shape[:-1], -1, config.d_head) for x in project_qkv(y))
    if config.qk_norm:
        q = rms_norm(q, weights["q_norm"], config.rms_eps)
        k = rms_norm(k, weights["k_norm"], config.rms_eps)
    mixed = attend(rotary.turn(pick(q), tuple(map(pick, rope))), rotary.turn(k, rope), v)
    x_btd = pick(x_btd) + project("o", mixed.reshape(*mixed.shape[:-2], -1))
    y = rms_norm(x_btd, weights["mlp_norm"], config.rms_eps)
    return x_btd + project("down", jax.nn.silu(project("gate", y)) * project("up", y))


def _factors(adapter: Adapter | None) -> tuple[dict[str, tuple[jax.Array, jax.Array]], float]:
    """Returns the adapter as pairs by target, and its scale."""
    if adapter is None:
        return {}, 1.0
    return {name: (adapter.a[name], adapter.b[name]) for name in adapter.a}, adapter.scale


def _over_layers(body, carry, inputs, last=None):
    """Returns `lax.scan` of a body over stacked inputs; where they are lists, a loop, unrolled.

    What the body returns for each layer is stacked, or a list, accordingly.

    Args:
      last: Takes the last layer of a loop, instead of the body.
    """
    weights = next(iter(inputs[0].values()))
    if not isinstance(weights, list):
        unroll = len(weights) if len(weights) <= UNROLLED_LAYERS else 1
        return jax.lax.scan(body, carry, inputs, unroll=unroll)
    apart = lambda x: isinstance(x, list)
    returned = []
    for layer in range(len(weights)):
        own = jax.tree.map(operator.itemgetter(layer), inputs, is_leaf=apart)
        final = last is not None and layer == len(weights) - 1
        carry, out = (last if final else body)(carry, own)
        returned.append(out)
    return carry, tuple(map(list, zip(*returned, strict=True)))


def segment_positions(segments_bt: jax.Array) -> jax.Array:
    """Returns each token's place within its own segment, [b, t]."""
    place = jnp.arange(segments_bt.shape[1])
    segments_bt = jnp.abs(segments_bt)
    new = segments_bt != jnp.pad(segments_bt, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return place - jax.lax.cummax(jnp.where(new, place, 0), axis=1)


def hidden(
    params: Params,
    adapter: Adapter | None,
    tokens_bt: jax.Array,
    *,
    segments_bt: jax.Array | None = None,
    remat: bool = False,
    keep_keys: bool = False,
    only_b: jax.Array | None = None,
    ranks_btr: jax.Array | None = None,
):
    """Returns the final normalised activations [b, t, d] (and keys and values, if kept).

    Args:
      segments_bt: Texts packed in a row, numbered from 1; 0 is padding. Each sees itself alone and
        has its own positions. -n is padding of text n that is trained on, as the reference does:
        it sees text n and nothing sees it. Without segments a row is one text.
      remat: Recompute each layer's activations in the backward pass.
      keep_keys: Also return keys [l, b, k, h, t] and values [l, b, k, t, h], for a cache.
      only_b: The one position of each row whose activations are returned, [b, 1, d]; not with
        segments.
      ranks_btr: Which of the adapter's ranks act on a token; all, if None. Not with `only_b`.
    """
    config = params.config
    t = tokens_bt.shape[1]
    causal = jnp.tril(jnp.ones((t, t), bool))
    if segments_bt is None:
        mask, positions = causal[None], jnp.arange(t)[None]
    else:
        mask = causal[None] & (jnp.abs(segments_bt)[:, :, None] == segments_bt[:, None, :])
        positions = segment_positions(segments_bt)
    rope = rotary.angles(positions, config, t)
    factors, scale = _factors(adapter)

    def pick(x: jax.Array) -> jax.Array:
        if only_b is None or x.shape[1] == 1:
            return x
        x = jnp.broadcast_to(x, (len(only_b), *x.shape[1:]))
        at = jnp.expand_dims(only_b, tuple(range(1, x.ndim)))
        return jnp.take_along_axis(x, at, axis=1)

    def body(x_btd, inputs, last: bool = False):
        weights, layer_factors = inputs
        kept = []

        def attend(q, k, v):
            kept.extend([k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)] if keep_keys else [])
            if last:
                return attention.attend(q, k, v, pick(mask))
            # Keys are kept to generate from, where nothing is differentiated.
            own = {"recomputed": remat or keep_keys}
            return attention.attend_rows(q, k, v, mask, segments_bt, **own)

        x_btd = sharding.constrain(x_btd, "btd", config)
        some = {"pick": pick} if last else {"ranks": ranks_btr}
        x_btd = _layer(x_btd, weights, layer_factors, scale, config, rope, attend, **some)
        return x_btd, tuple(kept)

    # Of the last layer the other positions are needed as keys and values alone.
    last = None if only_b is None else functools.partial(body, last=True)
    if not keep_keys:
        body = jax.jit(body)  # traced once for all layers; prompts are faster without
    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    x_btd = params.embed[tokens_bt]
    x_btd, kept = _over_layers(body, x_btd, (params.layers, factors), last)
    x_btd = pick(x_btd)
    x_btd = rms_norm(x_btd, params.norm, config.rms_eps)
    return (x_btd, kept) if keep_keys else x_btd


def unembed(params: Params, x: jax.Array) -> jax.Array:
    """Returns logits [..., v], float32."""
    parts = unembed_parts(params, x)
    return jnp.concatenate(parts, -1) if len(parts) > 1 else parts[0]


def unembed_parts(params: Params, x: jax.Array) -> list[jax.Array]:
    """Returns logits as the head's parts make them, not joined: that would copy them all."""
    product = lambda part: jnp.matmul(x, part.astype(x.dtype), preferred_element_type=jnp.float32)
    return list(map(product, _head_parts(params)))


def unembed_back(params: Params, parts: Sequence[jax.Array]) -> jax.Array:
    """Returns [..., d]: the product of logits, in parts, with the head from its other side."""
    back = lambda x, part: jnp.matmul(x, part.T.astype(x.dtype))
    return functools.reduce(operator.add, map(back, parts, _head_parts(params)))


def _head_parts(params: Params) -> list[jax.Array]:
    head = params.embed.T if params.head is None else params.head
    return head if isinstance(head, list) else [head]


def forward(
    params: Params,
    adapter: Adapter | None,
    tokens_bt: jax.Array,
    config: ModelConfig | None = None,
    *,
    segments_bt: jax.Array | None = None,
) -> jax.Array:
    """Returns the logits of every next token, [b, t, v], float32.

    Args:
      adapter: A LoRA adapter, or None for the bare model.
      config: The architecture, where it is not the one `params` carries.
      segments_bt: See `hidden`.
    """
    if adapter is not None:
        lora.check_single(adapter)
    if config is not None and config != params.config:
        params = params.replace(config=config)
    return unembed(params, hidden(params, adapter, tokens_bt, segments_bt=segments_bt))


@struct.dataclass
class Cache:
    """Keys and values: of prompts, shared by the samples of each, and of what they generated.

    Stacked [l, ...], or a list of the arrays of each layer where the weights lie so. Keys have
    their tokens last, as the product with a query wants them.

    Attributes:
      prefix_k: [l, b, k, h, t], padded on the right.
      prefix_v: [l, b, k, t, h].
      suffix_k: [l, b, q, k, h, m]; q samples of each prompt, room for m tokens.
      suffix_v: [l, b, q, k, m, h].
      length_b: Tokens of each prompt.
      step: Tokens generated so far, the same for all.
    """

    prefix_k: jax.Array
    prefix_v: jax.Array
    suffix_k: jax.Array
    suffix_v: jax.Array
    length_b: jax.Array
    step: jax.Array


def prefill(
    params: Params,
    adapter: Adapter | None,
    tokens_bt: jax.Array,
    length_b: jax.Array,
    *,
    samples: int,
    room: int,
) -> tuple[jax.Array, Cache]:
    """Returns logits of the token after each prompt, [b, v], and the filled cache.

    Args:
      tokens_bt: Prompts, padded on the right.
      length_b: Their true lengths, at least 1.
      samples: Sequences to generate from each prompt (static).
      room: Tokens to generate at most (static).
    """
    x_b1d, (k, v) = hidden(params, adapter, tokens_bt, keep_keys=True, only_b=length_b - 1)

    def empty(kept: jax.Array, axis: int) -> jax.Array:
        *layers, b, heads, _, _ = shape = kept.shape
        rest = list(shape[-2:])
        rest[axis] = room
        return jnp.zeros((*layers, b, samples, heads, *rest), kept.dtype)

    suffix_k = jax.tree.map(lambda x: empty(x, 1), k)
    suffix_v = jax.tree.map(lambda x: empty(x, 0), v)
    cache = Cache(k, v, suffix_k, suffix_v, length_b, jnp.zeros((), jnp.int32))
    return unembed(params, x_b1d[:, 0]), cache


def decode_step(
    params: Params, adapter: Adapter | None, token_bq: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Returns logits [b, q, v] after one more token of each sequence, and the grown cache."""
    config = params.config
    positions = jnp.broadcast_to((cache.length_b + cache.step)[:, None], token_bq.shape)
    prefix = jax.tree.leaves(cache.prefix_k)[0].shape[-1]
    rope = rotary.angles(positions, config, prefix + jax.tree.leaves(cache.suffix_k)[0].shape[-1])
    factors, scale = _factors(adapter)

    def body(x_bqd, inputs):
        weights, layer_factors, *kept = inputs
        new = []

        def attend(q, k, v):
            new.extend([k[..., None], v[..., None, :]])
            return attention.attend_cached(q, *kept, *new, cache.length_b, cache.step)

        return _layer(x_bqd, weights, layer_factors, scale, config, rope, attend), tuple(new)

    kept = (cache.prefix_k, cache.prefix_v, cache.suffix_k, cache.suffix_v)
    x_bqd = params.embed[token_bq]
    x_bqd, (new_k, new_v) = _over_layers(body, x_bqd, (params.layers, factors, *kept))

    # The cache, a loop carry, is written in place only if all reading must come first: what is
    # written depends on the last layer by a zero that no compiler sees through.
    zero_bq111 = jnp.minimum(jnp.abs(x_bqd[..., :1]), 0)[..., None, None]

    def put(axis: int, kept: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(kept, new + zero_bq111, cache.step, axis)

    suffix_k = jax.tree.map(functools.partial(put, -1), cache.suffix_k, new_k)
    suffix_v = jax.tree.map(functools.partial(put, -2), cache.suffix_v, new_v)
    x_bqd = rms_norm(x_bqd, params.norm, config.rms_eps)
    cache = cache.replace(suffix_k=suffix_k, suffix_v=suffix_v, step=cache.step + 1)
    return unembed(params, x_bqd), cache
