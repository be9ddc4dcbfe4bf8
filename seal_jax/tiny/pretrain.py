"""Pretraining of the built-in models: packed rows, one pure training step, a seed decides all."""

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from seal_jax import checkpoint, model, optim
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError
from seal_jax.model import ModelConfig, Params
from seal_jax.optim import Measures, TrainState
from seal_jax.tiny import tokens as tokens_lib
from seal_jax.tiny import world

ROWS, LENGTH = 16, 144
TINY_WORLD_TOKENS = 6_500_000
_SELF_EDITS = 0.27  # of the texts; their tokens are 60% of all
_PROMPT_WEIGHT = 0.3
_LOOKAHEAD = 64
_LEARNING_RATE, _WARMUP, _WEIGHT_DECAY, _B2 = 3e-3, 100, 0.02, 0.95


class Rows(NamedTuple):
    """Texts packed into rows, numbered from 1 within a row; 0 is padding.

    `weights_bt` is the weight in the loss of predicting the token at that place.
    """

    tokens_bt: np.ndarray
    segments_bt: np.ndarray
    weights_bt: np.ndarray


class Progress(NamedTuple):
    """Where a pretraining stands after a step; `params` lives until the next one."""

    step: int
    steps: int
    loss: jax.Array
    params: Params


def tiny_world_config(vocab_size: int, eos_id: int) -> ModelConfig:
    """Returns the architecture of the tiny world's model: Qwen2 in small, 0.7M parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=128,
        n_layers=3,
        n_heads=2,
        n_kv_heads=2,
        d_head=64,
        d_ff=320,
        tied=True,
        qkv_bias=True,
        eos_ids=(eos_id,),
    )


def tokenized(
    texts: Iterator[world.Text], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields token ids with a closing EOS, and their weights in the loss."""
    while chunk := list(itertools.islice(texts, 1000)):
        prompts = tokenizer([text.prompt for text in chunk])["input_ids"]
        completions = tokenizer([text.completion for text in chunk])["input_ids"]
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = np.array([*prompt, *completion, tokenizer.eos_token_id], np.int32)
            weights = np.ones(len(ids), np.float32)
            weights[: len(prompt)] = _PROMPT_WEIGHT
            weights[0] = 0.0  # nothing comes before it
            yield ids, weights


def packed(
    texts: Iterator[tuple[np.ndarray, np.ndarray]], pad_id: int, rows: int, length: int
) -> Iterator[Rows]:
    """Yields batches of rows; each takes the next text, then any of the following that fits.

    A text longer than a row is left out. A batch that the texts do not fill is dropped.
    """
    texts = (text for text in texts if len(text[0]) <= length)
    waiting = list(itertools.islice(texts, _LOOKAHEAD))
    while len(waiting) == _LOOKAHEAD:
        batch = Rows(
            np.full((rows, length), pad_id, np.int32),
            np.zeros((rows, length), np.int32),
            np.zeros((rows, length), np.float32),
        )
        for b in range(rows):
            used, segment, at = 0, 0, 0
            while at < len(waiting):
                ids, weights = waiting[at]
                if used + len(ids) > length:
                    at += 1
                    continue
                del waiting[at]
                place, segment = slice(used, used + len(ids)), segment + 1
                batch.tokens_bt[b, place] = ids
                batch.segments_bt[b, place] = segment
                batch.weights_bt[b, place] = weights
                used += len(ids)
            waiting += itertools.islice(texts, _LOOKAHEAD - len(waiting))
        yield batch


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def train_step(state: TrainState, rows: Rows, steps: int) -> tuple[TrainState, Measures]:
    """Returns the state after one step of a training of `steps` (static), and what was measured.

    The learning rate rises for 100 steps, then falls to 0 in a straight line.
    """
    warmup = min(_WARMUP, steps // 10)
    return optim.step(
        state,
        lambda params: optim.loss(params, None, rows.tokens_bt, rows.weights_bt, rows.segments_bt),
        lambda step: optim.learning_rate("linear", step, _LEARNING_RATE, steps, warmup),
        weight_decay=_WEIGHT_DECAY,
        b2=_B2,
    )


def train(
    config: ModelConfig,
    batches: Iterator[Rows],
    steps: int,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Params:
    """Returns the weights after `steps` batches, from random ones.

    Args:
      progress: Called after every step; reading its loss waits for the step to end.
    """
    state = optim.init(model.init(config, seed), b2=_B2)
    for step, rows in enumerate(itertools.islice(batches, steps), start=1):
        state, measures = train_step(state, rows, steps)
        if progress is not None:
            progress(Progress(step, steps, measures.loss, state.trained))
    return state.trained


def tiny_world(
    folder: str | Path,
    seed: int = 0,
    tokens: int = TINY_WORLD_TOKENS,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Trains the tiny world's model and writes it in Hugging Face format; returns the folder.

    Args:
      seed: Of the weights and of the texts; the world and its tokenizer are always the same.
      tokens: Places in the rows to train on, some 2% of them padding.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SealError(f"{folder}: already there and not empty; choose another folder")
    tokenizer = tokens_lib.train()
    config = tiny_world_config(len(tokenizer), tokenizer.eos_token_id)
    texts = tokenized(world.pretraining_texts(seed, _SELF_EDITS), tokenizer)
    batches = packed(texts, tokenizer.pad_token_id, ROWS, LENGTH)
    params = train(config, batches, tokens // (ROWS * LENGTH), seed, progress)
    return save(params, tokenizer, folder)


def save(params: Params, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Writes a tiny model in Hugging Face format, complete or not at all; returns its folder."""
    with tempfile.TemporaryDirectory() as staging:
        source = Path(staging)
        tokens_lib.save(tokenizer, source)
        config = checkpoint.write_config(params.config, params) | {"max_position_embeddings": 1024}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        for name, content in {"config.json": config, "generation_config.json": ends}.items():
            (source / name).write_text(json.dumps(content, indent=2) + "\n")
        return checkpoint.save_hf(LM(params, tokenizer, params.config, source), folder)
