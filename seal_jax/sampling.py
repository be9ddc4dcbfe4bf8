"""Generation: many prompts, many samples of each, many adapters, in tiles of few shapes.

A prompt is read once for all its samples. Each sequence draws from a key of its own, so what is
drawn does not depend on its company.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from seal_jax import decoding, lora
from seal_jax import grammar as grammar_lib
from seal_jax import slots as slots_lib
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError
from seal_jax.grammar import Automaton, Grammar
from seal_jax.lora import Adapter

_ROOM = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ROWS = {"cpu": 64, "other": 256}  # sequences decoded together by default


class Output(NamedTuple):
    """A generated sequence, without the token that ended it.

    Attributes:
      tokens: Ids.
      logprobs: Log-probability of each token under the model at temperature 1.
      ended: False where the token budget cut it.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    ended: bool


def decode(
    lm: LM,
    prompts: Sequence[Sequence[Sequence[int]]],
    adapters: Adapter | None = None,
    *,
    samples: int = 1,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    ids: Sequence[Sequence[int]] | None = None,
    chunk: int = 0,
    pad_to: int = 0,
    grammar: Grammar | None = None,
) -> list[list[list[Output]]]:
    """Returns generated sequences [c][b][samples].

    Args:
      prompts: Token ids [c][b][t]; b may differ between the c.
      adapters: Stacked [c, ...]: one for each c. One adapter (or None) goes with c = 1.
      temperature: 0 is greedy.
      key: Needed unless greedy.
      ids: Names of the rows [c][b], 32 bits: a row's draws depend on key and name alone.
      chunk: Sequences decoded together; 0 chooses by the device.
      pad_to: Pad prompts to at least this length, so that several calls share one program.
      grammar: Every sequence that ends is of its language.
    """
    if max_tokens < 1:
        raise SealError(f"max_tokens={max_tokens}: expected at least 1")
    if temperature and key is None:
        raise SealError("a temperature above 0 needs a key")
    own = adapters is not None and next(iter(adapters.a.values())).ndim == 4
    if ids is None:
        numbers = iter(range(sum(len(rows) for rows in prompts)))
        ids = [[next(numbers) for _ in rows] for rows in prompts]
    room = next((r for r in _ROOM if r >= max_tokens), max_tokens)
    longest = max((len(p) for rows in prompts for p in rows), default=1)
    t = slots_lib.round_up(max(longest, pad_to))
    kind = "cpu" if jax.default_backend() == "cpu" else "other"
    rows_at_once = max(1, (chunk or _ROWS[kind]) // samples)
    results = [[[] for _ in rows] for rows in prompts]
    for tile in _tiles(prompts, rows_at_once, own):
        tokens, lengths, names = _arrays(tile, prompts, ids, t)
        some = lora.take(adapters, [rows[0][0] for rows in tile.rows]) if own else adapters
        out, logprobs, count, done = jax.device_get(
            decoding.run(
                lm.params,
                some,
                tokens,
                lengths,
                names,
                jax.random.key(0) if key is None else key,
                np.asarray(lm.config.eos_ids or (-1,), np.int32),
                np.int32(max_tokens),
                np.float32(temperature or 1.0),
                np.float32(top_p),
                grammar,
                samples=samples,
                room=room,
                greedy=not temperature,
                nucleus=bool(temperature) and top_p < 1,
                own_adapters=own,
            )
        )
        for at, rows in enumerate(tile.rows[: tile.real]):
            for place, (c, b) in enumerate(rows):
                results[c][b] = [
                    Output(out[i][: count[i]], logprobs[i][: count[i]], bool(done[i]))
                    for i in [(at, place, q) for q in range(samples)]
                ]
    return results


class _Tile(NamedTuple):
    """Rows (c, b) that run together, a list for each adapter; the first `real` lists count."""

    rows: list[list[tuple[int, int]]]
    real: int
    width: int


def _tiles(prompts, rows_at_once: int, own: bool) -> list[_Tile]:
    """Returns the rows that run together, in tiles of few shapes.

    With an adapter for each c, a tile spans several of them, alike in their number of rows; else
    the rows of all c are one list, cut into tiles alike in length.
    """
    every = [[(c, b) for b in range(len(rows))] for c, rows in enumerate(prompts)]
    if not own:
        work = sorted((cb for rows in every for cb in rows), key=lambda cb: len(_at(prompts, cb)))
        width = min(rows_at_once, 1 << max(len(work) - 1, 0).bit_length())
        starts = range(0, len(work), rows_at_once)
        return [_Tile([work[i : i + rows_at_once]], 1, width) for i in starts]
    work = sorted((rows for rows in every if rows), key=len)
    tiles = []
    while work:
        width = 1 << (len(work[-1]) - 1).bit_length()  # powers of two: few shapes
        take = max(1, min(rows_at_once // width, len(prompts)))
        group, work = work[-take:], work[:-take]
        # Fillers repeat the last adapter, so that every tile of this width has one shape.
        tiles.append(_Tile(group + [group[-1]] * (take - len(group)), len(group), width))
    return tiles


def _at(prompts, place: tuple[int, int]) -> Sequence[int]:
    return prompts[place[0]][place[1]]


def _arrays(tile: _Tile, prompts, ids, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens [c, b, t], lengths [c, b] and names [c, b]; length 0 marks a filler."""
    shape = (len(tile.rows), tile.width)
    tokens = np.zeros((*shape, t), np.int32)
    lengths, names = np.zeros(shape, np.int32), np.zeros(shape, np.uint32)
    for at, rows in enumerate(tile.rows[: tile.real]):
        for place, row in enumerate(rows):
            prompt = _at(prompts, row)
            tokens[at, place, : len(prompt)] = prompt
            lengths[at, place], names[at, place] = len(prompt), _at(ids, row)
    return tokens, lengths, names


def generate(
    lm: LM,
    prompts: Sequence[str],
    adapters: Adapter | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    samples: int = 1,
    chunk: int = 0,
) -> list[str]:
    """Returns a continuation of each prompt (`samples` of each, in a row, if more than one).

    Args:
      adapters: None, one adapter for all prompts, or stacked adapters [c, ...]: the prompts are
        then c equal parts in order, one part for each adapter.
      temperature: 0 is greedy; above it a key is needed.

    Raises:
      SealError: where the prompts cannot be shared out among the adapters.
    """
    own = adapters is not None and next(iter(adapters.a.values())).ndim == 4
    c = next(iter(adapters.a.values())).shape[0] if own else 1
    if not prompts:
        return []
    if len(prompts) % c:
        raise SealError(f"{len(prompts)} prompts cannot be shared out among {c} adapters")
    share = len(prompts) // c
    tokens = [encode(lm, prompt) for prompt in prompts]
    out = decode(
        lm,
        [tokens[i : i + share] for i in range(0, len(tokens), share)],
        adapters,
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        key=key,
        chunk=chunk,
    )
    return [text(lm, one) for rows in out for row in rows for one in row]


def constrain(lm: LM, language: Automaton) -> Grammar:
    """Returns a language over a model's tokens."""
    texts = grammar_lib.token_texts(lm.tokenizer)
    return grammar_lib.compile(language, texts, lm.config.eos_ids, lm.config.vocab_size)


def encode(lm: LM, prompt: str) -> list[int]:
    """Returns a prompt's ids; an empty one becomes the token that starts or ends texts."""
    ids = lm.tokenizer(prompt)["input_ids"]
    return ids or [lm.config.bos_id if lm.config.bos_id is not None else lm.config.eos_ids[0]]


def text(lm: LM, sequence: Output) -> str:
    """Returns a generated sequence as text."""
    return lm.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
