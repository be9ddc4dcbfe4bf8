"""The inner loop: apply a self-edit by a short LoRA fine-tune. One candidate, then many by vmap."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import batching, costs, lanes, lora, optim, residents, sharding, streams
from seal_jax import config as config_lib
from seal_jax import slots as slots_lib
from seal_jax.batching import Batch
from seal_jax.errors import SealError
from seal_jax.lora import Adapter
from seal_jax.optim import Measures
from seal_jax.params import ModelConfig, Params
from seal_jax.slots import Slots
from seal_jax.visits import Price

# One candidate's Slots, as vmap sees them: arrays without a candidate axis are shared.
_AXES = {name: None if name in slots_lib.SHARED else 0 for name in Slots.__dataclass_fields__}
# Operations of two cores in the half second that tracing a program and reading it from the cache
# take; compiling takes several times that, once.
_PROGRAM = 5e10


def fit(
    loss_of: Callable[..., jax.Array],
    trained: Any,
    slots: Slots,
    settings: config_lib.Inner | config_lib.Sft,
    pin: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Any, Measures]:
    """Returns what is trained after all its steps, and measures [i] of each, 0 past the last.

    Pure, for one candidate (no `c` axis). A step in which the candidate is not active changes
    nothing.

    Args:
      loss_of: Called as loss_of(trained, tokens_bt, weights_bt, segments_bt).
      settings: schedule, warmup_steps, clip and weight_decay are read (static).
      pin: Lays the loop's state out over devices; see `sharding.pin`.
    """
    room = slots.bucket_i.shape[0]
    rate = lambda step: optim.learning_rate(
        settings.schedule, step, slots.learning_rate_c, slots.total_c, settings.warmup_steps
    )

    def gradient(bucket: int, trained: Any, row: jax.Array) -> tuple[jax.Array, Any]:
        texts = (slots.tokens[bucket], slots.weights[bucket], slots.segments[bucket])
        texts = [jax.lax.dynamic_index_in_dim(x, row, keepdims=False) for x in texts]
        value, grads = jax.value_and_grad(loss_of)(trained, *texts)
        return value, pin(grads)

    branches = [functools.partial(gradient, k) for k in range(len(slots.tokens))]

    def visit(i: jax.Array, carry):
        state, measures = carry
        # The bucket is the same for all candidates, so under vmap this stays a real branch.
        value, grads = jax.lax.switch(slots.bucket_i[i], branches, state.trained, slots.row_i[i])
        new, seen = optim.update(
            state, value, grads, rate, clip=settings.clip, weight_decay=settings.weight_decay
        )
        active = slots.active_ci[i]
        # Inactive steps write past the end, where the write is dropped.
        at = jnp.where(active, state.step, room)
        measures = jax.tree.map(lambda all_, one: all_.at[at].set(one, mode="drop"), measures, seen)
        state = jax.tree.map(lambda a, b: jnp.where(active, a, b), new, state)
        return pin(state), measures

    nothing = jnp.zeros(room, jnp.float32)  # of NaN jax_debug_nans would complain
    start = (pin(optim.init(trained)), Measures(nothing, nothing, nothing))
    state, measures = jax.lax.fori_loop(0, slots.visits, visit, start)
    return state.trained, measures


def adapt(
    params: Params,
    adapter: Adapter,
    slots: Slots,
    settings: config_lib.Inner,
    *,
    remat: bool = False,
) -> tuple[Adapter, Measures]:
    """Returns one candidate's adapter after its inner loop, and measures [i]: see `fit`.

    The weights are frozen. The loss of an adapter that diverged is NaN from then on.
    """

    def loss_of(adapter, tokens_bt, weights_bt, segments_bt):
        value = optim.loss(params, adapter, tokens_bt, weights_bt, segments_bt, remat=remat)
        return jnp.where(optim.sound((adapter.a, adapter.b)), value, jnp.nan)

    return fit(loss_of, adapter, slots, settings, lambda tree: sharding.pin(tree, params.config))


@functools.partial(jax.jit, static_argnames=("settings", "remat"), donate_argnames=("adapters",))
def adapt_slots(
    params: Params,
    adapters: Adapter,
    slots: Slots,
    *,
    settings: config_lib.Inner,
    remat: bool = False,
) -> tuple[Adapter, Measures]:
    """Returns the adapters [c, ...] and measures [c, i] of a chunk.

    Args:
      params: Frozen, without a `c` axis.
      adapters: Where the candidates begin; donated.
      settings: As `loop_settings` makes them (static).
      remat: See `optim.loss` (static).
    """
    one = functools.partial(adapt, settings=settings, remat=remat)
    axes = Slots(**_AXES)
    trained, measures = sharding.vmap(one, in_axes=(None, 0, axes))(params, adapters, slots)
    return sharding.pin(trained, params.config, stacked=True), sharding.whole(measures)


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def init_many(
    config: ModelConfig, settings: config_lib.Lora, key: jax.Array, ids_c: jax.Array
) -> Adapter:
    """Returns a fresh adapter for each candidate; a candidate's depends on `key` and its id."""
    one = lambda name: lora.init(config, settings, jax.random.fold_in(key, name))
    return sharding.pin(sharding.vmap(one)(ids_c), config, stacked=True)


def recompute(settings: config_lib.Inner) -> bool:
    """Returns whether layers are recomputed in the backward pass on this machine."""
    return settings.remat == "layers" or (
        settings.remat == "auto" and jax.default_backend() != "cpu"
    )


def chunk_size(settings: config_lib.Inner) -> int:
    """Returns how many candidates share a program.

    On a CPU more candidates at once do not pay (the cores are busy with one), so chunks are small.
    """
    if settings.chunk:
        return settings.chunk
    return max(4, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 64


def chunks_at_once(params: Params) -> int:
    """Returns how many chunks are worked on at once; see `streams.count`."""
    mesh = sharding.of(params)
    return streams.count(1 if mesh is None else mesh.size)


def arrange(params: Params, batch: Batch, key: jax.Array) -> Iterator[slots_lib.Chunk]:
    """Yields the chunks in which a batch is adapted: in lanes, but in lockstep where an adapter is
    split over devices.

    Raises:
      SealError: for token ids that the model does not know.
    """
    batching.check_vocabulary(batch, params.config.vocab_size)
    mesh, size = sharding.of(params), chunk_size(batch.settings)
    parts = sharding.data_size(mesh)
    if sharding.splits_adapters(mesh):
        return slots_lib.arrange(batch, size, key, parts)
    return lanes.arrange(batch, size, key, price=price(params.config), parts=parts)


def price(config: ModelConfig) -> Price:
    """Returns what a program of its own must be worth on a CPU."""
    head = config.vocab_size * config.d_model
    layers = costs.matrix_numbers(config) - head
    return Price(program=_PROGRAM / (4 * layers), predicted=head / layers)


def adapt_chunk(
    params: Params,
    batch: Batch,
    chunk: slots_lib.Chunk,
    key: jax.Array,
    lora_settings: config_lib.Lora,
) -> tuple[Adapter, jax.Array]:
    """Returns the adapters [c, ...] and losses [c, i] of one chunk, fillers included.

    Losses are 0 past a candidate's last step.
    """
    ids = np.array([batch.candidates[i].id if i >= 0 else 0 for i in chunk.index], np.uint32)
    program = {"settings": loop_settings(batch.settings), "remat": recompute(batch.settings)}
    if isinstance(chunk.slots, lanes.Lanes):
        return residents.run(params, chunk.slots, ids, key, lora_settings, **program)
    mesh = sharding.of(params)
    slots = place(chunk.slots, mesh)
    ids, key = sharding.share_out(ids, mesh), sharding.share(key, mesh)
    with sharding.use(mesh):
        fresh = init_many(params.config, lora_settings, key, ids)
        adapters, measures = adapt_slots(params, fresh, slots, **program)
    return adapters, measures.loss


def place(slots: Slots, mesh: jax.sharding.Mesh | None) -> Slots:
    """Returns a chunk's arrays on the devices, each candidate's where its adapter lies."""
    if mesh is None:
        return jax.device_put(slots)
    return sharding.place(slots, slot_shardings(slots, mesh))


def slot_shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Slots:
    """Returns the sharding of each array of a chunk."""
    of = lambda name: sharding.replicated if name in slots_lib.SHARED else sharding.candidates
    return Slots(
        **{
            name: jax.tree.map(lambda _, name=name: of(name)(mesh), getattr(slots, name))
            for name in Slots.__dataclass_fields__
        }
    )


def loop_settings(settings: config_lib.Inner) -> config_lib.Inner:
    """Returns only what shapes the program, so that e.g. another learning rate compiles nothing."""
    return config_lib.Inner(
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )


def adapt_many(
    params: Params, batch: Batch, key: jax.Array, cfg: config_lib.Config
) -> tuple[Adapter, np.ndarray]:
    """Returns adapters [c, ...] and losses [c, i] of all candidates, in the batch's order.

    Losses are NaN past a candidate's last step; a NaN before it means that it diverged. What a
    candidate's adapter becomes does not depend on its company.

    Args:
      cfg: `cfg.lora` is read; the inner loop's settings came with the batch.

    Raises:
      SealError: where the batch is empty, or has token ids that the model does not know.
    """
    if not len(batch):
        raise SealError("adapt_many: no self-edits were given")
    adapters, losses, places, most = [], [], [], 0

    def work(chunk: slots_lib.Chunk) -> tuple[slots_lib.Chunk, Adapter, jax.Array]:
        some, loss = adapt_chunk(params, batch, chunk, key, cfg.lora)
        jax.block_until_ready((some, loss))
        return chunk, some, loss

    at_once = chunks_at_once(params)
    for chunk, some, loss in streams.ordered(work, arrange(params, batch, key), at_once):
        adapters.append(some)
        steps_c1 = np.asarray(chunk.slots.total_c)[:, None]
        loss_ci = sharding.fetch(loss)
        losses.append(np.where(np.arange(loss_ci.shape[1]) < steps_c1, loss_ci, np.nan))
        places.append(chunk.index)
        most = max(most, int(np.max(steps_c1)))
    who = np.concatenate(places)
    real = np.flatnonzero(who >= 0)
    back = real[np.argsort(who[real])]
    return _joined(adapters, back), np.concatenate(losses)[back, :most]


@jax.jit
def _joined(chunks: list[Adapter], back: jax.Array) -> Adapter:
    """Returns the adapters of all chunks, those at `back`."""
    return jax.tree.map(lambda *x: jnp.concatenate(x)[back], *chunks)


def diverged(batch: Batch, adapters: Adapter, losses: np.ndarray) -> np.ndarray:
    """Returns which candidates [c] diverged, in whatever step: no loss is seen after the last."""
    finite = [np.isfinite(row[:n]).all() for row, n in zip(losses, batch.total, strict=True)]
    return ~(np.array(finite, bool) & sharding.fetch(sound(adapters)))


@jax.jit
def sound(adapters: Adapter) -> jax.Array:
    """Returns which of the adapters [c, ...] are `optim.sound`."""
    return jax.vmap(optim.sound)((adapters.a, adapters.b))
