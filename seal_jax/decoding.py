"""The program that generates: prefill, then a loop over tokens until every sequence has ended.

The loop stands outside `vmap`, so that it ends early and the cache is updated in place.
"""

import functools

import jax
import jax.numpy as jnp

from seal_jax import model, sharding
from seal_jax.grammar import Grammar
from seal_jax.lora import Adapter
from seal_jax.model import Cache
from seal_jax.params import Params

_CACHE_AXES = Cache(0, 0, 0, 0, 0, None)


def keep_top_p(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Returns logits [..., v] with all but the nucleus at -inf.

    The nucleus is the smallest set of most likely tokens with at least `top_p` of the mass; tokens
    as likely as the least likely of them are in it. No sort: halving finds the least likelihood, 31
    sums over the vocabulary, which compiles and runs far faster where the vocabulary is large.
    """
    chances = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # Floats that are not negative lie in the order of their bits.
    bits = jax.lax.bitcast_convert_type(chances, jnp.int32)
    top = jnp.max(bits, axis=-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds  # the mass from `low` on is enough, that from `high` on is not
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(bits >= middle, chances, 0.0), axis=-1, keepdims=True)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top + 1))
    return jnp.where(bits >= low, logits, -jnp.inf)


def first_largest(values: jax.Array) -> jax.Array:
    """Returns argmax over the last axis; two plain reductions, which a CPU does far faster.

    Of a row with a NaN in it, the last place.
    """
    size = values.shape[-1]
    places = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    largest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(values == largest, places, size - 1), axis=-1)


def draw(
    logits_v: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array, nucleus: bool
) -> jax.Array:
    """Returns one token drawn from softmax(logits / temperature), within the nucleus if asked."""
    logits_v = logits_v / temperature
    if nucleus:
        logits_v = keep_top_p(logits_v, top_p)
    # As jax.random.categorical draws.
    return first_largest(logits_v + jax.random.gumbel(key, logits_v.shape, logits_v.dtype))


@functools.partial(
    jax.jit, static_argnames=("samples", "room", "greedy", "nucleus", "own_adapters")
)
def run(
    params: Params,
    adapters: Adapter | None,
    tokens_cbt: jax.Array,
    length_cb: jax.Array,
    ids_cb: jax.Array,
    key: jax.Array,
    ends: jax.Array,
    limit: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    grammar: Grammar | None = None,
    *,
    samples: int,
    room: int,
    greedy: bool,
    nucleus: bool,
    own_adapters: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns tokens and log-probabilities [c, b, q, m]; their number, and if they ended [c, b, q].

    Args:
      length_cb: True lengths; 0 is a filler row, which is done from the start.
      ids_cb: Names of the rows, folded into the key.
      ends: Ids that end a sequence.
      limit: Tokens to generate at most; `room` is the static bound.
      grammar: What may follow what; log-probabilities are the model's all the same.
      own_adapters: Whether `adapters` has a `c` axis.
    """
    params = model.layers_apart(params)
    axis = 0 if own_adapters else None
    c, b, _ = tokens_cbt.shape
    number = jnp.arange(samples)
    keys_cbq = jax.vmap(jax.vmap(lambda i: jax.vmap(lambda q: _key(key, i, q))(number)))(ids_cb)

    def choose(logits_cbqv, step, rule_cbq):
        logits_cbqv = sharding.constrain_rows(logits_cbqv)  # each device sorts its own
        offered_cbqv = logits_cbqv
        if grammar is not None:
            offered_cbqv = jnp.where(grammar.allowed(rule_cbq), logits_cbqv, -jnp.inf)
        if greedy:
            token = first_largest(offered_cbqv)
        else:
            one = lambda logits, own: draw(
                logits, jax.random.fold_in(own, step), temperature, top_p, nucleus
            )
            token = jax.vmap(jax.vmap(jax.vmap(one)))(offered_cbqv, keys_cbq)
        chosen = jnp.take_along_axis(logits_cbqv, token[..., None], -1)[..., 0]
        if grammar is not None:
            rule_cbq = grammar.after(rule_cbq, token)
        logprob = chosen - jax.nn.logsumexp(logits_cbqv, -1)
        return token.astype(jnp.int32), logprob, rule_cbq

    start = functools.partial(model.prefill, samples=samples, room=room)
    start = sharding.vmap(start, in_axes=(None, axis, 0, 0), out_axes=(0, _CACHE_AXES))
    go_on = sharding.vmap(
        model.decode_step, in_axes=(None, axis, 0, _CACHE_AXES), out_axes=(0, _CACHE_AXES)
    )
    logits_cbv, cache = start(params, adapters, tokens_cbt, jnp.maximum(length_cb, 1))
    shape = (c, b, samples)
    logits = jnp.broadcast_to(logits_cbv[:, :, None], (*shape, logits_cbv.shape[-1]))
    token, logprob, rule = choose(logits, 0, jnp.zeros(shape, jnp.int32))

    def record(state_arrays, token, logprob, done, step):
        out, logprobs, count = state_arrays
        ended = jnp.any(token[..., None] == ends, -1)
        keep = ~done & ~ended
        at = (0, 0, 0, step)
        out = jax.lax.dynamic_update_slice(out, jnp.where(keep, token, 0)[..., None], at)
        logprob = jnp.where(keep, logprob, 0.0)[..., None]
        logprobs = jax.lax.dynamic_update_slice(logprobs, logprob, at)
        return (out, logprobs, count + keep), done | ended

    arrays = (
        jnp.zeros((*shape, room), jnp.int32),
        jnp.zeros((*shape, room), jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )
    done = jnp.broadcast_to((length_cb == 0)[..., None], shape)
    arrays, done = record(arrays, token, logprob, done, 0)

    def unfinished(state):
        step, _, done, *_ = state
        return (step < limit) & ~jnp.all(done)

    def advance(state):
        step, token, done, rule, cache, arrays = state
        logits, cache = go_on(params, adapters, token, cache)
        token, logprob, rule = choose(logits, step, rule)
        arrays, done = record(arrays, token, logprob, done, step)
        return step + 1, token, done, rule, cache, arrays

    state = (jnp.int32(1), token, done, rule, cache, arrays)
    _, _, done, _, _, arrays = jax.lax.while_loop(unfinished, advance, state)
    return sharding.whole((*arrays, done))


def _key(key: jax.Array, row: jax.Array, sample: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, row), sample)
