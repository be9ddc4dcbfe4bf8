"""The inner loop on one device: many candidates at their own pace, a few of them in each call.

`slots` runs a chunk in lockstep: every candidate waits for the longest text and the longest list.
Here one call of a small program takes one step each of the few candidates whose next texts are
alike in length; the host plans which. Little is padded, and a program depends on the number of
resident candidates, lanes, rows and tokens alone: it is the same in every chunk, round and run, so
that the cache of compiled programs has it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seal_jax import config as config_lib
from seal_jax import lora, model, optim, streams
from seal_jax import slots as slots_lib
from seal_jax.batching import Batch, Text, steps_of
from seal_jax.lora import Adapter
from seal_jax.params import Params
from seal_jax.slots import Chunk

# Tokens of a text are padded to one of these: 4 in 5 tokens of real self-edits are then useful.
_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
# Tokens in a call: as few as keep the device busy, since fewer lanes are easier to fill.
_TOKENS = {"cpu": 64, "other": 1024}
LOSSES = 512  # room for the losses of a candidate, so that few programs differ in it

Step = list[list[Text]]  # rows of texts


class Size(NamedTuple):
    """What a call has room for in each lane: rows of t tokens, of which `predicted` count."""

    rows: int
    t: int
    predicted: int


class Visit(NamedTuple):
    """One call: for each lane which candidate takes which of its steps."""

    lanes: tuple[tuple[int, int], ...]
    width: int
    size: Size


class Lanes(NamedTuple):
    """What a chunk of candidates trains on, and in which calls.

    Attributes:
      steps: Per candidate, the steps of an epoch.
      total_c: Steps each candidate takes.
      room: Losses to keep of each, the same for all chunks.
    """

    visits: list[Visit]
    steps: list[list[Step]]
    learning_rate_c: np.ndarray
    total_c: np.ndarray
    room: int
    eos_id: int


@struct.dataclass
class Work:
    """Arrays of one call; lane k is candidate `lane_k` (c: nobody), which took `step_k` before."""

    lane_k: jax.Array
    step_k: jax.Array
    tokens: jax.Array
    weights: jax.Array
    segments: jax.Array
    learning_rate_k: jax.Array
    total_k: jax.Array


def arrange(batch: Batch, chunk: int, key: jax.Array, tokens: int = 0) -> Iterator[Chunk]:
    """Yields chunks of `chunk` candidates each, similar in number of steps.

    A candidate's own texts and their order depend on `key` and on it alone, never on its company;
    they are those of `slots.arrange`.

    Args:
      chunk: Candidates resident at a time; 0 takes all.
      key: Draws the order of steps in each epoch.
      tokens: Tokens in a call, about; 0 chooses by the device.
    """
    steps = [steps_of(c.texts, batch.settings.batch_size) for c in batch.candidates]
    total = [c.epochs * len(s) for c, s in zip(batch.candidates, steps, strict=True)]
    order = slots_lib.by_work(steps, total)
    chunk = min(chunk or len(order), 1 << max(len(order) - 1, 0).bit_length())
    room = LOSSES
    while room < max(total, default=0):
        room *= 2
    order_of = functools.cache(lambda epochs, n: slots_lib.order(epochs, n, key)[1])
    for start in range(0, len(order), chunk):
        group = order[start : start + chunk]
        index = np.full(chunk, -1)
        index[: len(group)] = group
        queues = [order_of(batch.candidates[i].epochs, len(steps[i])) for i in group]
        visits = _plan([steps[i] for i in group], queues, tokens, chunk)
        rates, counts = np.zeros(chunk, np.float32), np.zeros(chunk, np.int32)
        rates[: len(group)] = [batch.candidates[i].learning_rate for i in group]
        counts[: len(group)] = [total[i] for i in group]
        own = [steps[i] for i in group]
        lanes = Lanes(visits, own, rates, counts, room, batch.eos_id)
        useful = sum(
            batch.candidates[i].epochs * sum(len(x.tokens) for x in batch.candidates[i].texts)
            for i in group
        )
        processed = sum(v.width * v.size.rows * v.size.t for v in visits)
        yield Chunk(index, lanes, useful, processed, sum(v.width for v in visits))


def size_of(step: Step) -> Size:
    """Returns what holds a step: a power of two of rows, one of few lengths and few parts of it."""
    longest = max(sum(len(text.tokens) for text in row) for row in step)
    t = next((x for x in _LENGTHS if x >= longest), -(-longest // 256) * 256)
    count = max(sum(int(np.count_nonzero(text.weights)) for text in row) for row in step)
    predicted = t
    while predicted >= 2 * max(count, _LENGTHS[0]):  # halves: few programs differ in it
        predicted //= 2
    return Size(1 << (len(step) - 1).bit_length(), t, predicted)


def width_of(size: Size, chunk: int, tokens: int = 0) -> int:
    """Returns the lanes of a call of this size (`tokens` as in `arrange`)."""
    tokens = tokens or _TOKENS["cpu" if jax.default_backend() == "cpu" else "other"]
    return max(1, min(chunk, tokens // (size.rows * size.t)))


def _plan(
    steps: Sequence[list[Step]], queues: Sequence[np.ndarray], tokens: int, chunk: int
) -> list[Visit]:
    """Returns the calls that take every candidate through its queue of steps.

    Each call is of the size that fills most of its lanes at that moment; lanes left over go to
    candidates whose next step is smaller. Those with the most steps ahead of them go first.
    """
    sizes = [[size_of(step) for step in own] for own in steps]
    at = [0] * len(steps)
    left = [len(queue) for queue in queues]
    live = {i for i, n in enumerate(left) if n}
    visits = []
    while live:
        ready: dict[Size, list[int]] = {}
        for i in sorted(live, key=lambda i: (-left[i], i)):
            ready.setdefault(sizes[i][queues[i][at[i]]], []).append(i)
        fills = [
            (min(1.0, len(own) / width_of(size, chunk, tokens)), left[own[0]], size)
            for size, own in ready.items()
        ]
        size = max(fills)[2]
        width = width_of(size, chunk, tokens)
        others = [s for s in sorted(ready, key=lambda s: -s.rows * s.t) if s != size]
        others = [s for s in others if all(a <= b for a, b in zip(s, size, strict=True))]
        chosen = [i for s in [size, *others] for i in ready[s]][:width]
        visits.append(Visit(tuple((i, int(queues[i][at[i]])) for i in chosen), width, size))
        for i in chosen:
            at[i] += 1
            left[i] -= 1
            if not left[i]:
                live.remove(i)
    return visits


def _work(lanes: Lanes, visit: Visit, taken: np.ndarray) -> Work:
    """Returns the arrays of a call; `taken` counts the steps of each candidate before it."""
    size = (visit.width, visit.size.rows, visit.size.t)
    tokens = np.full(size, lanes.eos_id, np.int32)
    weights, segments = np.zeros(size, np.int8), np.zeros(size, np.int32)
    lane = np.full(visit.width, len(lanes.total_c), np.int32)
    rates = np.zeros(visit.width, np.float32)
    steps, totals = np.zeros(visit.width, np.int32), np.zeros(visit.width, np.int32)
    for k, (i, j) in enumerate(visit.lanes):
        slots_lib.write(lanes.steps[i][j], tokens[k], weights[k], segments[k])
        lane[k], steps[k] = i, taken[i]
        rates[k], totals[k] = lanes.learning_rate_c[i], lanes.total_c[i]
    return Work(lane, steps, tokens, weights, segments, rates, totals)


@functools.partial(
    jax.jit,
    static_argnames=("form", "settings", "remat", "predicted"),
    donate_argnames=("state_c3p", "losses_ci"),
)
def advance(
    params: Params,
    state_c3p: jax.Array,
    losses_ci: jax.Array,
    work: Work,
    *,
    form: lora.Form,
    settings: config_lib.Inner,
    remat: bool,
    predicted: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the candidates' states after one step of some, and their losses.

    Both are changed in place. The state is a single array for that: of several, XLA copies those
    that it may still read for another one's change, all candidates' at every step.

    Args:
      state_c3p: Adapters and Adam's two moments, flat.
      predicted: See `optim.loss`.
    """

    def one(state_3p, taken, tokens_bt, weights_bt, segments_bt, peak, total):
        rate = lambda step: optim.learning_rate(
            settings.schedule, step, peak, total, settings.warmup_steps
        )
        texts = (tokens_bt, weights_bt, segments_bt)
        loss_of = lambda adapter: optim.loss(
            params, adapter, *texts, remat=remat, predicted=predicted
        )
        adapter, *moments = (lora.unflat(numbers_p, form) for numbers_p in state_3p)
        state = optim.state(adapter, *moments, taken)
        state, seen = optim.step(
            state, loss_of, rate, clip=settings.clip, weight_decay=settings.weight_decay
        )
        kept = (state.trained, state.moments.mu, state.moments.nu)
        return jnp.stack([lora.flat(part) for part in kept]), seen.loss

    own_k3p = state_c3p.at[work.lane_k].get(mode="clip")
    new_k3p, loss_k = jax.vmap(one)(
        own_k3p,
        work.step_k,
        work.tokens,
        work.weights,
        work.segments,
        work.learning_rate_k,
        work.total_k,
    )
    losses_ci = losses_ci.at[work.lane_k, work.step_k].set(loss_k, mode="drop")
    return state_c3p.at[work.lane_k].set(new_k3p, mode="drop"), losses_ci


@jax.jit
def _start(adapters: Adapter) -> jax.Array:
    numbers_cp = jax.vmap(lora.flat)(adapters)
    nothing = jnp.zeros_like(numbers_cp)
    return jnp.stack([numbers_cp, nothing, nothing], axis=1)


@functools.partial(jax.jit, static_argnames="form")
def _end(state_c3p: jax.Array, form: lora.Form) -> Adapter:
    return jax.vmap(lambda state_3p: lora.unflat(state_3p[0], form))(state_c3p)


def run(
    params: Params, adapters: Adapter, lanes: Lanes, *, settings: config_lib.Inner, remat: bool
) -> tuple[Adapter, jax.Array]:
    """Returns the adapters [c, ...] after their inner loops, and losses [c, i], NaN past the last.

    Returns before the device is done.
    """
    if model.few_layers(params.config):  # of many layers nothing may be copied
        params = model.apart(params)
    form = lora.form_of(jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), adapters))
    state_c3p = _start(adapters)
    losses_ci = jax.device_put(np.full((len(lanes.total_c), lanes.room), np.nan, np.float32))
    taken = np.zeros(len(lanes.total_c), np.int32)
    for visit in lanes.visits:
        work = jax.device_put(_work(lanes, visit, taken))
        taken[[i for i, _ in visit.lanes]] += 1
        static = {"form": form, "settings": settings, "remat": remat}
        static["predicted"] = visit.size.predicted
        program = (visit.width, visit.size, losses_ci.shape, form, settings, params.config)
        with streams.first_call(program):
            state_c3p, losses_ci = advance(params, state_c3p, losses_ci, work, **static)
    return _end(state_c3p, form), losses_ci
