"""Grammar-constrained sampling: which tokens may follow, so that every text is of a language.

A language is built from a few combinators as an automaton over characters; `compile` turns it into
a table over a tokenizer's tokens that the sampler looks up on the device.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seal_jax.errors import SealError


class Automaton(NamedTuple):
    """A language as a deterministic automaton over characters; state 0 is the start."""

    steps: tuple[dict[str, int], ...]
    final: frozenset[int]

    def accepts(self, text: str) -> bool:
        """Returns whether a text is of the language."""
        state: int | None = 0
        for character in text:
            state = None if state is None else self.steps[state].get(character)
        return state in self.final


class _Part(NamedTuple):
    """A fragment of a nondeterministic automaton: edges (state, character or "", state)."""

    edges: tuple[tuple[int, str, int], ...]
    size: int  # states 0 (start) to size - 1 (end)


def one_of(characters: str) -> _Part:
    """Returns the language of single characters."""
    return _Part(tuple((0, character, 1) for character in characters), 2)


def text(words: str) -> _Part:
    """Returns the language of one text."""
    edges = tuple((i, character, i + 1) for i, character in enumerate(words))
    return _Part(edges, len(words) + 1)


def _moved(part: _Part, by: int) -> tuple[tuple[int, str, int], ...]:
    return tuple((a + by, character, b + by) for a, character, b in part.edges)


def chain(*parts: _Part) -> _Part:
    """Returns the language of texts of the parts in order."""
    edges: list[tuple[int, str, int]] = []
    at = 0
    for part in parts:
        edges += _moved(part, at)
        at += part.size - 1
    return _Part(tuple(edges), at + 1)


def either(*parts: _Part) -> _Part:
    """Returns the union of languages."""
    edges: list[tuple[int, str, int]] = []
    at = 1
    end = 1 + sum(part.size for part in parts)
    for part in parts:
        edges += [(0, "", at), *_moved(part, at), (at + part.size - 1, "", end)]
        at += part.size
    return _Part(tuple(edges), end + 1)


def up_to(part: _Part, most: int) -> _Part:
    """Returns the language of at most `most` texts of a part in a row."""
    whole = chain(*[part] * most)
    skips = tuple((i * (part.size - 1), "", whole.size - 1) for i in range(most))
    return _Part(whole.edges + skips, whole.size)


def automaton(part: _Part) -> Automaton:
    """Returns the deterministic automaton of a language."""
    by_state: dict[int, list[tuple[str, int]]] = {}
    for a, character, b in part.edges:
        by_state.setdefault(a, []).append((character, b))

    def closed(states: Iterable[int]) -> frozenset[int]:
        found, todo = set(states), list(states)
        while todo:
            for character, b in by_state.get(todo.pop(), ()):
                if not character and b not in found:
                    found.add(b)
                    todo.append(b)
        return frozenset(found)

    names = {closed([0]): 0}
    queue = list(names)
    steps: list[dict[str, int]] = []
    for states in queue:  # grows as it goes
        reached: dict[str, set[int]] = {}
        for a in states:
            for character, b in by_state.get(a, ()):
                if character:
                    reached.setdefault(character, set()).add(b)
        row = {}
        for character, group in reached.items():
            after = closed(group)
            if after not in names:
                names[after] = len(names)
                queue.append(after)
            row[character] = names[after]
        steps.append(row)
    final = frozenset(n for states, n in names.items() if part.size - 1 in states)
    return Automaton(tuple(steps), final)


@struct.dataclass
class Grammar:
    """A language over tokens. Tokens that behave alike share a kind.

    Attributes:
      next_sk: State after a token of kind k in state s; -1 where it may not follow. A token that
        ends texts may follow in final states.
      kind_v: Kind of each token.
    """

    next_sk: jax.Array
    kind_v: jax.Array

    def allowed(self, state: jax.Array) -> jax.Array:
        """Returns which tokens may follow, states' shape plus [v]."""
        return self.next_sk[state][..., self.kind_v] >= 0

    def after(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """Returns the states after tokens; a token that may not follow changes nothing."""
        new = self.next_sk[state, self.kind_v[token]]
        return jnp.where(new >= 0, new, state)


def token_texts(tokenizer: Any) -> list[str]:
    """Returns what each token adds to a text that goes on, "" where it adds nothing.

    As texts are read in the end, without special tokens: a tokenizer has more than it names.
    """
    anchor = tokenizer("{", add_special_tokens=False)["input_ids"]
    before = len(tokenizer.decode(anchor, skip_special_tokens=True))
    pairs = [[*anchor, i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(pairs, skip_special_tokens=True)
    return [text[before:] for text in texts]


def compile(
    language: Automaton, texts: Sequence[str], end_ids: Sequence[int], vocab_size: int = 0
) -> Grammar:
    """Returns a language as a table over tokens.

    A token is kept only where a whole text can still follow, so no sequence runs into a dead end.

    Args:
      texts: What each token adds; see `token_texts`.
      end_ids: Tokens that end a text, and add nothing to it whatever they say.
      vocab_size: The model's, which may be larger than the tokenizer's, or smaller.

    Raises:
      SealError: where the tokens cannot write any text of the language, or none ends one.
    """
    vocab = vocab_size or len(texts)
    texts, end_ids = texts[:vocab], [i for i in end_ids if i < vocab]
    if not end_ids:
        raise SealError("a grammar needs a token that ends a text, and the model has none")
    table = np.full((len(language.steps), vocab), -1, np.int32)
    trie: dict = {}
    for token, word in enumerate(texts):
        word = "" if token in end_ids else word
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        if word:
            node.setdefault("", []).append(token)
    for state in range(len(language.steps)):
        todo = [(state, trie)]
        while todo:
            at, node = todo.pop()
            for character, below in node.items():
                if not character:
                    table[state, below] = at
                elif character in language.steps[at]:
                    todo.append((language.steps[at][character], below))
    for state in language.final:
        table[state, list(end_ids)] = state
    live = _live(table, language.final)
    if not live[0]:
        raise SealError("the tokenizer's tokens cannot write what the grammar asks for")
    table = np.where((table >= 0) & live[table], table, -1)
    first, kind_v = _kinds(table)
    return Grammar(jnp.asarray(table[:, first], jnp.int32), jnp.asarray(kind_v, jnp.int32))


def _kinds(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a column of each kind, and each column's kind.

    By 64-bit sums of random multiples: sorting whole columns of 128,000 tokens takes half a minute.
    """
    sums = np.zeros(table.shape[1], np.uint64)
    factors = np.random.default_rng(0).integers(1 << 63, size=len(table), dtype=np.uint64)
    for row, factor in zip(table, factors, strict=True):
        sums += row.astype(np.uint64) * (2 * factor + np.uint64(1))
    _, first, kind_v = np.unique(sums, return_index=True, return_inverse=True)
    return first, kind_v.reshape(-1)


def _live(table: np.ndarray, final: frozenset[int]) -> np.ndarray:
    """Returns from which states a final one can be reached by tokens."""
    targets = [np.unique(row[row >= 0]) for row in table]
    live = np.zeros(len(table), bool)
    live[list(final)] = True
    while True:
        new = live | np.array([live[row].any() for row in targets])
        if (new == live).all():
            return live
        live = new
