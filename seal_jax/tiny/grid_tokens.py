"""The tokenizer of the tiny grids: a token for every word of the compact text, nothing learned."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seal_jax.tasks.arc import compact

PAD, EOS, UNKNOWN = "<pad>", compact.END, "<unk>"
VOCABULARY = (PAD, EOS, UNKNOWN, *compact.WORDS)
IDS = {word: number for number, word in enumerate(VOCABULARY)}


def build() -> PreTrainedTokenizerFast:
    """Returns the tokenizer; the same in every process."""
    backend = Tokenizer(models.WordLevel(dict(IDS), unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([PAD, EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def encode(words: list[str]) -> list[int]:
    """Returns the ids of words without going through text, for generating data."""
    return [IDS[word] for word in words]


def word_parts() -> np.ndarray:
    """Returns how words of the tiny grids are made of parts, [v, p].

    A cell's embedding is trained as a sum over its row, column, colour, and the next cell's row and
    column, so that every word shares what is learned of its parts; other words are a part each.
    """
    places, ends = compact.PLACES, compact.PLACES + 1  # a row more: what comes after the last
    kinds = np.cumsum([0, places, places, len(compact.COLOUR_LETTERS), ends, ends])
    others = [word for word in VOCABULARY if word not in compact.CELLS]
    parts = np.zeros((len(VOCABULARY), kinds[-1] + len(others)), np.float32)
    for word, number in IDS.items():
        cell = compact.CELLS.get(word)
        if cell is None:
            parts[number, kinds[-1] + others.index(word)] = 1.0
            continue
        following = (cell.row + 1, 0) if cell.last else (cell.row, cell.column + 1)
        own = np.array([cell.row, cell.column, cell.colour, *following])
        parts[number, kinds[:-1] + own] = len(own) ** -0.5
    return parts
