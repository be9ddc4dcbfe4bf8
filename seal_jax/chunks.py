"""How many candidates are adapted at a time: as many as fit into the memory of a device.

And whether activations are kept for the backward pass instead of computed again: where they fit
beside enough candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import config as config_lib
from seal_jax import inner, lanes, lora, multihost, programs, sharding
from seal_jax import model as model_lib
from seal_jax import params as params_lib
from seal_jax.batching import Batch, steps_of
from seal_jax.params import ModelConfig, Params
from seal_jax.progress import say

HEAD_ROOM = 0.1
# Few counts, so that a little more free memory compiles no other program.
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PROBES = 2


def choose(
    params: Params, batch: Batch, cfg: config_lib.Config, limit: int | None = None
) -> config_lib.Inner:
    """Returns the inner loop's settings with a chunk: the user's, or the largest that fits.

    Of settings that leave it open (`remat: auto`), layers are recomputed only if keeping their
    activations would leave room for less than half as many candidates.

    What a count needs is the compiler's word, in bytes on each device; a few programs are compiled,
    and the cache of compiled programs has them the next time. Where the device does not say how
    much memory it has (a CPU), `inner.chunk_size` decides.

    Args:
      limit: Bytes that a program may take on a device, weights included; None asks the device.
    """
    settings = batch.settings
    if settings.chunk or not any(c.texts for c in batch.candidates):
        return settings
    limit = room(params) if limit is None else limit
    if limit is None:
        return settings
    if jax.process_count() > 1:
        limit = int(multihost.broadcast(np.int64(limit)))
    mesh = sharding.of(params)
    unit = sharding.data_size(mesh)
    need = -(-len(batch) // unit)
    counts = [n * unit for n in _COUNTS if n < need] + [
        next((n for n in _COUNTS if n >= need), _COUNTS[-1]) * unit
    ]
    if mesh is None:
        steps = [s for c in batch.candidates for s in steps_of(c.texts, settings.batch_size)]
        size = max((lanes.size_of(step) for step in steps), key=lambda s: s.rows * s.t)
        size = size._replace(predicted=size.t)
    else:
        longest = max(len(text.tokens) for c in batch.candidates for text in c.texts)
        size = lanes.Size(1, longest, longest)
    dtype = params.embed.dtype.name
    bytes_of = functools.partial(_bytes, params.config, dtype, mesh, cfg.lora, size=size)
    chunk = largest(functools.partial(bytes_of, settings), limit, tuple(counts))
    how = ""
    if mesh is None and settings.remat == "auto" and inner.recompute(settings):
        kept = dataclasses.replace(settings, remat="none")
        for count in [n for n in reversed(counts) if chunk // 2 <= n <= chunk]:
            if (needed := bytes_of(kept, count)) is not None and needed <= limit:
                settings, chunk, how = kept, count, ", activations kept"
                break
    say(f"inner.chunk: {chunk} candidates at a time fit into {limit / 2**30:.1f} GiB{how}")
    return dataclasses.replace(settings, chunk=chunk)


def room(params: Params) -> int | None:
    """Returns the bytes on a device for weights and a program, less head-room; None if unknown."""
    shard = params.embed.addressable_shards[0]
    stats = shard.device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    others = stats.get("bytes_in_use", here) - here
    return int((1 - HEAD_ROOM) * stats["bytes_limit"]) - max(others, 0)


def largest(bytes_of: Callable[[int], int | None], limit: int, counts: Sequence[int]) -> int:
    """Returns the largest of rising counts that fits; the smallest where none does.

    Memory is nearly affine in the count: a line through two small ones says where to begin.

    Args:
      bytes_of: Compiles for a count; None where the compiler itself refused.
    """
    seen = {count: bytes_of(count) for count in counts[1 : 1 + _PROBES]}
    start = len(counts) - 1
    if len(seen) == _PROBES and all(seen.values()):
        (one, low), (other, high) = seen.items()
        slope = max((high - low) / (other - one), 1.0)
        start = max(
            (i for i, c in enumerate(counts) if low + slope * (c - one) <= limit), default=0
        )
    for count in counts[start:0:-1]:
        needed = seen[count] if count in seen else bytes_of(count)
        if needed is not None and needed <= limit:
            return count
    return counts[0]


@functools.lru_cache
def _bytes(
    config: ModelConfig,
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    adapter: config_lib.Lora,
    settings: config_lib.Inner,
    count: int,
    size: lanes.Size,
) -> int | None:
    """Returns the bytes on each device of the program for `count` candidates."""
    if mesh is not None:
        cfg = config_lib.Config(lora=adapter, inner=settings)
        lowered = programs.inner_loop(config, cfg, mesh, count, size.t)
    else:
        lowered = _lowered_call(config, dtype, adapter, settings, size, count)
    try:
        return programs.memory(programs.compiled(lowered)).total
    except programs.TooBig:
        return None


def _lowered_call(config, dtype, adapter, settings, size, count):
    """Returns the lowered call of lanes of `size`, with `count` candidates resident."""
    of = jax.ShapeDtypeStruct
    rows, t = size.rows, size.t
    width = lanes.width_of(size, count)
    params = jax.eval_shape(model_lib.layers_apart, params_lib.shapes(config, jnp.dtype(dtype)))
    form = lora.form_of(lora.shapes(config, adapter))
    state = of((count, 3, form.size), jnp.float32)
    work = lanes.Work(
        of((width,), jnp.int32),
        of((width,), jnp.int32),
        of((width, rows, t), jnp.int32),
        of((width, rows, t), jnp.int8),
        of((width, rows, t), jnp.int32),
        of((width,), jnp.float32),
        of((width,), jnp.int32),
    )
    losses = of((count, lanes.LOSSES), jnp.float32)
    program = {
        "form": form,
        "settings": inner.loop_settings(settings),
        "remat": inner.recompute(settings),
    }
    return lanes.advance.lower(params, state, losses, work, **program)
