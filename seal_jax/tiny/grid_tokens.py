"""The tokenizer of the tiny grids: a token for every word of the compact text, nothing learned."""

import json
from pathlib import Path

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


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(words: list[str]) -> list[int]:
    """Returns the ids of words without going through text, for generating data."""
    return [IDS[word] for word in words]
