"""Rotary positions: heads turned by angles that grow with their place in the text."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.params import ModelConfig

# Up to so many numbers the cosines (and the sines) of all positions are constants of a program.
_TABLE = 1 << 17


def angles(
    positions: jax.Array, config: ModelConfig, bound: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of the rotary angles, float32, positions' shape plus [h].

    Args:
      bound: All positions are below it (static). With a low one they are looked up: computed where
        they are used, XLA computes them anew in every layer, and on a CPU that takes long.
    """
    half = np.arange(0, config.d_head, 2, dtype=np.float64) / config.d_head
    inverse = config.rope_theta**-half
    if config.rope_scaling:
        s = config.rope_scaling
        turns = s.original_max_position_embeddings * inverse / (2 * math.pi)
        smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        inverse = inverse * (smooth + (1 - smooth) / s.factor)
    inverse = np.concatenate([inverse, inverse]).astype(np.float32)
    if bound and bound * config.d_head <= _TABLE:
        every = np.arange(bound, dtype=np.float32)[:, None] * inverse
        return jnp.asarray(np.cos(every))[positions], jnp.asarray(np.sin(every))[positions]
    own = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(own), jnp.sin(own)


def turn(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns heads [..., n, h] turned by the angles of their positions."""
    cos, sin = (part[..., None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([-second, first], -1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
