"""Pretraining of the built-in models: rows of texts, one pure training step, a seed decides all."""

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from transformers import PreTrainedTokenizerFast

from seal_jax import checkpoint, files, model, optim
from seal_jax.checkpoint import LM
from seal_jax.model import ModelConfig, Params
from seal_jax.optim import Measures, TrainState
from seal_jax.tiny import grid_tokens, grids, world
from seal_jax.tiny import tokens as tokens_lib

ROWS, LENGTH = 16, 144
TINY_WORLD_TOKENS = 6_500_000
BUCKETS = ((96, 54), (136, 38), (168, 31), (256, 20), (384, 13))
"""Lengths of rows and their number in a batch: about as many tokens in each, 5,000."""
TINY_GRIDS_TOKENS = 20_000_000
_SELF_EDITS = 0.27  # of the texts; their tokens are 60% of all
_PROMPT_WEIGHT = 0.3
_LOOKAHEAD = 64
_POSITIONS = 1024  # as the models say of themselves
_LEARNING_RATE, _WARMUP, _WEIGHT_DECAY, _B2 = 3e-3, 100, 0.02, 0.95
_MUON_RATE = 2e-2


class Rows(NamedTuple):
    """Texts in rows: packed, numbered from 1 within a row (0 is padding), or one a row (None).

    `weights_bt` is the weight in the loss of predicting the token at that place.
    """

    tokens_bt: np.ndarray
    segments_bt: np.ndarray | None
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
        max_positions=_POSITIONS,
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


def bucketed(
    texts: Iterator[tuple[np.ndarray, np.ndarray]],
    pad_id: int,
    buckets: Sequence[tuple[int, int]] = BUCKETS,
) -> Iterator[Rows]:
    """Yields batches of one text a row, alike in length; a text longer than all is left out.

    Attention over short rows is cheaper than over packed ones, and needs no mask between texts.

    Args:
      buckets: Length of rows and how many make a batch, lengths rising.
    """
    waiting: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in buckets]
    for text in texts:
        home = next((k for k, (t, _) in enumerate(buckets) if len(text[0]) <= t), None)
        if home is None:
            continue
        waiting[home].append(text)
        length, rows = buckets[home]
        if len(waiting[home]) < rows:
            continue
        batch = Rows(
            np.full((rows, length), pad_id, np.int32),
            None,
            np.zeros((rows, length), np.float32),
        )
        for b, (ids, weights) in enumerate(waiting[home]):
            batch.tokens_bt[b, : len(ids)], batch.weights_bt[b, : len(ids)] = ids, weights
        waiting[home] = []
        yield batch


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def train_step(state: TrainState, rows: Rows, steps: int) -> tuple[TrainState, Measures]:
    """Returns the state after one step of a training of `steps` (static), and what was measured.

    The state is donated.
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


def muon_state(params: Params, steps: int) -> TrainState:
    """Returns the state before the first step by `muon_step`."""
    return TrainState(params, _muon(steps).init(params), np.int32(0))


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def muon_step(
    state: TrainState, rows: Rows, steps: int, parts_vp: np.ndarray
) -> tuple[TrainState, Measures]:
    """Returns the state (donated) after one step by Muon, and what was measured.

    Matrices of the layers take orthogonalised steps, all else AdamW's; rates as in `train_step`.

    Args:
      parts_vp: What embeddings are made of; the state has those of the parts, [p, d].
    """

    def loss(params: Params) -> jax.Array:
        whole = params.replace(embed=parts_vp @ params.embed)
        return optim.loss(whole, None, rows.tokens_bt, rows.weights_bt, rows.segments_bt)

    value, grads = jax.value_and_grad(loss)(state.trained)
    norm = optax.tree.norm(grads)
    changes, moments = _muon(steps).update(grads, state.moments, state.trained)
    trained = optax.apply_updates(state.trained, changes)
    rate = optim.learning_rate("linear", state.step, _MUON_RATE, steps, min(_WARMUP, steps // 10))
    return TrainState(trained, moments, state.step + 1), Measures(value, norm, rate)


def _muon(steps: int) -> optax.GradientTransformation:
    warmup = min(_WARMUP, steps // 10)

    def matrices(params: Params):
        # Stacked over layers [l, i, o]: each layer's matrix is orthogonalised by itself.
        which = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda x: which if x.ndim == 3 else None, params)

    rate = lambda peak: lambda step: optim.learning_rate("linear", step, peak, steps, warmup)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            rate(_MUON_RATE),
            weight_decay=_WEIGHT_DECAY,
            adam_b2=_B2,
            adam_learning_rate=rate(_LEARNING_RATE),
            muon_weight_dimension_numbers=matrices,
        ),
    )


def train(
    state: TrainState,
    step: Callable[[TrainState, Rows, int], tuple[TrainState, Measures]],
    batches: Iterator[Rows],
    steps: int,
    progress: Callable[[Progress], None] | None = None,
) -> Params:
    """Returns the weights after `steps` batches, each a `step` of a training of that length.

    Args:
      progress: Called after every step; reading its loss waits for the step to end.
    """
    for number, rows in enumerate(itertools.islice(batches, steps), start=1):
        state, measures = step(state, rows, steps)
        if progress is not None:
            progress(Progress(number, steps, measures.loss, state.trained))
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
    files.check_free(folder)
    tokenizer = tokens_lib.train()
    config = tiny_world_config(len(tokenizer), tokenizer.eos_token_id)
    texts = tokenized(world.pretraining_texts(seed, _SELF_EDITS), tokenizer)
    batches = packed(texts, tokenizer.pad_token_id, ROWS, LENGTH)
    state = optim.init(model.init(config, seed), b2=_B2)
    params = train(state, train_step, batches, tokens // (ROWS * LENGTH), progress)
    return save(params, tokenizer, folder)


def tiny_grids_config() -> ModelConfig:
    """Returns the architecture of the tiny grids' model: Qwen2 in small, 0.2M parameters."""
    return ModelConfig(
        vocab_size=len(grid_tokens.VOCABULARY),
        d_model=64,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        d_head=16,
        d_ff=128,
        rope_theta=1e6,  # most angles turn slowly: words say their place, heads look for it
        tied=True,
        qkv_bias=True,
        eos_ids=(grid_tokens.IDS[grid_tokens.EOS],),
        max_positions=_POSITIONS,
    )


def tiny_grids(
    folder: str | Path,
    seed: int = 0,
    tokens: int = TINY_GRIDS_TOKENS,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Trains the tiny grids' model and writes it in Hugging Face format; returns the folder.

    Args:
      seed: Of the weights and of the sequences.
      tokens: Places in the rows to train on, some 10% of them padding.
    """
    folder = Path(folder)
    files.check_free(folder)
    tokenizer = grid_tokens.build()
    batches = bucketed(grids.pretraining_sequences(seed), tokenizer.pad_token_id)
    steps = tokens // (BUCKETS[0][0] * BUCKETS[0][1])
    parts_vp = grid_tokens.word_parts()
    params = model.init(tiny_grids_config(), seed)
    embed_pd = params.embed[: parts_vp.shape[1]]
    state = muon_state(params.replace(embed=embed_pd), steps)
    whole = lambda params: params.replace(embed=parts_vp @ params.embed)
    step = functools.partial(muon_step, parts_vp=parts_vp)
    seen = progress and (lambda at: progress(at._replace(params=whole(at.params))))
    params = whole(train(state, step, batches, steps, seen))
    return save(params, tokenizer, folder)


def save(params: Params, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Writes a tiny model in Hugging Face format, complete or not at all; returns its folder."""
    with tempfile.TemporaryDirectory() as staging:
        source = Path(staging)
        tokens_lib.save(tokenizer, source)
        config = checkpoint.write_config(params.config, params)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        for name, content in {"config.json": config, "generation_config.json": ends}.items():
            (source / name).write_text(json.dumps(content, indent=2) + "\n")
        return checkpoint.save_hf(LM(params, tokenizer, params.config, source), folder)
