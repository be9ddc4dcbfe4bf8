"""The programs that generate: prefill, then a loop over tokens until every sequence has ended.

The loop stands outside `vmap`, so that it ends early and the cache is updated in place. Of long
sequences the cache grows by and by, each time in another program: what is reserved is read too.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from seal_jax import lora, model, readers, sharding
from seal_jax.grammar import Grammar
from seal_jax.lora import Adapter
from seal_jax.model import Cache
from seal_jax.params import Params


def _cache_axes(params: Params) -> Cache:
    """Returns where c stands in a cache: behind the layers of a stack, which a scan takes apart.
    Before them, all of it would be turned around at every step."""
    c = 0 if readers.are_apart(params) else 1
    return Cache(c, c, c, c, 0, None)


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


def first_largest(values: jax.Array, parts: int = 1) -> jax.Array:
    """Returns argmax over the last axis; two plain reductions, which a CPU does far faster.

    Of a row with a NaN in it, the last place.

    Args:
      parts: Pieces that were joined to make the values. They are looked through one by one, so
        that the compiler need not join them.
    """
    size = values.shape[-1]
    places = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    pairs = list(zip(*(jnp.array_split(x, parts, axis=-1) for x in (values, places)), strict=True))
    largest = [jnp.max(part, axis=-1, keepdims=True) for part, _ in pairs]
    largest = functools.reduce(jnp.maximum, largest)
    first = [jnp.min(jnp.where(x == largest, place, size - 1), axis=-1) for x, place in pairs]
    return functools.reduce(jnp.minimum, first)


def draw(
    logits_v: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array, nucleus: bool
) -> jax.Array:
    """Returns one token drawn from softmax(logits / temperature), within the nucleus if asked."""
    logits_v = logits_v / temperature
    if nucleus:
        logits_v = keep_top_p(logits_v, top_p)
    # As jax.random.categorical draws.
    return first_largest(logits_v + jax.random.gumbel(key, logits_v.shape, logits_v.dtype))


@struct.dataclass
class State:
    """Sequences on their way, [c, b, q] of them, with room for m tokens each.

    Attributes:
      step: Tokens made of each, those after its end included.
      token, rule: The last token, and where it left the grammar.
      done: Whether a sequence has ended.
      tokens, logprobs: [c, b, q, m]; of log-probabilities None, unless they are wanted.
      count: Tokens of a sequence before its end.
    """

    step: jax.Array
    token: jax.Array
    done: jax.Array
    rule: jax.Array
    cache: Cache
    tokens: jax.Array
    logprobs: jax.Array | None
    count: jax.Array


@struct.dataclass
class Draws:
    """What decides on the tokens besides the model.

    Attributes:
      ids_cb: Names of the rows, folded into the key.
      ends: Ids that end a sequence.
      limit: Tokens to generate at most.
      grammar: What may follow what; log-probabilities are the model's all the same.
      greedy: Take the most likely token (static).
      nucleus: Draw within `top_p` (static).
      scored: Keep log-probabilities (static): a sum over the vocabulary for each token.
      columns: The vocabulary lies over all devices (static), each of which makes its part of
        everybody's logits.
    """

    ids_cb: jax.Array
    key: jax.Array
    ends: jax.Array
    limit: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    grammar: Grammar | None
    greedy: bool = struct.field(pytree_node=False)
    nucleus: bool = struct.field(pytree_node=False)
    scored: bool = struct.field(pytree_node=False)
    columns: bool = struct.field(pytree_node=False, default=False)


@functools.partial(jax.jit, static_argnames=("samples", "room", "own_adapters", "keep"))
def run(
    params: Params,
    adapters: Adapter | None,
    tokens_cbt: jax.Array,
    length_cb: jax.Array,
    draws: Draws,
    *,
    samples: int,
    room: int,
    own_adapters: bool,
    keep: bool = False,
) -> State:
    """Returns the sequences after up to `room` tokens: of their state what a host wants to see.

    Args:
      length_cb: True lengths; 0 is a filler row, which is done from the start.
      own_adapters: Whether `adapters` has a `c` axis.
      keep: Return all of the state, to go on from.
    """
    params, adapters = _readable(params, adapters, own_adapters)
    axis = 0 if own_adapters else None
    c, b, t = tokens_cbt.shape
    start = functools.partial(model.prefill, samples=samples, room=room)
    start = sharding.vmap(start, in_axes=(None, axis, 0, 0), out_axes=(0, _cache_axes(params)))
    logits_cbv, cache = start(params, adapters, tokens_cbt, jnp.maximum(length_cb, 1))
    shape = (c, b, samples)
    logits = jnp.broadcast_to(logits_cbv[:, :, None], (*shape, logits_cbv.shape[-1]))
    none = jnp.zeros(shape, jnp.int32)
    state = State(
        step=jnp.zeros((), jnp.int32),
        token=none,
        done=jnp.broadcast_to((length_cb == 0)[..., None], shape),
        rule=none,
        cache=cache,
        tokens=jnp.zeros((*shape, room), jnp.int32),
        logprobs=jnp.zeros((*shape, room), jnp.float32) if draws.scored else None,
        count=none,
    )
    state = _chosen(state, logits, _keys(draws, samples), draws, _head_parts(params))
    return _seen(_loop(params, adapters, state, draws, axis), keep)


@functools.partial(jax.jit, static_argnames=("room", "own_adapters", "keep"))
def go_on(
    params: Params,
    adapters: Adapter | None,
    state: State,
    draws: Draws,
    *,
    room: int,
    own_adapters: bool,
    keep: bool = False,
) -> State:
    """Returns the sequences after up to `room` tokens in all; see `run`."""
    params, adapters = _readable(params, adapters, own_adapters)
    more = room - state.tokens.shape[-1]

    def longer(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, more)
        return jnp.pad(x, widths)

    grow = lambda tree, axis: jax.tree.map(functools.partial(longer, axis=axis), tree)
    suffix = {
        "suffix_k": grow(state.cache.suffix_k, -1),
        "suffix_v": grow(state.cache.suffix_v, -2),
    }
    state = state.replace(
        cache=state.cache.replace(**suffix),
        tokens=grow(state.tokens, -1),
        logprobs=grow(state.logprobs, -1),
    )
    return _seen(_loop(params, adapters, state, draws, 0 if own_adapters else None), keep)


def _readable(params: Params, adapters: Adapter | None, own_adapters: bool):
    """Returns weights and adapters as every step reads them: layers apart, of one dtype."""
    params = readers.layers_apart(params)
    if adapters is None:
        return params, None
    adapters = jax.tree.map(lambda x: x.astype(params.embed.dtype), adapters)
    if not readers.are_apart(params):
        return params, adapters
    if own_adapters:
        return params, lora.apart(adapters)
    return params, jax.tree.map(list, adapters)


@jax.jit
def take_rows(state: State, row_b: jax.Array, draws: Draws) -> tuple[State, Draws]:
    """Returns the state of some rows of each c, and their draws; those of row -1 are done."""
    take = lambda axis: lambda x: jnp.take(x, row_b, axis=axis, mode="clip")
    each = {name: jax.tree.map(take(1), getattr(state, name)) for name in _ROWS}
    each["done"] |= (row_b < 0)[:, None]
    cache = state.cache
    names = ("prefix_k", "prefix_v", "suffix_k", "suffix_v")
    stacked = 1 if isinstance(cache.prefix_k, list) else 2  # layers stand before the rows
    kept = {name: jax.tree.map(take(stacked), getattr(cache, name)) for name in names}
    cache = cache.replace(**kept, length_b=take(1)(cache.length_b))
    return state.replace(cache=cache, **each), draws.replace(ids_cb=take(1)(draws.ids_cb))


_ROWS = ("token", "done", "rule", "tokens", "logprobs", "count")


def _keys(draws: Draws, samples: int) -> jax.Array:
    """Returns a key for each sequence, [c, b, q]."""
    number = jnp.arange(samples)
    one = lambda row, sample: jax.random.fold_in(jax.random.fold_in(draws.key, row), sample)
    return jax.vmap(jax.vmap(lambda i: jax.vmap(lambda q: one(i, q))(number)))(draws.ids_cb)


def _head_parts(params: Params) -> int:
    return len(params.head) if isinstance(params.head, list) else 1


def _chosen(
    state: State, logits_cbqv: jax.Array, keys_cbq: jax.Array, draws: Draws, parts: int
) -> State:
    """Returns the state after one more token of each sequence; the head has so many parts."""
    logits_cbqv = sharding.constrain_rows(logits_cbqv, draws.columns)  # each chooses for its own
    offered_cbqv = logits_cbqv
    if draws.grammar is not None:
        offered_cbqv = jnp.where(draws.grammar.allowed(state.rule), logits_cbqv, -jnp.inf)
    if draws.greedy:
        token = first_largest(offered_cbqv, parts)
    else:
        one = lambda logits, own: draw(
            logits,
            jax.random.fold_in(own, state.step),
            draws.temperature,
            draws.top_p,
            draws.nucleus,
        )
        token = jax.vmap(jax.vmap(jax.vmap(one)))(offered_cbqv, keys_cbq)
    rule = state.rule if draws.grammar is None else draws.grammar.after(state.rule, token)
    token = token.astype(jnp.int32)
    ended = jnp.any(token[..., None] == draws.ends, -1)
    keep = ~state.done & ~ended
    put = lambda every, one: jax.lax.dynamic_update_slice_in_dim(
        every, jnp.where(keep, one, 0)[..., None], state.step, axis=-1
    )
    logprobs = state.logprobs
    if draws.scored:
        chosen = jnp.take_along_axis(logits_cbqv, token[..., None], -1)[..., 0]
        logprobs = put(logprobs, chosen - jax.nn.logsumexp(logits_cbqv, -1))
    return state.replace(
        step=state.step + 1,
        token=token,
        done=state.done | ended,
        rule=rule,
        tokens=put(state.tokens, token),
        logprobs=logprobs,
        count=state.count + keep,
    )


def _loop(params, adapters, state: State, draws: Draws, axis: int | None) -> State:
    """Returns the state once all sequences have ended, or the room or the limit is reached."""
    keys_cbq = _keys(draws, state.token.shape[-1])
    cached = _cache_axes(params)
    step_on = sharding.vmap(
        model.decode_step, in_axes=(None, axis, 0, cached), out_axes=(0, cached)
    )
    most = jnp.minimum(draws.limit, state.tokens.shape[-1])
    parts = _head_parts(params)

    def unfinished(state: State) -> jax.Array:
        return (state.step < most) & ~jnp.all(state.done)

    def advance(state: State) -> State:
        logits_cbqv, cache = step_on(params, adapters, state.token, state.cache)
        state = state.replace(cache=_laid_out(cache))
        return _chosen(state, logits_cbqv, keys_cbq, draws, parts)

    return jax.lax.while_loop(unfinished, advance, state)


def _laid_out(cache: Cache) -> Cache:
    """Returns the cache of a loop as its products read it, on a TPU.

    There it would lie as it is written, and all of it be copied at every step to be read. The last
    dimension is filled up to 128: of narrow heads, tokens stand there.
    """

    def pinned(x: jax.Array, swapped: bool) -> jax.Array:
        *first, one, other = range(x.ndim)
        order = (*first, other, one) if swapped else (*first, one, other)
        pin = lambda x: with_layout_constraint(x, Layout(major_to_minor=order))
        return jax.lax.platform_dependent(x, tpu=pin, default=lambda x: x)

    narrow = jax.tree.leaves(cache.suffix_v)[0].shape[-1] % 128 != 0
    return cache.replace(
        suffix_k=jax.tree.map(lambda x: pinned(x, False), cache.suffix_k),
        suffix_v=jax.tree.map(lambda x: pinned(x, narrow), cache.suffix_v),
    )


def _seen(state: State, keep: bool) -> State:
    names = ("step", "done", "tokens", "logprobs", "count")
    made = {name: sharding.whole(getattr(state, name)) for name in names}
    return (
        state.replace(**made) if keep else state.replace(**made, cache=None, token=None, rule=None)
    )
