"""The plan of the inner loop in lanes: which steps of which candidates share a call.

Two plans, made on the host. `alike`: a call takes steps alike in length, each in rows of its own;
for few tokens at a time, as a CPU core is kept busy by. `packed`: a call has rows of one width, in
which steps of several candidates lie side by side; for the thousands of tokens that keep an
accelerator busy. Either way a program depends on the shape of a call alone, of which there are few.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from seal_jax.batching import Step

# Tokens of a text are padded to one of these, closest where most lines of real self-edits end: of
# their tokens 85 to 88 in 100 are then useful, in about ten programs.
_LENGTHS = (24, 32, 40, 48, 64, 96, 128, 160, 208, 256, 320, 384, 512, 768)
# Tokens in a call: as few as keep the device busy, since fewer lanes are easier to fill.
TOKENS = {"cpu": 64, "other": 4096}
_ROW = 256  # tokens in a row of several candidates, where nine in ten steps fit
_PLACES = 8  # candidates in a row at most: each costs the adapters' products once more
_CALL = 256  # a call takes as long as so many tokens more than it has


class Size(NamedTuple):
    """What a call has room for: in each of its groups, rows of t tokens of several candidates.

    Attributes:
      predicted: Tokens of a row that count, at most.
      places: Candidates in a group.
    """

    rows: int
    t: int
    predicted: int
    places: int = 1


class Price(NamedTuple):
    """What a program of its own costs, in the work of a token through the layers.

    Attributes:
      program: Tracing, and reading it from the cache.
      predicted: Logits of a token, there and back.
    """

    program: float
    predicted: float


class Lane(NamedTuple):
    """One step of a candidate in a call, and at which of the call's width x places it stands."""

    candidate: int
    step: int
    at: int


class Move(NamedTuple):
    """A change at a resident's place on its device.

    Attributes:
      leaves: The candidate who is done; -1: nobody was there.
      enters: The next one; -1: nobody.
    """

    resident: int
    leaves: int
    enters: int


class Visit(NamedTuple):
    """One call: `width` groups of `size`, the steps taken in them, and who moves after it."""

    lanes: tuple[Lane, ...]
    width: int
    size: Size
    moves: tuple[Move, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the call, padding included."""
        return self.width * self.size.rows * self.size.t


class Plan(NamedTuple):
    """Who moves in at first, and all calls."""

    start: tuple[Move, ...]
    visits: list[Visit]


def tokens_of(step: Step) -> int:
    """Returns the tokens of a step, all its rows laid end to end."""
    return sum(len(text.tokens) for row in step for text in row)


def counted(step: Step) -> int:
    """Returns how many tokens of a step count in its loss."""
    return sum(int(np.count_nonzero(text.weights)) for row in step for text in row)


def size_of(step: Step) -> Size:
    """Returns what holds a step: a power of two of rows, one of few lengths and few parts of it."""
    longest = max(sum(len(text.tokens) for text in row) for row in step)
    t = _round_up(longest)
    count = max(sum(int(np.count_nonzero(text.weights)) for text in row) for row in step)
    return Size(1 << (len(step) - 1).bit_length(), t, _part(t, count))


def _round_up(length: int) -> int:
    return next((x for x in _LENGTHS if x >= length), -(-length // 256) * 256)


def _part(t: int, count: int) -> int:
    """Returns the least half, quarter, ... of t that holds a count: few programs differ in it."""
    while t >= 2 * max(count, _LENGTHS[0]):
        t //= 2
    return t


def few(steps: Mapping[Size, int], price: Price) -> dict[Size, Size]:
    """Returns for each size the one that its steps run in, so that each is worth its program.

    The size whose steps cost the least more in a larger one joins it, as long as that is less than
    the price of a program.

    Args:
      steps: How many there are of each size.
    """

    def more(small: Size, large: Size) -> tuple[float, Size]:
        """Returns what joining costs, and the size in which both run."""
        both = large._replace(predicted=max(small.predicted, large.predicted))
        work = lambda size: size.rows * (size.t + price.predicted * size.predicted)
        return sum(left[x] * (work(both) - work(x)) for x in {small, large}), both

    left, runs_in = dict(steps), {size: size for size in steps}
    while True:
        holds = [(a, b) for a in left for b in left if a != b and a.rows <= b.rows and a.t <= b.t]
        if not holds:
            return runs_in
        (cost, both), pair = min((more(*pair), pair) for pair in holds)
        if cost >= price.program:
            return runs_in
        count = sum(left.pop(x) for x in pair)
        left[both] = left.get(both, 0) + count
        runs_in = {size: both if own in pair else own for size, own in runs_in.items()}


def most_tokens(tokens: int = 0) -> int:
    """Returns the tokens of a call: those asked for, or as the device likes it."""
    return tokens or TOKENS["cpu" if jax.default_backend() == "cpu" else "other"]


def width_of(size: Size, residents: int, tokens: int = 0) -> int:
    """Returns the lanes of a call of `alike` (`tokens` as in `most_tokens`)."""
    return max(1, min(residents, most_tokens(tokens) // (size.rows * size.t)))


def alike(
    sizes: Sequence[list[Size]], queues: Sequence[np.ndarray], tokens: int, residents: int
) -> Plan:
    """Returns the calls that take every candidate through its queue of steps, alike in length.

    Each call is of the size that fills most of its lanes at that moment; lanes left over go to
    candidates whose next step is smaller. Those with the most steps ahead of them go first.

    Args:
      sizes: Of each candidate's steps.
    """
    on = _Progress(queues, residents)
    start, visits = tuple(on.start), []
    while on.live:
        ready: dict[Size, list[int]] = {}
        for i in on.first():
            ready.setdefault(sizes[i][on.next(i)], []).append(i)
        fills = [
            (min(1.0, len(own) / width_of(size, residents, tokens)), on.left[own[0]], size)
            for size, own in ready.items()
        ]
        size = max(fills)[2]
        width = width_of(size, residents, tokens)
        others = [s for s in sorted(ready, key=lambda s: -s.rows * s.t) if s != size]
        others = [s for s in others if all(a <= b for a, b in zip(s, size, strict=True))]
        chosen = [i for s in [size, *others] for i in ready[s]][:width]
        visits.append(on.visit(chosen, range(len(chosen)), width, size))
    return Plan(start, visits)


def packed(
    steps: Sequence[list[Step]],
    queues: Sequence[np.ndarray],
    shapes: Sequence[tuple[int, Size]],
    residents: int,
    parts: int = 1,
) -> Plan:
    """Returns the calls that take every candidate through its queue of steps, several in a row.

    Each call is of the shape that does most per token and fixed cost; those with the most steps
    ahead of them go first, since nobody can help them later. A step goes where it leaves the least
    room. One who is done makes room for the next at once, so that few calls are ill filled.

    Args:
      shapes: As `shapes_for` returns them.
      residents: On each device.
      parts: Devices, which make each call together, every one with groups, residents and an equal
        share of the candidates of its own.
    """
    sizes = [[(tokens_of(step), counted(step)) for step in own] for own in steps]
    share = -(-len(queues) // parts)
    own = [range(k * share, (k + 1) * share) for k in range(parts)]
    devices = [_Progress(queues, residents, some) for some in own]
    start, visits = tuple(move for on in devices for move in on.start), []
    while any(on.live for on in devices):
        waiting = [[(i, *sizes[i][on.next(i)]) for i in on.first()] for on in devices]
        best = None
        for width, size in shapes:
            filled = [_fill(own, width, size) for own in waiting]
            worth = sum(useful for _, useful in filled) / (width * size.t + _CALL)
            placed = [own for own, _ in filled]
            if any(w and w[0][0] not in own for w, own in zip(waiting, placed, strict=True)):
                worth /= 2  # or it would wait for ever
            if any(placed) and (best is None or worth > best[0]):
                best = (worth, placed, width, size)
        _, placed, width, size = best
        lanes, moves = [], []
        for k, (on, own) in enumerate(zip(devices, placed, strict=True)):
            first = k * width * size.places
            taken = on.visit(list(own), [first + at for at in own.values()], width, size)
            lanes += taken.lanes
            moves += taken.moves
        visits.append(Visit(tuple(lanes), parts * width, size, tuple(moves)))
    return Plan(start, visits)


def _fill(
    waiting: Sequence[tuple[int, int, int]], width: int, size: Size
) -> tuple[dict[int, int], int]:
    """Returns which candidates find a place, and the tokens they bring.

    Args:
      waiting: Of each a candidate, the tokens of its next step, and how many of them count.
    """
    free = [size.t] * width
    rest = [size.predicted] * width
    used = [0] * width
    placed, useful = {}, 0
    for i, tokens, count in waiting:
        row = -1
        for k in range(width):
            fits = free[k] >= tokens and rest[k] >= count and used[k] < size.places
            if fits and (row < 0 or free[k] < free[row]):
                row = k
        if row >= 0:
            placed[i] = row * size.places + used[row]
            used[row] += 1
            free[row] -= tokens
            rest[row] -= count
            useful += tokens
    return placed, useful


def shapes_for(
    steps: Sequence[list[Step]], residents: int, tokens: int = 0
) -> list[tuple[int, Size]]:
    """Returns the shapes (width, Size) that `packed` chooses from: two, for each is a program.

    Rows that hold nine in ten steps, as many as the residents fill at once; and a single one that
    holds the longest step, also for when few are left. More shapes were hardly filled better.

    Args:
      steps: Of all candidates, so that all chunks share the shapes.
      tokens: See `most_tokens`.
    """
    every = [step for own in steps for step in own]
    lengths = np.array([tokens_of(step) for step in every])
    counts = np.array([counted(step) for step in every])
    longest, most = _round_up(int(lengths.max())), _round_up(int(np.quantile(lengths, 0.9)))
    typical = max(1, int(lengths.mean()))
    supply = max(1, min(residents * typical, most_tokens(tokens)))
    t = max(most, min(_ROW, 1 << (supply.bit_length() - 1)))
    share = counts.sum() / lengths.sum()
    places = max(1, min(_PLACES, residents, round(1.4 * t / typical)))
    top = 1 << max(0, (supply // t).bit_length() - 1)
    common = counts[lengths <= t]
    predicted = max(_part(t, int(1.2 * share * t)), _part(t, int(common.max())))
    size = Size(1, t, predicted, places)
    if t < longest:
        last = Size(1, longest, _part(longest, int(counts.max())), places)
    else:
        last = size
    return [(top, size)] + [(1, last)] * (top > 1 or last != size)


class _Progress:
    """How far every candidate is, who is resident, and who comes next."""

    def __init__(
        self, queues: Sequence[np.ndarray], residents: int, own: range | None = None
    ) -> None:
        """Of the candidates `own` (all by default)."""
        self.queues = queues
        self.at = [0] * len(queues)
        self.left = [len(queue) for queue in queues]
        own = range(len(queues)) if own is None else own
        with_steps = [i for i in own if i < len(queues) and self.left[i]]
        self.waiting = sorted(with_steps, key=lambda i: (self.left[i], -i))
        places = range(min(residents, len(with_steps)))
        self.start = [Move(k, -1, self.waiting.pop()) for k in places]
        self.live = {move.enters: move.resident for move in self.start}  # and where they are

    def next(self, i: int) -> int:
        """Returns the step that a candidate takes next."""
        return int(self.queues[i][self.at[i]])

    def first(self) -> list[int]:
        """Returns residents, those with the most steps left first."""
        return sorted(self.live, key=lambda i: (-self.left[i], i))

    def visit(self, chosen: Sequence[int], places: Iterable[int], width: int, size: Size) -> Visit:
        """Returns the call in which these take their next step."""
        lanes = tuple(Lane(i, self.next(i), at) for i, at in zip(chosen, places, strict=True))
        moves = []
        for i in chosen:
            self.at[i] += 1
            self.left[i] -= 1
            if not self.left[i]:
                resident = self.live.pop(i)
                enters = self.waiting.pop() if self.waiting else -1
                moves.append(Move(resident, i, enters))
                if enters >= 0:
                    self.live[enters] = resident
        return Visit(lanes, width, size, tuple(moves))
