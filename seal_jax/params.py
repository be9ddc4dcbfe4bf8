"""The weights: an architecture, one table of all weights, and the pytree that holds them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seal_jax import dims, lora


class RopeScaling(NamedTuple):
    """Llama 3's stretching of low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; static under jit.

    Attributes:
      eos_ids: Tokens that end a generation.
      max_positions: Tokens in a row that the model was made for; nothing breaks beyond.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    max_positions: int = 32768
    family: str = "qwen2"


class Weight(NamedTuple):
    """One line of the weights table.

    Attributes:
      dims: Dimensions of the array here, layers first where it has them.
      source: Name in Hugging Face files; `{l}` is the layer.
      transposed: Whether the files store [out, in].
    """

    dims: tuple[str, ...]
    source: str
    transposed: bool = False


_LAYER = "model.layers.{l}."
_HOME = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}


def table(config: ModelConfig) -> dict[str, Weight]:
    """Returns every weight of the model: read by init, checkpoints, sharding and tests."""
    rows = {
        name: Weight(("l", i, o), f"{_LAYER}{_HOME.get(name, 'mlp')}.{name}_proj.weight", True)
        for name, (i, o) in lora.PROJECTIONS.items()
    }
    if config.qkv_bias:
        for name in "qkv":
            out = lora.PROJECTIONS[name][1]
            rows[f"{name}_bias"] = Weight(("l", out), f"{_LAYER}self_attn.{name}_proj.bias")
    if config.qk_norm:
        for name in "qk":
            rows[f"{name}_norm"] = Weight(("l", "h"), f"{_LAYER}self_attn.{name}_norm.weight")
    rows["attention_norm"] = Weight(("l", "d"), f"{_LAYER}input_layernorm.weight")
    rows["mlp_norm"] = Weight(("l", "d"), f"{_LAYER}post_attention_layernorm.weight")
    rows["embed"] = Weight(("v", "d"), "model.embed_tokens.weight")
    rows["norm"] = Weight(("d",), "model.norm.weight")
    if not config.tied:
        rows["head"] = Weight(("d", "v"), "lm_head.weight", True)
    return rows


@struct.dataclass
class Params:
    """The weights.

    Attributes:
      embed: [v, d].
      layers: Per name of the weights table, stacked [l, ...].
      norm: [d].
      head: [d, v], or None where the embedding is tied.
      config: The architecture (static).
    """

    embed: jax.Array
    layers: dict[str, jax.Array]
    norm: jax.Array
    head: jax.Array | None
    config: ModelConfig = struct.field(pytree_node=False)


def build(config: ModelConfig, leaf: Callable[[str, Weight, tuple[int, ...]], Any]) -> Params:
    """Returns the tree of weights with `leaf(name, weight, shape)` at each place."""
    size = dims.sizes(config)
    made = {
        name: leaf(name, weight, tuple(size[x] for x in weight.dims))
        for name, weight in table(config).items()
    }
    top = {name: made.pop(name, None) for name in ("embed", "norm", "head")}
    return Params(**top, layers=made, config=config)


def of(params: Params, name: str) -> Any:
    """Returns what a tree of weights holds under a name of the weights table."""
    return params.layers[name] if name in params.layers else getattr(params, name)


def shapes(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """Returns the tree of weights as jax.ShapeDtypeStruct."""
    return build(config, lambda name, weight, shape: jax.ShapeDtypeStruct(shape, dtype))


def init(config: ModelConfig, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> Params:
    """Returns random weights: norms 1, biases 0, the rest normal with deviation 0.02.

    Outputs of residual branches are scaled down by the root of their number (GPT-2).
    """
    rng = np.random.default_rng(seed)
    residual = 1 / math.sqrt(2 * config.n_layers)

    def leaf(name: str, weight: Weight, shape: tuple[int, ...]) -> jax.Array:
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape, dtype)
        deviation = 0.02 * (residual if name in ("o", "down") else 1.0)
        return jnp.asarray(rng.standard_normal(shape, np.float32) * deviation, dtype)

    return build(config, leaf)
