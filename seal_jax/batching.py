"""Training texts of many candidates as token arrays of few fixed shapes, with little padding.

Slots: each candidate's texts are sorted by length, and slot j holds the j-th longest of every
candidate, padded only to a bucket that fits the longest among them. All chunks of a call share one
set of buckets and so one compiled program. With `batch_size: 0` all texts of a candidate are one
optimizer step, packed into rows in which each text sees itself alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct

from seal_jax import config as config_lib
from seal_jax.errors import SelfEditError
from seal_jax.tasks import Context, Edit, Task

_GRID = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768)
_BUCKETS = 4  # programs inside the program
_BUCKET_COST = 1 << 16  # compiling one takes as long as processing about this many tokens
_ROW = 512  # texts of a full batch are packed into rows of about this many tokens


class SelfEdit(NamedTuple):
    """A self-edit as written: for which context, the how-manieth, and its text."""

    context: Context
    index: int
    text: str


class Text(NamedTuple):
    """A tokenised training text.

    Attributes:
      tokens: [t].
      weights: [t], how much predicting each token counts (0 or 1).
      real: Tokens that are text; the rest is padding that is trained on (`pad_loss`).
    """

    tokens: np.ndarray
    weights: np.ndarray
    real: int


class Candidate(NamedTuple):
    """What one candidate trains on. `error` says why a self-edit cannot be applied (no texts)."""

    texts: tuple[Text, ...]
    learning_rate: float
    epochs: int
    id: int
    error: str | None = None


class Batch(NamedTuple):
    """Candidates in the order of their self-edits; `arrange` makes arrays of them."""

    candidates: tuple[Candidate, ...]
    settings: config_lib.Inner
    eos_id: int

    def __len__(self) -> int:
        return len(self.candidates)


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
    """Candidates that run together: their places in the batch (-1: filler), and their arrays."""

    index: np.ndarray
    slots: Slots
    useful: int
    processed: int


def identity(*parts: Any) -> int:
    """Returns 32 bits that name these parts, the same on every machine and run."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def tokenize(edit: Edit, tokenizer: Any, eos_id: int, settings: config_lib.Inner) -> list[Text]:
    """Returns an edit's examples as tokens, each ended by one EOS and cut to `max_length`.

    With `pad_loss` each is instead padded with EOS to `max_length` and all of it counts, as the
    reference does.
    """
    texts = []
    for example in edit.examples:
        prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
        # Special tokens (Llama's BOS) open a text once.
        start = not example.prompt
        body = tokenizer(example.completion, add_special_tokens=start)["input_ids"]
        counts = [int(edit.loss_on == "all")] * len(prompt) + [1] * len(body)
        tokens = [*prompt, *body]
        size = max(0, settings.max_length - len(tokens)) if settings.pad_loss else 1
        tokens = (tokens + [eos_id] * size)[: settings.max_length]
        counts = (counts + [1] * size)[: settings.max_length]
        # The first token is never predicted; only the reference counts it in its mean.
        counts[0] *= settings.pad_loss
        real = len(tokens) - size if settings.pad_loss else len(tokens)
        texts.append(Text(np.asarray(tokens, np.int32), np.asarray(counts, np.int8), real))
    return texts


def pack(
    task: Task, edits: Sequence, tokenizer: Any, settings: config_lib.Inner, *, eos_id=None
) -> Batch:
    """Returns what each self-edit trains on, as a batch with candidates first.

    A self-edit that cannot be applied trains nothing and carries the reason.

    Args:
      edits: SelfEdits, or lists of them (one list per context, as `sample_edits` returns).
      eos_id: Ends a text; the tokenizer's by default.
    """
    eos_id = tokenizer.eos_token_id if eos_id is None else eos_id
    candidates = []
    for item in edits:
        for written in [item] if isinstance(item, SelfEdit) else item:
            candidates.append(_candidate(task, written, tokenizer, eos_id, settings))
    return Batch(tuple(candidates), settings, eos_id)


def _candidate(task, written, tokenizer, eos_id, settings) -> Candidate:
    name = identity(written.context.id, written.index)
    try:
        edit = task.edit(written.context, written.text)
    except SelfEditError as error:
        return Candidate((), settings.learning_rate, 0, name, str(error))
    texts = tuple(tokenize(edit, tokenizer, eos_id, settings))
    rate = settings.learning_rate if edit.learning_rate is None else edit.learning_rate
    epochs = settings.epochs if edit.epochs is None else edit.epochs
    steps = epochs * len(_steps(texts, settings.batch_size))
    if settings.max_steps and steps > settings.max_steps:
        reason = f"asks for {steps} steps, more than {settings.max_steps}"
        return Candidate((), rate, 0, name, reason)
    return Candidate(texts, rate, epochs, name)


def _steps(texts: Sequence[Text], batch_size: int) -> list[list[list[Text]]]:
    """Returns the texts of each optimizer step of an epoch, as rows of texts, longest first."""
    ordered = sorted(texts, key=lambda text: -len(text.tokens))  # stable: ties in file order
    if batch_size:
        starts = range(0, len(ordered), batch_size)
        return [[[text] for text in ordered[i : i + batch_size]] for i in starts]
    rows: list[list[Text]] = []
    for text in ordered:
        size = len(text.tokens)
        home = next((r for r in rows if sum(len(x.tokens) for x in r) + size <= _ROW), None)
        if home is None:
            rows.append([text])
        else:
            home.append(text)
    return [rows] if rows else []


def _width(step: list[list[Text]]) -> int:
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


def arrange(batch: Batch, chunk: int, key: jax.Array) -> Iterator[Chunk]:
    """Yields chunks of `chunk` candidates each, similar in number of steps, all of one shape.

    A candidate's own texts and their order depend on `key` and on it alone, never on its company.

    Args:
      chunk: Candidates in a program; 0 takes all in one.
      key: Draws the order of steps in each epoch.
    """
    steps = [_steps(c.texts, batch.settings.batch_size) for c in batch.candidates]
    total = [c.epochs * len(s) for c, s in zip(batch.candidates, steps, strict=True)]
    longest = [_width(own[0]) if own else 0 for own in steps]
    order = sorted(range(len(total)), key=lambda i: (-total[i], -len(steps[i]), -longest[i], i))
    chunk = min(chunk or len(order), len(order))
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


def _group_widths(group: list[list[list[list[Text]]]]) -> list[int]:
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
    place = [(k, home[:j].count(k)) for j, k in enumerate(home)]
    for at, i in enumerate(group):
        for j, step in enumerate(steps[i]):
            k, m = place[j]
            for row, texts in enumerate(step):
                start = 0
                for number, text in enumerate(texts, 1):
                    span = (at, m, row, slice(start, start + len(text.tokens)))
                    tokens[k][span], weights[k][span] = text.tokens, text.weights
                    segments[k][span] = number
                    segments[k][at, m, row, start + text.real : start + len(text.tokens)] *= -1
                    start += len(text.tokens)
    slots_c = np.array([len(steps[i]) for i in group], int)
    epochs_c = np.array([batch.candidates[i].epochs for i in group], int)
    epoch_i, slot_i = _order(int(epochs_c.max(initial=0)), len(home), key)
    active = (slot_i[None] < slots_c[:, None]) & (epoch_i[None] < epochs_c[:, None])
    slot_i, active = slot_i[active.any(0)], active[:, active.any(0)]
    fill = max(shape.visits, 1) - len(slot_i)
    rates = np.zeros(c, np.float32)
    rates[: len(group)] = [batch.candidates[i].learning_rate for i in group]
    index = np.full(c, -1)
    index[: len(group)] = group
    where = np.array([place[j] for j in slot_i], np.int32).reshape(-1, 2)
    where = np.pad(where, ((0, fill), (0, 0)))
    useful = sum(
        batch.candidates[i].epochs * sum(len(x.tokens) for x in batch.candidates[i].texts)
        for i in group
    )
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
        useful,
        int(padded.sum()) * c,
    )


def _order(epochs: int, slots: int, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns epoch and slot of each step: every epoch visits all slots in a random order.

    A slot's place in the order is a random number of its own, so that a candidate with fewer slots
    sees the order it would see alone.
    """
    words = [int(x) for x in np.asarray(jax.random.key_data(key)).ravel()]
    order = [np.argsort(np.random.default_rng([*words, e]).random(slots)) for e in range(epochs)]
    slot_i = np.concatenate(order) if order else np.zeros(0, int)
    return np.repeat(np.arange(epochs), slots), slot_i.astype(int)
