"""How many candidates are adapted at a time: as many as fit into the memory of a device.

And whether activations are kept for the backward pass instead of computed again: where they fit
beside enough candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import config as config_lib
from seal_jax import inner, lanes, lora, multihost, programs, residents, sharding
from seal_jax import model as model_lib
from seal_jax.batching import Batch
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

    Of settings that leave it open (`remat: auto`), layers are recomputed only if their activations
    do not fit beside the user's chunk, or would leave room for less than half as many candidates.

    What a count needs is the compiler's word, in bytes on each device; a few programs are compiled,
    and the cache of compiled programs has them the next time. Where the device does not say how
    much memory it has (a CPU), `inner.chunk_size` decides.

    Args:
      limit: Bytes that a program may take on a device, weights included; None asks the device.
    """
    settings = batch.settings
    automatic = settings.remat == "auto" and inner.recompute(settings)
    if settings.chunk and (not automatic or sharding.of(params) is not None):
        return settings
    if not any(c.texts for c in batch.candidates):
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
    if mesh is not None:
        longest = max(len(text.tokens) for c in batch.candidates for text in c.texts)
        lowered = functools.partial(_on_mesh, params.config, params.embed.dtype.name, mesh, longest)
        chunk = largest(lambda n: _bytes(lowered, cfg.lora, settings, n), limit, tuple(counts))
        return _said(settings, chunk, limit)
    lowered = _lanes_of(params, batch)
    bytes_of = lambda own, n: _bytes(lowered, cfg.lora, own, n)
    each = _resident_bytes(params.config, cfg.lora)
    kept = dataclasses.replace(settings, remat="none")
    if settings.chunk:
        needed = bytes_of(kept, settings.chunk)
        return kept if needed is not None and needed <= limit else settings
    if automatic and (count := most(functools.partial(bytes_of, kept), each, limit, counts)):
        again = count < counts[-1] and most(
            functools.partial(bytes_of, settings), each, limit, counts
        )
        if 2 * count >= again:
            return _said(kept, count, limit, ", activations kept")
        return _said(settings, again, limit)
    chunk = most(functools.partial(bytes_of, settings), each, limit, counts)
    return _said(settings, chunk or counts[0], limit)


def _said(settings, chunk: int, limit: int, how: str = "") -> config_lib.Inner:
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


def most(
    bytes_of: Callable[[int], int | None], each: int, limit: int, counts: Sequence[int]
) -> int:
    """Returns the largest of rising counts that fits; 0 where none does.

    Tried from the largest: a call's own memory hardly depends on the count, so what the first
    needs too much says where to go on.

    Args:
      bytes_of: Compiles for a count; None where the compiler itself refused.
      each: Bytes by which a count needs more than the one before.
    """
    ceiling = counts[-1]
    for count in reversed(counts):
        if count > ceiling:
            continue
        needed = bytes_of(count)
        if needed is None:
            ceiling = count // 2
        elif needed <= limit:
            return count
        else:
            ceiling = count - max(1, (needed - limit) // each)
    return 0


def _resident_bytes(config: ModelConfig, adapter: config_lib.Lora) -> int:
    """Returns the bytes of a resident candidate: its state, and adapters that are done."""
    numbers = lora.form_of(lora.shapes(config, adapter)).size
    return 4 * numbers * (3 + 2 * lanes.GROUP)


def _bytes(
    lowered: Callable[..., Any], adapter: config_lib.Lora, settings: config_lib.Inner, count: int
) -> int | None:
    """Returns the bytes on each device of the largest program for `count` candidates."""
    try:
        program, more = lowered(adapter, settings, count)
        return programs.memory(programs.compiled(program)).total + more
    except programs.TooBig:
        return None


def _on_mesh(config, dtype, mesh, longest, adapter, settings, count):
    cfg = config_lib.Config(lora=adapter, inner=settings)
    return programs.inner_loop(config, cfg, mesh, count, longest), 0


def _lanes_of(params: Params, batch: Batch) -> Callable[..., Any]:
    """Returns what lowers the largest call of a batch, and says what else it needs in bytes."""
    config = params.config
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    if model_lib.few_layers(config):
        weights = jax.eval_shape(model_lib.layers_apart, weights)

    def lowered(adapter, settings, count):
        of = jax.ShapeDtypeStruct
        form = lora.form_of(lora.shapes(config, adapter))
        shapes = lanes.shapes_of(batch, count)
        width, size = lanes.largest_call(batch, shapes)
        wp, wbt = (width, size.places), (width, size.rows, size.t)
        kinds = (jnp.int32, jnp.int8, jnp.int32, jnp.int8)
        whose = [of(wp, jnp.int32)] * 3
        work = residents.Work(
            *whose, *(of(wbt, kind) for kind in kinds), of(wp, jnp.float32), of(wp, jnp.int32)
        )
        state = of((shapes.residents, 3, form.size), jnp.float32)
        losses = of((shapes.chunk, shapes.room), jnp.float32)
        program = residents.advance.lower(
            weights,
            state,
            losses,
            work,
            form=form,
            settings=inner.loop_settings(settings),
            remat=inner.recompute(settings),
            predicted=size.predicted,
        )
        return program, 2 * 4 * shapes.chunk * form.size

    return lowered
