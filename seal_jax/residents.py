"""The inner loop on one device: resident candidates' states, and the programs that change them.

`lanes` plans which calls take which steps; here they are made.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seal_jax import config as config_lib
from seal_jax import lora, optim, readers, streams, visits
from seal_jax import slots as slots_lib
from seal_jax.lanes import Lanes
from seal_jax.lora import Adapter
from seal_jax.params import ModelConfig, Params
from seal_jax.visits import Move, Visit

_MOVES = 8  # candidates that move at once


@struct.dataclass
class Work:
    """Arrays of one call: of w groups, each with the steps of p candidates.

    Attributes:
      resident_wp: Where their states are; past the last: nobody.
      candidate_wp: Who they are, for the losses.
      step_wp: Steps they took before.
      tokens, weights, segments: [w, b, t].
      place: [w, b, t], to which of the p a token belongs; -1: padding.
    """

    resident_wp: jax.Array
    candidate_wp: jax.Array
    step_wp: jax.Array
    tokens: jax.Array
    weights: jax.Array
    segments: jax.Array
    place: jax.Array
    learning_rate_wp: jax.Array
    total_wp: jax.Array


def _work(lanes: Lanes, visit: Visit, taken: np.ndarray, home: np.ndarray) -> Work:
    """Returns the arrays of a call.

    Args:
      taken: Steps of each candidate before it.
      home: Where each candidate is resident.
    """
    _, _, t, places = rows_t = (visit.width, visit.size.rows, visit.size.t, visit.size.places)
    size, wp = rows_t[:3], (visit.width, places)
    tokens = np.full(size, lanes.eos_id, np.int32)
    weights, segments = np.zeros(size, np.int8), np.zeros(size, np.int32)
    place = np.full(size, -1, np.int8)
    resident, candidate = np.full(wp, lanes.residents, np.int32), np.full(wp, len(lanes.total_c))
    rates, steps, totals = np.zeros(wp, np.float32), np.zeros(wp, np.int32), np.zeros(wp, np.int32)
    used = np.zeros(visit.width, int)
    for i, j, at in visit.lanes:
        w, p = divmod(at, places)
        rows = lanes.steps[i][j]
        span = (w,)
        if visit.size.rows == 1:  # side by side, with whatever stands there already
            rows = [[text for row in rows for text in row]]
            end = used[w] + visits.tokens_of(rows)
            span = (w, slice(None), slice(used[w], end))
            used[w] = end
        slots_lib.write(rows, tokens[span], weights[span], segments[span], 1 + p * t)
        place[span] = p
        resident[w, p], candidate[w, p], steps[w, p] = home[i], i, taken[i]
        rates[w, p], totals[w, p] = lanes.learning_rate_c[i], lanes.total_c[i]
    candidate = candidate.astype(np.int32)
    return Work(resident, candidate, steps, tokens, weights, segments, place, rates, totals)


@functools.partial(
    jax.jit,
    static_argnames=("form", "settings", "remat", "predicted"),
    donate_argnames=("state_c3ex", "losses_ci"),
)
def advance(
    params: Params,
    state_c3ex: jax.Array,
    losses_ci: jax.Array,
    work: Work,
    *,
    form: lora.Form,
    settings: config_lib.Inner,
    remat: bool,
    predicted: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the residents' states after one step of some, and the candidates' losses.

    Both are changed in place. The state is a single array for that: of several, XLA copies those
    that it may still read for another one's change, all residents' at every step.

    Args:
      state_c3ex: Adapters and Adam's two moments, flat.
      predicted: See `optim.loss`.
    """

    def one(state_p3ex, taken_p, tokens_bt, weights_bt, segments_bt, place_bt, peak_p, total_p):
        texts = (tokens_bt, weights_bt, segments_bt, place_bt)

        def losses_of(adapters: Adapter) -> tuple[jax.Array, jax.Array]:
            losses_p = optim.losses(params, adapters, *texts, remat=remat, predicted=predicted)
            return jnp.sum(losses_p), losses_p  # of one candidate each

        adapters = jax.vmap(lambda state_3ex: lora.unflat(state_3ex[0], form))(state_p3ex)
        if readers.are_apart(params):
            adapters = lora.apart(adapters)
        (_, losses_p), grads = jax.value_and_grad(losses_of, has_aux=True)(adapters)
        # Joined once: fused with the three changes below, each number would be looked for in all.
        grads_pex = jax.lax.optimization_barrier(jax.vmap(lora.flat)(grads))

        def update(state_3ex, taken, loss, grads_ex, peak, total):
            rate = lambda step: optim.learning_rate(
                settings.schedule, step, peak, total, settings.warmup_steps
            )
            state, _ = optim.update(
                optim.state(*state_3ex, taken),
                loss,
                grads_ex,
                rate,
                clip=settings.clip,
                weight_decay=settings.weight_decay,
            )
            return jnp.stack([state.trained, state.moments.mu, state.moments.nu])

        every = (state_p3ex, taken_p, losses_p, grads_pex, peak_p, total_p)
        return jax.vmap(update)(*every), losses_p

    own_wp3ex = state_c3ex.at[work.resident_wp].get(mode="clip")
    new_wp3ex, loss_wp = jax.vmap(one)(
        own_wp3ex,
        work.step_wp,
        work.tokens,
        work.weights,
        work.segments,
        work.place,
        work.learning_rate_wp,
        work.total_wp,
    )
    losses_ci = losses_ci.at[work.candidate_wp, work.step_wp].set(loss_wp, mode="drop")
    return state_c3ex.at[work.resident_wp].set(new_wp3ex, mode="drop"), losses_ci


@functools.partial(
    jax.jit, static_argnames=("config", "settings"), donate_argnames=("state_c3ex", "done_cex")
)
def move(
    state_c3ex: jax.Array,
    done_cex: jax.Array,
    key: jax.Array,
    moves_m4: jax.Array,
    *,
    config: ModelConfig,
    settings: config_lib.Lora,
) -> tuple[jax.Array, jax.Array]:
    """Returns residents' states and adapters that are done, after some moves; in place.

    Args:
      key: A fresh adapter depends on it and on its candidate's id.
      moves_m4: Resident, who leaves, where one enters (past the last: nobody), and its id.
    """
    resident, leaves, enters, ids = moves_m4.T
    done_cex = done_cex.at[leaves].set(state_c3ex.at[resident, 0].get(mode="clip"), mode="drop")
    fresh = lambda name: lora.flat(lora.init(config, settings, jax.random.fold_in(key, name)))
    fresh_mex = jax.vmap(fresh)(jax.lax.bitcast_convert_type(ids, jnp.uint32))
    nothing = jnp.zeros_like(fresh_mex)
    start_m3ex = jnp.stack([fresh_mex, nothing, nothing], axis=1)
    return state_c3ex.at[enters].set(start_m3ex, mode="drop"), done_cex


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(residents: int, count: int, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((residents, 3, *shape), jnp.float32), jnp.zeros((count, *shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _unflat(done_cex: jax.Array, form: lora.Form) -> Adapter:
    return jax.vmap(lambda numbers_ex: lora.unflat(numbers_ex, form))(done_cex)


def _guarded(name: Hashable, call: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    with streams.first_call(name):
        return call(*arrays)


def run(
    params: Params,
    lanes: Lanes,
    ids: np.ndarray,
    key: jax.Array,
    adapter: config_lib.Lora,
    *,
    settings: config_lib.Inner,
    remat: bool,
) -> tuple[Adapter, jax.Array]:
    """Returns the adapters [c, ...] after their inner loops, and losses [c, i], NaN past the last.

    Returns before the device is done.

    Args:
      ids: Of all candidates; a fresh adapter depends on `key` and its candidate's id.
    """
    if readers.few_layers(params.config) and not readers.are_apart(params):
        params = readers.apart(params)  # of many layers nothing may be copied
    form = lora.form_of(lora.shapes(params.config, adapter))
    count = len(lanes.total_c)
    sizes = (lanes.residents, count, form.shape)
    state_c3ex, done_cex = _guarded(("empty", sizes), _empty, sizes)
    losses_ci = jax.device_put(np.full((count, lanes.room), np.nan, np.float32))
    taken, home = np.zeros(count, np.int32), np.zeros(count, np.int32)

    def moved(moves: Sequence[Move]) -> None:
        nonlocal state_c3ex, done_cex
        most = min(_MOVES, lanes.residents)
        for part in (moves[at : at + most] for at in range(0, len(moves), most)):
            rows = np.full((most, 4), (0, count, lanes.residents, 0), np.int64)
            for row, (resident, leaves, enters) in zip(rows, part, strict=False):
                row[0] = resident
                if leaves >= 0:
                    row[1] = leaves
                if enters >= 0:
                    row[2:] = resident, ids[enters]
                    home[enters] = resident
            moves_m4 = jax.device_put(rows.astype(np.uint32).view(np.int32))
            static = {"config": params.config, "settings": adapter}
            call = functools.partial(move, **static)
            name = ("move", rows.shape, sizes, form)
            state_c3ex, done_cex = _guarded(name, call, (state_c3ex, done_cex, key, moves_m4))

    for i in np.flatnonzero(lanes.total_c == 0):  # an adapter that nobody trains
        if i < len(lanes.steps):
            moved([Move(0, -1, int(i))])
            moved([Move(0, int(i), -1)])
    moved(lanes.start)
    static = {"form": form, "settings": settings, "remat": remat}
    for visit in lanes.visits:
        work = jax.device_put(_work(lanes, visit, taken, home))
        taken[[lane.candidate for lane in visit.lanes]] += 1
        call = functools.partial(advance, **static, predicted=visit.size.predicted)
        shapes = (state_c3ex.shape, losses_ci.shape, visit.width, visit.size)
        name = (shapes, *static.values(), params.config)
        state_c3ex, losses_ci = _guarded(name, call, (params, state_c3ex, losses_ci, work))
        moved(visit.moves)
    del state_c3ex
    return _guarded(("unflat", count, form), _unflat, (done_cex, form)), losses_ci
