"""A batch in lanes: many candidates at their own pace, some of them in each call.

`slots` runs a chunk in lockstep: every candidate waits for the longest text and the longest list.
Here one call of a program (`residents`) takes one step each of some candidates that are resident;
the host plans which (`visits`), and who moves in when another is done. Little is padded, and a
program depends on the number of residents and the shape of the call alone: it is the same in every
chunk, round and run, so that the cache of compiled programs has it. On a mesh each device has its
own candidates, and all make the same calls, so that the frozen weights are gathered once for each.
"""

import collections
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from seal_jax import slots as slots_lib
from seal_jax import visits
from seal_jax.batching import Batch, Step
from seal_jax.slots import Chunk
from seal_jax.visits import Move, Price, Size, Visit

_ALIKE = 512  # of calls with more tokens, steps of several candidates share a row
LOSSES = 512  # room for the losses of a candidate, so that few programs differ in it
# Chunks' worth of candidates that share the places of one, where calls are packed.
GROUP = 4


class Lanes(NamedTuple):
    """What a chunk of candidates trains on, and in which calls.

    Attributes:
      start: Who moves in before the first call.
      visits: The calls, in order.
      steps: Per candidate, the steps of an epoch.
      learning_rate_c: Peak rate.
      total_c: Steps each candidate takes.
      idle: Those who take none.
      residents: Candidates whose states are held at a time, on each device.
      room: Losses to keep of each, the same for all chunks.
      eos_id: Fills what is padding.
      parts: Devices; an equal part of the candidates is on each.
    """

    start: tuple[Move, ...]
    visits: list[Visit]
    steps: list[list[Step]]
    learning_rate_c: np.ndarray
    total_c: np.ndarray
    idle: tuple[int, ...]
    residents: int
    room: int
    eos_id: int
    parts: int = 1


class Shapes(NamedTuple):
    """What the programs of a batch depend on besides a call's own shape.

    Attributes:
      packed: Whether steps of several residents share a row.
      residents: Candidates whose states are held at a time, on each device.
      chunk: Candidates of a chunk, on each device.
      room: Losses kept of each.
      calls: The shapes of calls (width, Size) that packing chooses from.
    """

    packed: bool
    residents: int
    chunk: int
    room: int
    calls: list[tuple[int, Size]]


def shapes_of(
    batch: Batch, residents: int, tokens: int = 0, packed: bool | None = None, parts: int = 1
) -> Shapes:
    """Returns the shapes of a batch; the arguments are those of `arrange`."""
    most = 1 << max(len(batch) - 1, 0).bit_length()
    residents = -(-min(residents or len(batch), most) // parts)
    most = -(-most // parts)
    room = LOSSES
    while room < max(batch.total, default=0):
        room *= 2
    packed = visits.most_tokens(tokens) > _ALIKE if packed is None else packed
    packed = any(batch.total) and (parts > 1 or (packed and residents > 1))
    calls = visits.shapes_for(batch.steps, residents, tokens) if packed else []
    return Shapes(
        packed, residents, min(GROUP * residents, most) if packed else residents, room, calls
    )


class Call(NamedTuple):
    """What a call's program depends on of a batch: `width` groups of `size` on each device, the
    rest as Shapes."""

    residents: int
    width: int
    size: Size
    chunk: int = 0
    room: int = 0


def largest_call(
    batch: Batch, residents: int, tokens: int = 0, packed: bool | None = None, parts: int = 1
) -> Call:
    """Returns the call with the most tokens that `arrange` plans; the arguments are its own."""
    shapes = shapes_of(batch, residents, tokens, packed, parts)
    if shapes.packed:
        width, size = max(shapes.calls, key=lambda x: x[0] * x[1].t)
    else:
        # A call of smaller steps may hold more tokens, since more of them fit.
        sizes = map(visits.size_of, itertools.chain(*batch.steps))
        calls = [(visits.width_of(size, shapes.residents, tokens), size) for size in sizes]
        width, size = max(calls, key=lambda x: (x[0] * x[1].rows * x[1].t, x[1].t))
        size = size._replace(predicted=size.t)
    return Call(shapes.residents, width, size, shapes.chunk, shapes.room)


def arrange(
    batch: Batch,
    residents: int,
    key: jax.Array,
    tokens: int = 0,
    packed: bool | None = None,
    price: Price | None = None,
    parts: int = 1,
) -> Iterator[Chunk]:
    """Yields chunks of candidates, similar in number of steps.

    A candidate's own texts and their order depend on `key` and on it alone, never on its company;
    they are those of `slots.arrange`.

    Args:
      residents: Candidates whose states are held at a time, on all devices together; 0 takes all.
      key: Draws the order of steps in each epoch.
      tokens: Tokens in a call, about; 0 chooses by the device.
      packed: Whether steps of several candidates share a row; None chooses by the device.
      price: Where they do not: what a program must be worth; None: a program for every size.
      parts: Devices; with several, calls are packed.
    """
    steps, total = batch.steps, batch.total
    order = slots_lib.by_work(batch)
    shapes = shapes_of(batch, residents, tokens, packed, parts)
    # Of all chunks together, so that their number changes no size.
    sizes = [] if shapes.packed else _sizes(steps, [c.epochs for c in batch.candidates], price)
    order_of = functools.cache(lambda epochs, n: slots_lib.order(epochs, n, key)[1])
    residents, chunk = shapes.residents, parts * shapes.chunk
    for start in range(0, len(order), chunk):
        group = order[start : start + chunk]
        index = _dealt(group, total, shapes.chunk, parts)
        places = np.flatnonzero(index >= 0)
        rates, counts = np.zeros(chunk, np.float32), np.zeros(chunk, np.int32)
        own: list[list[Step]] = [[] for _ in range(chunk)]
        queues = [np.zeros(0, int)] * chunk
        for at, i in zip(places, index[places], strict=True):
            own[at], queues[at] = steps[i], order_of(batch.candidates[i].epochs, len(steps[i]))
            rates[at], counts[at] = batch.candidates[i].learning_rate, total[i]
        if shapes.packed:
            plan = visits.packed(own, queues, shapes.calls, residents, parts)
        else:
            plan = visits.alike([sizes[i] for i in group], queues, tokens, residents)
        idle = tuple(int(at) for at in places if not counts[at])
        sizes_of = (residents, shapes.room, batch.eos_id, parts)
        lanes = Lanes(*plan, own, rates, counts, idle, *sizes_of)
        useful = slots_lib.useful(batch, group)
        processed = sum(v.tokens for v in plan.visits)
        # A place left empty in a row of many costs next to nothing; a row of its own costs all.
        executed = sum(len(v.lanes) if shapes.packed else v.width for v in plan.visits)
        yield Chunk(index, lanes, useful, processed, executed)


def _dealt(group: Sequence[int], total: Sequence[int], share: int, parts: int) -> np.ndarray:
    """Returns who stands at each place of a chunk (-1: nobody), `share` places on each device.

    Each goes where fewest steps are as yet, so that no device waits long for another.
    """
    hands: list[list[int]] = [[] for _ in range(parts)]
    for i in group:  # those with most steps come first
        room = [hand for hand in hands if len(hand) < share]
        min(room, key=lambda hand: sum(total[j] for j in hand)).append(i)
    return np.array([(hand + [-1] * share)[:share] for hand in hands]).ravel()


def _sizes(
    steps: Sequence[list[Step]], epochs: Sequence[int], price: Price | None
) -> list[list[Size]]:
    """Returns the size that each step runs in; see `visits.few`."""
    sizes = [[visits.size_of(step) for step in own] for own in steps]
    if price is None:
        return sizes
    counts: collections.Counter[Size] = collections.Counter()
    for own, times in zip(sizes, epochs, strict=True):
        counts.update({size: times * n for size, n in collections.Counter(own).items() if times})
    runs_in = visits.few(counts, price)
    return [[runs_in.get(size, size) for size in own] for own in sizes]
