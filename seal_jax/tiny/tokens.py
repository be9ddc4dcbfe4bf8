"""The tokenizer of the tiny world: byte-level BPE, trained on fresh entities only.

So no name of a known, training or held-out entity becomes a token of its own, and every name
costs the model the same effort to copy. Words are cut as Qwen2 cuts them, because transformers
applies Qwen2's rule to any folder whose config.json says Qwen2.
"""

import itertools
import json
from pathlib import Path

from tokenizers import pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from seal_jax.tiny import world

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 1024


def train(seed: int = 0, texts: int = 6000) -> PreTrainedTokenizerFast:
    """Returns a tokenizer trained on self-edits of fresh entities with their passages."""
    tokenizer = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = itertools.islice(world.pretraining_texts(seed, self_edits=1.0), texts)
    tokenizer.train_from_iterator((text.prompt + text.completion for text in corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as every version of transformers reads them.

    What `save_pretrained` of transformers 5 writes, version 4 cannot load.

    Args:
      tokenizer: This one, or that of the tiny grids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {key: getattr(tokenizer, key) for key in ("eos_token", "pad_token", "unk_token")}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: token for key, token in special.items() if token is not None},
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
