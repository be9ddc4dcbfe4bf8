"""What benchmarks work on: random weights of true shapes, and real self-edits as tokens."""

import dataclasses
import gzip
import json
import math
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tokenizers
import transformers

from seal_jax import params as params_lib
from seal_jax.batching import SelfEdit
from seal_jax.checkpoint import LM
from seal_jax.config import Task as TaskSettings
from seal_jax.params import ModelConfig, Params
from seal_jax.tasks import Task, passages, squad
from seal_jax.tiny import world

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
_QWEN = dict(qkv_bias=True, rope_theta=1e6, eos_ids=(0,), family="qwen2")
SHAPES = {
    "quick": ModelConfig(512, 64, 2, 2, 1, 32, 160, tied=True, **_QWEN),
    "small": ModelConfig(8192, 256, 4, 4, 2, 64, 704, tied=True, **_QWEN),
    "qwen2.5-0.5b": ModelConfig(151936, 896, 24, 14, 2, 64, 4864, tied=True, **_QWEN),
    "qwen2.5-1.5b": ModelConfig(151936, 1536, 28, 12, 2, 128, 8960, tied=True, **_QWEN),
    "qwen2.5-7b": ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, **_QWEN),
}


class Work(NamedTuple):
    """A task, self-edits of its contexts, the model to adapt, and where the texts come from."""

    lm: LM
    task: Task
    edits: list[SelfEdit]
    source: str


def data_folder() -> Path | None:
    """Returns the folder with the reference's published self-edits, or None."""
    folder = Path(os.environ.get("SEAL_JAX_DATA") or _BESIDE)
    return folder if (folder / "ki_inputs").is_dir() else None


def make(shape: str, n_edits: int, per_context: int = 1, dtype: str = "float32") -> Work:
    """Returns a workload: the reference's self-edits where they are, else the tiny world's.

    Args:
      n_edits: Self-edits in all, `per_context` of each context in the file's order.
    """
    config, folder = SHAPES[shape], data_folder()
    settings = TaskSettings(judge="exact")
    if folder and shape != "quick":
        entries = _read(folder / "ki_inputs/synthetic_data/train/iter0_train.json")
        contexts = passages.from_entries(entries, "iter0_train.json")
        written = [
            SelfEdit(context, i, context.data["completions"][i])
            for context in contexts
            for i in range(per_context)
        ]
        source = "Qwen2.5-7B's self-edits of SQuAD passages (iter0_train.json)"
    else:
        contexts = world.contexts("train", -(-n_edits // per_context))
        rng = random.Random(0)
        written = [
            SelfEdit(context, i, world.random_self_edit(context.data, rng))
            for context in contexts
            for i in range(per_context)
        ]
        source = "self-edits of the tiny world"
    task = squad.make(contexts, settings)
    texts = [c.passage for c in contexts] + [edit.text for edit in written]
    tokenizer = train_tokenizer(texts, min(config.vocab_size, 8192))
    lm = LM(random_params(config, dtype), tokenizer, config)
    return Work(lm, task, written[:n_edits], source)


def _read(file: Path) -> Any:
    packed = file.with_name(file.name + ".gz")
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    return json.loads(gzip.decompress(packed.read_bytes()))


def train_tokenizer(texts: list[str], size: int) -> Any:
    """Returns a byte-level BPE learned from the texts themselves; id 0 ends a text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def random_params(config: ModelConfig, dtype: str = "float32", seed: int = 0) -> Params:
    """Returns random weights made on the device: a 7B model in seconds there."""
    keys = iter(jax.random.split(jax.random.key(seed), len(params_lib.table(config))))

    def leaf(name: str, weight: params_lib.Weight, shape: tuple[int, ...]) -> jax.Array:
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape, dtype)
        return (jax.random.normal(next(keys), shape, jnp.bfloat16) * 0.02).astype(dtype)

    return params_lib.build(config, leaf)


def endless(config: ModelConfig) -> ModelConfig:
    """Returns the architecture without a token that ends a text, so that all rows go on."""
    return dataclasses.replace(config, eos_ids=())


def matmul_weights(config: ModelConfig) -> int:
    """Returns the weights a token is multiplied with: all but norms, biases and a looked-up row."""
    sizes: dict[str, int] = {}

    def note(name: str, weight: params_lib.Weight, shape: tuple[int, ...]) -> None:
        looked_up = name == "embed" and not config.tied
        sizes[name] = 0 if looked_up or name.endswith(("norm", "bias")) else math.prod(shape)

    params_lib.build(config, note)
    return sum(sizes.values())
