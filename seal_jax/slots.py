"""Slots instead of padding: a batch as arrays of few fixed shapes, for one compiled program.

Each candidate's texts are sorted by length, and slot j holds the j-th longest of every candidate,
padded only to a bucket that fits the longest among them. All chunks of a call share one set of
buckets. With `batch_size: 0` all texts of a candidate are one optimizer step, packed into rows in
which each text sees itself alone.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from flax import struct

from seal_jax.batching import Batch, Step

if TYPE_CHECKING:
    from seal_jax.lanes import Lanes

_GRID = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768)
_BUCKETS = 4  # programs inside the program
_BUCKET_COST = 1 << 16  # compiling one takes as long as processing about this many tokens


@struct.dataclass
class Slots:
    """Arrays of a chunk of candidates, and the order in which the steps visit them.

    Tuples have one entry for each bucket length t. Without `c`, the same for all candidates.

    Attributes:
      tokens, weights, segments: [c, m, b, t] each.
      bucket_i, row_i: Where step i finds its texts.
      active_ci: Whether candidate c takes step i.
      visits: Steps to run; later ones are padding.
      learning_rate_c: Peak rate.
      total_c: Steps each candidate takes.
    """

    tokens: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...]
    segments: tuple[jax.Array, ...]
    bucket_i: jax.Array
    row_i: jax.Array
    active_ci: jax.Array
    visits: jax.Array
    learning_rate_c: jax.Array
    total_c: jax.Array


SHARED = ("bucket_i", "row_i", "visits")  # fields of Slots without a candidate axis


class Chunk(NamedTuple):
    """Candidates that run together.

    Attributes:
      index: Their places in the batch, [c]; -1 is a filler.
      slots: Their arrays; of `lanes.arrange` the texts and the calls that take them.
      useful: Tokens of their training texts, once for each epoch.
      processed: Tokens processed to train on them, padding included.
      executed: Steps executed, those that train nobody included.
    """

    index: np.ndarray
    slots: "Slots | Lanes"
    useful: int
    processed: int
    executed: int


def _width(step: Step) -> int:
    return max(sum(len(text.tokens) for text in row) for row in step)


def round_up(length: int) -> int:
    """Returns the smallest bucket length that holds `length` tokens."""
    for size in _GRID:
        if length <= size:
            return size
    return -(-length // 256) * 256


def buckets(lengths: Sequence[int], visits: int = 1 << 30, most: int = _BUCKETS) -> tuple[int, ...]:
    """Returns lengths that hold all given ones with the least padding and compile time in all.

    Args:
      visits: How often each of `lengths` is processed.
      most: Lengths at most.
    """
    values, counts = np.unique([round_up(x) for x in lengths], return_counts=True)
    n = len(values)
    best = {(0, 0): (0, ())}
    for k in range(1, most + 1):
        for j in range(1, n + 1):
            options = [
                (best[i, k - 1][0] + int(values[j - 1] * counts[i:j].sum()) * visits, i)
                for i in range(j)
                if (i, k - 1) in best
            ]
            if options:
                cost, i = min(options)
                best[j, k] = (cost + _BUCKET_COST, (*best[i, k - 1][1], int(values[j - 1])))
    return min(best[n, k] for k in range(1, most + 1) if (n, k) in best)[1]


def arrange(batch: Batch, chunk: int, key: jax.Array, multiple: int = 1) -> Iterator[Chunk]:
    """Yields chunks of `chunk` candidates each, similar in number of steps, all of one shape.

    A candidate's own texts and their order depend on `key` and on it alone, never on its company.

    Args:
      chunk: Candidates in a program; 0 takes all in one.
      key: Draws the order of steps in each epoch.
      multiple: Chunks are filled up to a multiple of it (of the devices that share them out).
    """
    steps = batch.steps
    order = by_work(batch)
    chunk = -(-min(chunk or len(order), len(order)) // multiple) * multiple
    groups = [order[i : i + chunk] for i in range(0, len(order), chunk)]
    widths = [_group_widths([steps[i] for i in group]) for group in groups]
    every = [w for group in widths for w in group]
    rows = max((len(s) for own in steps for s in own), default=1)
    epochs = max((c.epochs for c in batch.candidates), default=0)
    lengths = buckets(every, epochs * rows * chunk) if every else (_GRID[0],)
    homes = [[next(k for k, t in enumerate(lengths) if t >= w) for w in g] for g in widths]
    shape = _Shape(
        lengths=lengths,
        rooms=[max(1, *(h.count(k) for h in homes)) for k in range(len(lengths))],
        rows=rows,
        visits=_visits(batch, groups, steps),
        candidates=chunk,
        eos_id=batch.eos_id,
    )
    for group, home in zip(groups, homes, strict=True):
        yield _chunk(batch, group, steps, home, shape, key)


class _Shape(NamedTuple):
    lengths: tuple[int, ...]
    rooms: list[int]
    rows: int
    visits: int
    candidates: int
    eos_id: int


def _group_widths(group: list[list[Step]]) -> list[int]:
    """Returns the tokens each slot needs, over a group of candidates."""
    most = max((len(own) for own in group), default=0)
    return [max(_width(own[j]) for own in group if j < len(own)) for j in range(most)]


def _visits(batch: Batch, groups: list[list[int]], steps: list) -> int:
    """Returns the most steps any group runs: those in which some candidate of it is active."""

    def count(group: list[int]) -> int:
        own = [(batch.candidates[i].epochs, len(steps[i])) for i in group]
        last = max(epochs for epochs, _ in own)
        return sum(max(n for epochs, n in own if epochs > e) for e in range(last))

    return max(map(count, groups), default=0)


def _chunk(batch, group, steps, home, shape: _Shape, key) -> Chunk:
    c = shape.candidates
    tokens, weights, segments = [], [], []
    for room, t in zip(shape.rooms, shape.lengths, strict=True):
        size = (c, room, shape.rows, t)
        tokens.append(np.full(size, shape.eos_id, np.int32))
        weights.append(np.zeros(size, np.int8))
        segments.append(np.zeros(size, np.int32))
    place, taken = [], collections.Counter()
    for k in home:
        place.append((k, taken[k]))
        taken[k] += 1
    for at, i in enumerate(group):
        for j, step in enumerate(steps[i]):
            k, m = place[j]
            write(step, tokens[k][at, m], weights[k][at, m], segments[k][at, m])
    slots_c = np.array([len(steps[i]) for i in group], int)
    epochs_c = np.array([batch.candidates[i].epochs for i in group], int)
    epoch_i, slot_i = order(int(epochs_c.max(initial=0)), len(home), key)
    active = (slot_i[None] < slots_c[:, None]) & (epoch_i[None] < epochs_c[:, None])
    slot_i, active = slot_i[active.any(0)], active[:, active.any(0)]
    fill = max(shape.visits, 1) - len(slot_i)
    rates = np.zeros(c, np.float32)
    rates[: len(group)] = [batch.candidates[i].learning_rate for i in group]
    index = np.full(c, -1)
    index[: len(group)] = group
    where = np.array([place[j] for j in slot_i], np.int32).reshape(-1, 2)
    where = np.pad(where, ((0, fill), (0, 0)))
    padded = np.array([shape.lengths[k] * shape.rows for k in where[: len(slot_i), 0]], int)
    return Chunk(
        index,
        Slots(
            tokens=tuple(tokens),
            weights=tuple(weights),
            segments=tuple(segments),
            bucket_i=where[:, 0],
            row_i=where[:, 1],
            active_ci=np.pad(active, ((0, c - len(group)), (0, fill))),
            visits=np.int32(len(slot_i)),
            learning_rate_c=rates,
            total_c=np.pad(slots_c * epochs_c, (0, c - len(group))).astype(np.int32),
        ),
        useful(batch, group),
        int(padded.sum()) * c,
        len(slot_i) * c,
    )


def by_work(batch: Batch) -> list[int]:
    """Returns candidates in the order in which chunks take them: those with most steps first."""
    steps, total = batch.steps, batch.total
    longest = [_width(own[0]) if own else 0 for own in steps]
    return sorted(range(len(total)), key=lambda i: (-total[i], -len(steps[i]), -longest[i], i))


def useful(batch: Batch, group: Sequence[int]) -> int:
    """Returns the tokens of some candidates' training texts, once for each epoch."""
    own = (batch.candidates[i] for i in group)
    return sum(c.epochs * sum(len(text.tokens) for text in c.texts) for c in own)


def write(
    step: Step,
    tokens_bt: np.ndarray,
    weights_bt: np.ndarray,
    segments_bt: np.ndarray,
    first: int = 1,
) -> None:
    """Writes the texts of a step into its rows, as segments `first` and on."""
    for row, texts in enumerate(step):
        start = 0
        for number, text in enumerate(texts, first):
            span = (row, slice(start, start + len(text.tokens)))
            tokens_bt[span], weights_bt[span] = text.tokens, text.weights
            segments_bt[span] = number
            segments_bt[row, start + text.real : start + len(text.tokens)] *= -1
            start += len(text.tokens)


def order(epochs: int, slots: int, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns epoch and slot of each step: every epoch visits all slots in a random order.

    A slot's place in the order is a random number of its own, so that a candidate with fewer slots
    sees the order it would see alone.
    """
    words = [int(x) for x in np.asarray(jax.random.key_data(key)).ravel()]
    order = [np.argsort(np.random.default_rng([*words, e]).random(slots)) for e in range(epochs)]
    slot_i = np.concatenate(order) if order else np.zeros(0, int)
    return np.repeat(np.arange(epochs), slots), slot_i.astype(int)
