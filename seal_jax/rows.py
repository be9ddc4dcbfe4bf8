"""How many sequences are decoded together: as many as pay, and fit into a device's memory."""

from collections.abc import Sequence

import jax
import numpy as np

from seal_jax import attention, costs, hardware, multihost, sharding
from seal_jax.checkpoint import LM
from seal_jax.params import ModelConfig

MOST = {"cpu": 64, "other": 256}
_SHARE = 0.8  # of the memory that weights leave; what is counted below is not all


def usual(lm: LM) -> int:
    """Returns how many sequences pay, on all devices together, if memory takes them."""
    return _most() * sharding.data_size(sharding.of(lm.params))


def _most() -> int:
    return MOST["cpu" if jax.default_backend() == "cpu" else "other"]


def at_once(lm: LM, prompt: int, rooms: Sequence[int], samples: int, held: int = 0) -> int:
    """Returns how many prompts a device reads together, with `samples` sequences of each.

    Args:
      prompt: Tokens of the longest prompt.
      rooms: Tokens of each sequence, program by program.
      held: Bytes on the device besides the weights.
    """
    most = _most()
    limit = hardware.memory_of(lm.params.embed)
    if jax.process_count() > 1:  # all decide alike
        limit = int(multihost.broadcast(np.int64(limit or 0))) or None
    if limit is None:
        return max(1, most // samples)
    here = lambda x: x.addressable_shards[0].data.nbytes
    held += sum(map(here, jax.tree.leaves((lm.params, lm.reader))))
    itemsize = lm.params.embed.dtype.itemsize
    return fitting(lm.config, limit - held, most, prompt, rooms, samples, itemsize)


def fitting(
    config: ModelConfig,
    free: float,
    most: int,
    prompt: int,
    rooms: Sequence[int],
    samples: int,
    itemsize: int = 2,
) -> int:
    """Returns the prompts, at least 1, whose sequences (`samples` each) fit and are `most` at most.

    Args:
      free: Bytes that the weights leave.
    """
    # While a cache grows, the smaller one is still there.
    kept = costs.cache_bytes(config, itemsize) * sum(prompt + samples * room for room in rooms[-2:])
    logits = 3 * 4 * config.vocab_size * samples
    # While a prompt is read: a layer at work, and its scores.
    d, heads = config.d_model, (config.n_heads + 2 * config.n_kv_heads) * config.d_head
    layer = itemsize * (4 * d + 2 * heads + 3 * config.d_ff) + 2 * 4 * d
    scores = 2 * 4 * config.n_heads * attention.queries_at_once(prompt)
    each = kept + logits + prompt * (layer + scores)
    return max(1, min(most // samples, int(_SHARE * free / each)))
