"""The tiny grids' tokenizer: one token a word, and what it writes goes through the real parsers."""

import itertools

import numpy as np
from transformers import PreTrainedTokenizerFast

from seal_jax import checkpoint
from seal_jax.tasks import arc
from seal_jax.tasks.arc import compact, edits, grids
from seal_jax.tiny import grid_tokens, tokens


def test_every_word_is_one_token_and_comes_back(tmp_path):
    tokens.save(grid_tokens.build(), tmp_path / "a")
    tokens.save(grid_tokens.build(), tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # deterministic
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    text = " ".join(compact.WORDS)
    ids = loaded(text)["input_ids"]
    assert ids == grid_tokens.encode(list(compact.WORDS)) and len(set(ids)) == len(compact.WORDS)
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert loaded("nothing")["input_ids"] == [loaded.unk_token_id]
    assert loaded.decode([*ids[:1], loaded.eos_token_id], skip_special_tokens=True) == "I"
    assert {loaded.pad_token_id, loaded.eos_token_id} == {0, 1}


def test_a_model_folder_keeps_its_own_tokenizer_whatever_its_architecture(tmp_path):
    tokens.save(grid_tokens.build(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = checkpoint.load_tokenizer(tmp_path)
    words = ["h3", "w3", "11a", "12./", compact.END, "5e-3"]
    assert loaded(" ".join(words))["input_ids"] == grid_tokens.encode(words)


def test_self_edits_survive_tokens_and_the_real_parser():
    tokenizer = grid_tokens.build()
    flags = itertools.product((False, True), repeat=4)
    settings = itertools.product(compact.RATES, compact.EPOCHS)
    strategies = itertools.cycle(("train_using_all_tokens", "train_using_output_tokens"))
    for families, (rate, epochs), strategy in zip(
        itertools.cycle(flags), settings, strategies, strict=False
    ):
        edit = edits.make(
            *families, strategy=strategy, learning_rate=float(rate), epochs=int(epochs)
        )
        ids = tokenizer(compact.edit_text(edit))["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert arc.parse_self_edit(tokenizer.decode(ids)) == edit


def test_grids_survive_tokens():
    tokenizer, draw = grid_tokens.build(), np.random.default_rng(0)
    for height, width in [(1, 1), (3, 3), (6, 4), (30, 30)]:
        grid = draw.integers(0, 10, (height, width)).astype(np.int8)
        ids = tokenizer(" ".join(compact.grid_words(grid)))["input_ids"]
        assert len(ids) == 2 + height * width
        assert grids.same(compact.parse_grid(tokenizer.decode(ids)), grid)
