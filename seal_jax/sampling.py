"""Generation: many prompts, many samples of each, many adapters, in tiles of few shapes.

A prompt is read once for all its samples. Each sequence draws from a key of its own, so what is
drawn does not depend on its company.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from seal_jax import decoding, lora, progress, sharding, streams, tiles
from seal_jax import grammar as grammar_lib
from seal_jax import rows as rows_lib
from seal_jax import slots as slots_lib
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError
from seal_jax.grammar import Automaton, Grammar
from seal_jax.lora import Adapter
from seal_jax.params import ModelConfig
from seal_jax.tiles import Tile

_ROOM = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ROOMS_ON_THE_WAY = (256, 1024, 4096)
_COLDEST = 1e-6  # below it a temperature is none
_HOTTEST = 1e30  # from here on all tokens are as likely; float32 would have no room for 1e39
_MARK = re.compile(r"<\|\w+\|>")  # of a chat


class Output(NamedTuple):
    """A generated sequence, without the token that ended it.

    Attributes:
      tokens: Ids.
      logprobs: Log-probability of each token under the model at temperature 1; None unless wanted.
      ended: False where the token budget cut it.
    """

    tokens: np.ndarray
    logprobs: np.ndarray | None
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
    logprobs: bool = True,
) -> list[list[list[Output]]]:
    """Returns generated sequences [c][b][samples].

    Args:
      prompts: Token ids [c][b][t]; b may differ between the c.
      adapters: Stacked [c, ...]: one for each c. One adapter (or None) goes with c = 1.
      temperature: 0 is greedy, and so is less than a millionth, by which float32 cannot divide.
      key: Needed unless greedy.
      ids: Names of the rows [c][b], 32 bits: a row's draws depend on key and name alone.
      chunk: Sequences decoded together; 0 chooses by the device and its memory.
      pad_to: Pad prompts to at least this length, so that several calls share one program.
      grammar: Every sequence that ends is of its language.
      logprobs: Whether log-probabilities are wanted; a step is a little faster without.

    Raises:
      SealError: for numbers out of their ranges, or a temperature without a key.
    """
    if max_tokens < 1:
        raise SealError(f"max_tokens={max_tokens}: expected at least 1")
    if samples < 1 or not 0 <= temperature < np.inf or not 0 < top_p <= 1:
        raise SealError(
            f"samples={samples}, temperature={temperature}, top_p={top_p}: expected at least 1, at "
            "least 0, and above 0 up to 1"
        )
    temperature = temperature if temperature >= _COLDEST else 0.0
    if temperature and key is None:
        raise SealError("a temperature above 0 needs a key")
    own = adapters is not None and adapters.count > 0
    if ids is None:
        numbers = iter(range(sum(len(rows) for rows in prompts)))
        ids = [[next(numbers) for _ in rows] for rows in prompts]
    longest = max((len(p) for rows in prompts for p in rows), default=1)
    t = slots_lib.round_up(max(longest, pad_to))
    mesh = sharding.of(lm.params)
    parts = sharding.data_size(mesh)
    room = next((r for r in _ROOM if r >= max_tokens), max_tokens)
    # On a mesh it is one program, the one that `plan` has compiled.
    rooms = [*(r for r in _ROOMS_ON_THE_WAY if r < room and mesh is None), room]
    # Adapters are there twice: all, and a tile's own.
    held = 2 * sum(x.nbytes for x in jax.tree.leaves(adapters)) // parts

    def at_once(size: int) -> int:
        if chunk:
            return max(1, chunk // samples)
        return parts * rows_lib.at_once(lm, size, rooms, samples, held)

    results = [[[] for _ in rows] for rows in prompts]
    if own:
        prompts, adapters = _filled(prompts, adapters, mesh)
    params = lm.params if lm.reader is None else lm.reader
    draws = decoding.Draws(
        ids_cb=None,
        key=jax.random.key(0) if key is None else key,
        ends=np.asarray(lm.config.eos_ids or (-1,), np.int32),
        limit=np.int32(max_tokens),
        temperature=np.float32(min(temperature, _HOTTEST) or 1.0),
        top_p=np.float32(top_p),
        grammar=grammar,
        greedy=not temperature,
        nucleus=bool(temperature) and top_p < 1,
        scored=logprobs,
        columns=sharding.splits_vocabulary(params),
    )
    draws = sharding.share(draws, mesh)
    for tile in tiles.arrange(prompts, t, at_once, own, parts):
        tokens, lengths, names = sharding.share_out(tiles.arrays(tile, prompts, ids), mesh)
        with sharding.use(mesh):
            adapter = _take(adapters, tile, parts, lm.config) if own else adapters
            own_draws = draws.replace(ids_cb=names)
            shape = (samples, rooms, max_tokens, own)
            made = _run(params, adapter, (tokens, lengths), own_draws, *shape)
        for at, rows in enumerate(tile.rows):
            for place, (c, b) in enumerate(rows):
                results[c][b] = made[at][place]
    return results


def _run(params, adapters, prompts, draws, samples: int, rooms: Sequence[int], limit: int, own):
    """Returns the sequences [c][b][samples] of one tile.

    In several programs, each with room for more tokens, as long as any sequence goes on; rows that
    have ended are left behind where the rest fills no more than half the places.
    """
    c, b, _ = prompts[0].shape
    results: list[list[list[Output]]] = [[[] for _ in range(b)] for _ in range(c)]
    place_b = np.arange(b)
    state = None
    for size in rooms:
        static = {"room": size, "own_adapters": own, "keep": size < rooms[-1]}
        kind = (draws.greedy, draws.scored, own, params.config)
        shape = (len(place_b), *prompts[0].shape, samples, size, *kind)
        with streams.first_call(shape):
            if state is None:
                state = decoding.run(params, adapters, *prompts, draws, samples=samples, **static)
            else:
                state = decoding.go_on(params, adapters, state, draws, **static)
        seen = (state.tokens, state.logprobs, state.count, state.done, state.step)
        tokens, logprobs, count, done, step = sharding.fetch(seen)
        for at, place in np.ndindex(c, len(place_b)):
            if place_b[place] >= 0:
                results[at][place_b[place]] = [
                    Output(
                        tokens[i][: count[i]],
                        None if logprobs is None else logprobs[i][: count[i]],
                        bool(done[i]),
                    )
                    for i in [(at, place, q) for q in range(samples)]
                ]
        if done.all() or step >= limit:
            break
        going = np.flatnonzero(~done.all(axis=(0, 2)) & (place_b >= 0))
        width = 1 << (len(going) - 1).bit_length()
        if c == 1 and 2 * width <= len(place_b):
            rows = np.full(width, -1)
            rows[: len(going)] = going
            state, draws = decoding.take_rows(state, jax.device_put(rows), draws)
            place_b = np.where(rows < 0, -1, place_b[rows])
    return results


def _filled(prompts, adapters: Adapter, mesh):
    """Returns prompts and adapters with fillers, so that they share out evenly on the mesh."""
    short = -len(prompts) % sharding.data_size(mesh)
    if not short:
        return prompts, adapters
    adapters = lora.take(adapters, [*range(len(prompts)), *[0] * short])
    return [*prompts, *[[]] * short], sharding.place(adapters, sharding.candidates(mesh))


def _take(adapters: Adapter, tile: Tile, parts: int, config: ModelConfig) -> Adapter:
    """Returns the tile's adapters; each device takes from those it holds."""
    share = adapters.count // parts
    if tile.adapters == list(range(share * parts)):
        return adapters
    if parts == 1:
        return lora.take(adapters, tile.adapters)
    index = tuple(tile.adapters[: len(tile.adapters) // parts])
    return _take_local(adapters, index, parts, config)


@functools.partial(jax.jit, static_argnames=("index", "parts", "config"))
def _take_local(adapters: Adapter, index: tuple[int, ...], parts: int, config: ModelConfig):
    def take(leaf: jax.Array) -> jax.Array:
        split = leaf.reshape(parts, -1, *leaf.shape[1:])
        return split[:, np.array(index)].reshape(-1, *leaf.shape[1:])

    return sharding.pin(jax.tree.map(take, adapters), config, stacked=True)


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
    if isinstance(prompts, str):
        raise SealError("generate: expected a list of prompts, not one text")
    c = 1 if adapters is None else max(1, adapters.count)
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
        logprobs=False,
    )
    return [text(lm, one) for rows in out for row in rows for one in row]


def constrain(lm: LM, language: Automaton) -> Grammar:
    """Returns a language over a model's tokens."""
    texts = grammar_lib.token_texts(lm.tokenizer)
    return grammar_lib.compile(language, texts, lm.config.eos_ids, lm.config.vocab_size)


def encode(lm: LM, prompt: str) -> list[int]:
    """Returns a prompt's ids; an empty one becomes the token that starts or ends texts.

    Raises:
      SealError: for ids that the model does not know, where no token starts or ends texts, or for
        a chat's prompt whose marks are another model's.
    """
    config = lm.config
    mark = _MARK.match(prompt)
    if mark and len(lm.tokenizer(mark[0], add_special_tokens=False)["input_ids"]) != 1:
        raise SealError(
            f"a prompt begins with {mark[0]}, a token that this model does not have: choose "
            "task.chat and task.arc.format by the model"
        )
    start = () if config.bos_id is None else (config.bos_id,)
    ids = lm.tokenizer(prompt)["input_ids"] or [*start, *config.eos_ids][:1]
    if not ids:
        raise SealError("an empty prompt, and the model names no token that starts or ends a text")
    if max(ids) >= config.vocab_size:
        raise SealError(
            f"the tokenizer makes token {max(ids)}, the model knows {config.vocab_size}"
        )
    if len(ids) > config.max_positions:
        _tell_of_long_prompts(config.max_positions)
    return ids


@functools.cache  # once
def _tell_of_long_prompts(limit: int) -> None:
    progress.say(f"some prompts have over {limit:,} tokens, more than this model was made for")


def text(lm: LM, sequence: Output) -> str:
    """Returns a generated sequence as text."""
    return lm.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
