"""How many candidates are adapted at a time: as many as fit into the memory of a device.

And whether activations are kept for the backward pass instead of computed again: where they fit
beside enough candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import config as config_lib
from seal_jax import (
    costs,
    hardware,
    inner,
    lanes,
    multihost,
    programs,
    readers,
    sharding,
    slots,
    visits,
)
from seal_jax import params as params_lib
from seal_jax.batching import Batch
from seal_jax.lanes import Call
from seal_jax.params import ModelConfig, Params
from seal_jax.progress import say

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
    apart = readers.are_apart(params)
    weights = _Weights(params.config, params.embed.dtype.name, mesh, apart)
    bytes_of = lambda own, n: _bytes(weights, cfg.lora, own, _call(batch, mesh, n))
    if sharding.splits_adapters(mesh):
        chunk = largest(functools.partial(bytes_of, settings), limit, tuple(counts))
        return _said(settings, chunk, limit)
    # A resident's state, and the adapters that are done, before and after they are laid out anew.
    each = (3 + 3 * lanes.GROUP) * 4 * costs.adapter_numbers(params.config, cfg.lora) / unit
    kept = dataclasses.replace(settings, remat="none")
    if settings.chunk:
        needed = bytes_of(kept, settings.chunk)
        return kept if needed is not None and needed <= limit else settings
    find = lambda own: most(functools.partial(bytes_of, own), each, limit, counts)
    count = find(kept) if automatic else 0
    # Where all candidates fit, recomputing could make room for no more.
    chunk = 0 if count == counts[-1] else find(settings)
    if count and 2 * count >= chunk:
        return _said(kept, count, limit, ", activations kept")
    if not chunk:
        say(f"inner.chunk: {counts[0]} may need more than the {limit / 2**30:.1f} GiB there are")
        return dataclasses.replace(settings, chunk=counts[0])
    return _said(settings, chunk, limit)


def _said(settings: config_lib.Inner, chunk: int, limit: int, how: str = "") -> config_lib.Inner:
    """Returns the settings with this chunk, and tells the user."""
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
    return int((1 - hardware.HEAD_ROOM) * stats["bytes_limit"]) - max(others, 0)


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

    Tried from the largest. Where a call is full, its own memory hardly depends on the count, so
    what the first needs too much says where to go on; else in halves.

    Args:
      bytes_of: Compiles for a count; None where the compiler itself refused.
      each: Bytes that one candidate more takes.
    """
    last = len(counts) - 1
    needed = bytes_of(counts[last])
    if needed is not None and needed <= limit:
        return counts[last]
    fits, least, at = -1, last, last // 2  # the largest known to fit, the least known not to
    if needed is not None:
        ceiling = counts[last] - (needed - limit) / each
        at = max(sum(count <= ceiling for count in counts[:last]) - 1, 0)
    while least - fits > 1:
        needed = bytes_of(counts[at])
        if needed is not None and needed <= limit:
            fits = at
        else:
            least = at
        at = (fits + least) // 2
    return counts[fits] if fits >= 0 else 0


class _Weights(NamedTuple):
    """What a program depends on of the weights."""

    config: ModelConfig
    dtype: str
    mesh: jax.sharding.Mesh | None
    apart: bool


def _call(batch: Batch, mesh: jax.sharding.Mesh | None, count: int) -> Call:
    """Returns the largest call of a batch with `count` candidates resident; in lockstep, a step."""
    if not sharding.splits_adapters(mesh):
        return lanes.largest_call(batch, count, parts=sharding.data_size(mesh))
    steps = [step for own in batch.steps for step in own]
    t = max(sum(len(text.tokens) for text in row) for step in steps for row in step)
    return Call(count, 1, visits.Size(max(map(len, steps)), slots.round_up(t), t))


@functools.lru_cache
def _bytes(
    weights: _Weights, adapter: config_lib.Lora, settings: config_lib.Inner, call: Call
) -> int | None:
    """Returns the bytes on each device at the worst moment of a chunk's inner loops."""
    config = weights.config
    try:
        model = config_lib.Model(dtype=weights.dtype)
        if sharding.splits_adapters(weights.mesh):
            cfg = config_lib.Config(model=model, lora=adapter, inner=settings)
            size = (call.residents, call.size.t, call.size.rows)
            program = programs.inner_loop(config, cfg, weights.mesh, *size)
            return programs.memory(programs.compiled(program)).total
        if weights.mesh is not None:
            params = programs.weights(config, weights.mesh, dtype=weights.dtype)
        else:
            apart = functools.partial(readers.layers_apart, always=weights.apart)
            params = jax.eval_shape(apart, params_lib.shapes(config, jnp.dtype(weights.dtype)))
        program = {"remat": inner.recompute(settings), "mesh": weights.mesh}
        return programs.lanes_memory(params, adapter, settings, call, **program).total
    except programs.TooBig:
        return None
