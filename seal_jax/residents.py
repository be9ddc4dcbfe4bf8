"""The inner loop in lanes: resident candidates' states, and the programs that change them.

`lanes` plans which calls take which steps; here they are made. On a mesh all arrays have a leading
axis of devices: each keeps and changes the states of its own candidates, and no adapter moves.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seal_jax import config as config_lib
from seal_jax import lora, optim, readers, sharding, streams, visits
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
    """Returns the arrays of a call, on a mesh with a leading axis of devices.

    Args:
      taken: Steps of each candidate before it.
      home: Where each candidate is resident.
    """
    share = len(lanes.total_c) // lanes.parts
    t, places = visit.size.t, visit.size.places
    size, wp = (visit.width, visit.size.rows, t), (visit.width, places)
    tokens = np.full(size, lanes.eos_id, np.int32)
    weights, segments = np.zeros(size, np.int8), np.zeros(size, np.int32)
    place = np.full(size, -1, np.int8)
    resident = np.full(wp, lanes.residents, np.int32)
    candidate = np.full(wp, share, np.int32)
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
        resident[w, p], candidate[w, p], steps[w, p] = home[i], i % share, taken[i]
        rates[w, p], totals[w, p] = lanes.learning_rate_c[i], lanes.total_c[i]
    work = Work(resident, candidate, steps, tokens, weights, segments, place, rates, totals)
    return jax.tree.map(lambda x: _by_device(x, lanes.parts), work)


def _moves(
    lanes: Lanes, moves: Sequence[Move], ids: np.ndarray
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields moves as `move` takes them, a few of each device's at a time, and how many count."""
    share = len(lanes.total_c) // lanes.parts
    most = min(_MOVES, lanes.residents)
    by_device: list[list[Move]] = [[] for _ in range(lanes.parts)]
    for own in moves:
        by_device[max(own.leaves, own.enters) // share].append(own)
    longest = max(map(len, by_device))
    for start in range(0, longest, most):
        rows = np.full((lanes.parts * most, 4), (0, share, lanes.residents, 0), np.int64)
        for device, own in enumerate(by_device):
            for at, (resident, leaves, enters) in enumerate(own[start : start + most]):
                row = rows[device * most + at]
                row[0] = resident
                if leaves >= 0:
                    row[1] = leaves % share
                if enters >= 0:
                    row[2:] = resident, ids[enters]
        numbers = rows.astype(np.uint32).view(np.int32)
        yield _by_device(numbers, lanes.parts), min(most, longest - start)


def _by_device(x: np.ndarray, parts: int) -> np.ndarray:
    """Returns an array with a leading axis of devices, where there are several."""
    return x if parts == 1 else x.reshape(parts, -1, *x.shape[1:])


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

    Both are changed in place. That is why the state is a single array: of several, XLA would copy
    at every step, for all residents, those that it may still have to read.

    Args:
      state_c3ex: Adapters and Adam's two moments, flat.
      predicted: See `optim.loss`.
    """

    def of_group(adapters: Adapter, *texts: jax.Array) -> tuple[jax.Array, jax.Array]:
        def losses_of(adapters: Adapter) -> tuple[jax.Array, jax.Array]:
            losses_p = optim.losses(params, adapters, *texts, remat=remat, predicted=predicted)
            return jnp.sum(losses_p), losses_p  # of one candidate each

        if readers.are_apart(params):
            adapters = lora.apart(adapters)
        (_, losses_p), grads = jax.value_and_grad(losses_of, has_aux=True)(adapters)
        return losses_p, jax.vmap(lora.flat)(grads)

    def gradients(own_wpex: jax.Array, work: Work) -> tuple[jax.Array, jax.Array]:
        adapters = jax.vmap(jax.vmap(lambda numbers_ex: lora.unflat(numbers_ex, form)))(own_wpex)
        sound_wp = jax.vmap(jax.vmap(optim.sound))(own_wpex)
        texts = (work.tokens, work.weights, work.segments, work.place, sound_wp)
        return jax.vmap(of_group)(adapters, *texts)

    def stepped(state_c3ex, losses_ci, work: Work, loss_wp, grads_wpex):
        # Joined once: fused with the changes of three arrays, each number would be looked for in
        # all of them.
        grads_kex = jax.lax.optimization_barrier(grads_wpex).reshape(-1, *form.shape)

        def update(k: jax.Array, state_c3ex: jax.Array) -> jax.Array:
            """Takes the step of one candidate, in place."""
            own = (work.resident_wp, work.step_wp, loss_wp, work.learning_rate_wp, work.total_wp)
            at, taken, loss, peak, total = (x_wp.ravel()[k] for x_wp in own)
            rate = lambda step: optim.learning_rate(
                settings.schedule, step, peak, total, settings.warmup_steps
            )
            state, _ = optim.update(
                optim.state(*_at(state_c3ex, at), taken),
                loss,
                _at(grads_kex, k),
                rate,
                clip=settings.clip,
                weight_decay=settings.weight_decay,
            )
            new_3ex = jnp.stack([state.trained, state.moments.mu, state.moments.nu])
            return _put(state_c3ex, at, new_3ex)

        losses_ci = losses_ci.at[work.candidate_wp, work.step_wp].set(loss_wp, mode="drop")
        return jax.lax.fori_loop(0, len(grads_kex), update, state_c3ex), losses_ci

    read = lambda state_c3ex, at_wp: state_c3ex.at[at_wp, 0].get(mode="clip")
    own_wpex = sharding.locally(read)(state_c3ex, work.resident_wp)
    loss_wp, grads_wpex = sharding.each(gradients)(own_wpex, work)
    return sharding.locally(stepped)(state_c3ex, losses_ci, work, loss_wp, grads_wpex)


@functools.partial(
    jax.jit, static_argnames=("config", "settings"), donate_argnames=("state_c3ex", "done_cex")
)
def move(
    state_c3ex: jax.Array,
    done_cex: jax.Array,
    key: jax.Array,
    moves_m4: jax.Array,
    count: jax.Array,
    *,
    config: ModelConfig,
    settings: config_lib.Lora,
) -> tuple[jax.Array, jax.Array]:
    """Returns residents' states and adapters that are done, after some moves; in place.

    Args:
      key: A fresh adapter depends on it and on its candidate's id.
      moves_m4: Resident, who leaves, where one enters (past the last: nobody), and its id.
      count: How many of these count, on every device.
    """

    def moved(state_c3ex, done_cex, moves_m4, key: jax.Array, count: jax.Array):
        def one(k: jax.Array, arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            state_c3ex, done_cex = arrays
            resident, leaves, enters, name = moves_m4[k]
            done_cex = _put(done_cex, leaves, _at(state_c3ex, resident)[0])
            name = jax.lax.bitcast_convert_type(name, jnp.uint32)
            fresh_ex = lora.flat(lora.init(config, settings, jax.random.fold_in(key, name)))
            nothing = jnp.zeros_like(fresh_ex)
            return _put(state_c3ex, enters, jnp.stack([fresh_ex, nothing, nothing])), done_cex

        return jax.lax.fori_loop(0, count, one, (state_c3ex, done_cex))

    return sharding.locally(moved, whole=2)(state_c3ex, done_cex, moves_m4, key, count)


def _at(array_c: jax.Array, at: jax.Array) -> jax.Array:
    """Returns what is at a place, or at the last."""
    return jax.lax.dynamic_index_in_dim(array_c, at, keepdims=False)


def _put(array_c: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the array with something else at a place, or, past the last, as it is.

    In a loop nothing is copied: a scatter of many would need all that they are and become beside
    the array, on a TPU the array too.
    """
    new = jnp.where(at < len(array_c), new, _at(array_c, at))
    return jax.lax.dynamic_update_index_in_dim(array_c, new, at, 0)


@functools.partial(jax.jit, static_argnums=range(5))
def _empty(
    parts: int, residents: int, count: int, room: int, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns states, adapters that are done, and losses, before anybody has moved in."""
    lead = (parts,) if parts > 1 else ()
    shapes = ((residents, 3, *shape), (count, *shape), (count, room))
    return tuple(sharding.constrain_rows(jnp.zeros((*lead, *x), jnp.float32)) for x in shapes)


@functools.partial(jax.jit, static_argnums=1)
def unflat(done_cex: jax.Array, form: lora.Form) -> Adapter:
    """Returns the adapters [c, ...] that lie flat."""
    apart = lambda done_cex: jax.lax.map(lambda own: lora.unflat(own, form), done_cex)
    adapters = sharding.locally(apart)(done_cex)
    return adapters if sharding.current() is None else _joined(adapters)


@jax.jit
def _joined(tree: Any) -> Any:
    """Returns arrays [c, ...] of those with a leading axis of devices."""
    flat = lambda x: sharding.constrain_rows(x.reshape(-1, *x.shape[2:]))
    return jax.tree.map(flat, tree)


def _guarded(name: Hashable, call: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    """Returns call(*arrays); only one thread makes the first call of a program of this name."""
    with streams.first_call(name):
        made = call(*arrays)
    if sharding.current() is not None and jax.default_backend() == "cpu":
        # Of programs under way, those of one device may keep all threads that another waits for.
        jax.block_until_ready(made)
    return made


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
    """Returns the adapters [c, ...] after their inner loops, and losses [c, i], 0 past the last.

    Returns before the device is done.

    Args:
      ids: Of all candidates; a fresh adapter depends on `key` and its candidate's id.
    """
    mesh = sharding.of(params)
    if mesh is None and readers.few_layers(params.config) and not readers.are_apart(params):
        params = readers.apart(params)  # of many layers nothing may be copied
    with sharding.use(mesh):
        return _run(params, lanes, ids, key, adapter, settings, remat, mesh)


def _run(params, lanes: Lanes, ids, key, adapter, settings, remat: bool, mesh):
    """Returns what `run` does; programs are traced for the mesh, if there is one."""
    form = lora.form_of(lora.shapes(params.config, adapter))
    key = sharding.share(key, mesh)
    share = len(lanes.total_c) // lanes.parts
    sizes = (lanes.parts, lanes.residents, share, lanes.room, form.shape)
    state_c3ex, done_cex, losses_ci = _guarded(("empty", sizes, mesh), _empty, sizes)
    taken, home = np.zeros(len(lanes.total_c), np.int32), np.zeros(len(lanes.total_c), np.int32)

    def moved(moves: Sequence[Move]) -> None:
        nonlocal state_c3ex, done_cex
        for own in moves:
            if own.enters >= 0:
                home[own.enters] = own.resident
        for rows, count in _moves(lanes, moves, ids):
            call = functools.partial(move, config=params.config, settings=adapter)
            arrays = (sharding.share_out(rows, mesh), sharding.share(np.int32(count), mesh))
            name = ("move", rows.shape, sizes, form, mesh)
            state_c3ex, done_cex = _guarded(name, call, (state_c3ex, done_cex, key, *arrays))

    for i in lanes.idle:  # an adapter that nobody trains
        moved([Move(0, -1, i)])
        moved([Move(0, i, -1)])
    moved(lanes.start)
    static = {"form": form, "settings": settings, "remat": remat}
    for visit in lanes.visits:
        work = sharding.share_out(_work(lanes, visit, taken, home), mesh)
        taken[[lane.candidate for lane in visit.lanes]] += 1
        call = functools.partial(advance, **static, predicted=visit.size.predicted)
        name = (sizes, visit.width, visit.size, *static.values(), params.config, mesh)
        state_c3ex, losses_ci = _guarded(name, call, (params, state_c3ex, losses_ci, work))
        moved(visit.moves)
    del state_c3ex
    adapters = _guarded(("unflat", sizes, form, mesh), unflat, (done_cex, form))
    return adapters, losses_ci if mesh is None else _joined(losses_ci)
