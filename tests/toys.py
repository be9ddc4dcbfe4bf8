"""Toy models, adapters, a tokenizer and a task for the tests: numbers from numpy, no compiling."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import batching, lora, model
from seal_jax import params as params_lib
from seal_jax.config import ALL_TARGETS, Inner, Lora
from seal_jax.errors import SelfEditError
from seal_jax.lora import Adapter
from seal_jax.params import ModelConfig, Params, RopeScaling
from seal_jax.tasks import Context, Edit, Example, Grade, Task

EOS = 0

# No two dimensions alike, so that a mixed-up pair cannot pass unnoticed.
_SIZES = dict(vocab_size=37, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=26)
FAMILIES = {
    "qwen2": ModelConfig(**_SIZES, d_head=6, qkv_bias=True, eos_ids=(EOS,)),
    "qwen3": ModelConfig(
        **_SIZES, d_head=10, qk_norm=True, rope_theta=1e6, eos_ids=(EOS,), family="qwen3"
    ),
    "llama": ModelConfig(
        **_SIZES,
        d_head=6,
        tied=True,
        rope_theta=500.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
        rms_eps=1e-5,
        eos_ids=(EOS, 5),
        bos_id=1,
        family="llama",
    ),
}


def config(family: str = "qwen2", **changes) -> ModelConfig:
    """Returns a family's toy architecture with some settings changed."""
    return dataclasses.replace(FAMILIES[family], **changes)


def params(config: ModelConfig, seed: int = 0, deviation: float = 0.3) -> Params:
    """Returns weights large enough for logits that differ; norms are around 1, biases not 0."""
    rng = np.random.RandomState(seed)  # frozen for ever: the goldens were made with its numbers

    def leaf(name: str, weight: params_lib.Weight, shape: tuple[int, ...]):
        value = rng.normal(size=shape) * deviation + name.endswith("norm")
        return jnp.asarray(value, jnp.float32)

    return params_lib.build(config, leaf)


def adapter(
    config: ModelConfig,
    seed: int = 0,
    rank: int = 3,
    targets: tuple[str, ...] = ALL_TARGETS,
    alpha: float = 6.0,
) -> Adapter:
    """Returns an adapter with both factors random, so that it changes the model."""
    rng = np.random.RandomState([seed, 7])
    tree = lora.shapes(config, Lora(rank=rank, alpha=alpha, targets=targets))
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32)
    return tree.replace(
        a={name: draw(leaf) for name, leaf in tree.a.items()},
        b={name: draw(leaf) for name, leaf in tree.b.items()},
    )


def tokens(*shape: int, seed: int = 0, vocab: int = 37) -> np.ndarray:
    """Returns random token ids, none of them EOS."""
    return np.random.RandomState([seed, 11]).randint(1, vocab, shape).astype(np.int32)


_ROOM = (2, 14)  # rows and tokens of the one program that `forward` compiles for a tree of arrays
_forward = jax.jit(model.forward)


def forward(
    params: Params,
    adapter: Adapter | None,
    tokens_bt: np.ndarray,
    segments_bt: np.ndarray | None = None,
) -> jax.Array:
    """Returns the logits of up to 2 x 14 tokens, padded to that so that little is compiled."""
    tokens_bt = np.atleast_2d(tokens_bt)
    b, t = tokens_bt.shape
    if segments_bt is None:
        segments_bt = np.ones((b, t), np.int32)
    pad = ((0, _ROOM[0] - b), (0, _ROOM[1] - t))
    tokens_bt, segments_bt = (np.pad(x, pad).astype(np.int32) for x in (tokens_bt, segments_bt))
    return _forward(params, adapter, tokens_bt, segments_bt=segments_bt)[:b, :t]


class Numbers:
    """A tokenizer of texts that are token ids: `"5 6 7"`; `bos` opens a text, as Llama's does."""

    eos_token_id = EOS

    def __init__(self, bos: int | None = None):
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        start = [self.bos] if add_special_tokens and self.bos is not None else []
        return {"input_ids": start + [int(word) for word in text.split()]}


def text(length: int, name: object = 0) -> str:
    """Returns a text of `length` tokens that depends on its name."""
    rng = np.random.default_rng(zlib.crc32(str(name).encode()))
    return " ".join(str(x) for x in rng.integers(1, 37, length))


def _edit(context: Context, written: str) -> Edit:
    """Reads `lr=0.1;epochs=2;all;TEXT;PROMPT>TEXT`: directives first, then texts."""
    if written == "bad":
        raise SelfEditError("this self-edit is bad")
    settings, examples = {}, []
    for part in written.split(";"):
        if part.startswith("lr="):
            settings["learning_rate"] = float(part[3:])
        elif part.startswith("epochs="):
            settings["epochs"] = int(part[7:])
        elif part == "all":
            settings["loss_on"] = "all"
        elif part:
            prompt, _, completion = part.rpartition(">")
            examples.append(Example(completion, prompt))
    return Edit(tuple(examples), **settings)


def task() -> Task:
    """Returns a task whose self-edits are texts of token ids."""
    return Task((), lambda c: "", _edit, lambda c: [], lambda c, answers: Grade(0.0, ()))


def batch(
    written: list[str], settings: Inner | None = None, bos: int | None = None
) -> batching.Batch:
    """Returns self-edits of one context, packed."""
    context = Context("here")
    edits = [batching.SelfEdit(context, i, text) for i, text in enumerate(written)]
    return batching.pack(task(), edits, Numbers(bos), settings or Inner())
