"""The M-step: supervised finetuning of the policy on kept self-edits, by LoRA or of all weights."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax import batching, checkpoint, inner, lora, optim, progress, sharding
from seal_jax import config as config_lib
from seal_jax import slots as slots_lib
from seal_jax.checkpoint import LM
from seal_jax.config import Sft
from seal_jax.errors import SealError
from seal_jax.lora import Adapter
from seal_jax.params import Params
from seal_jax.tasks import Edit, Example


def finetune(
    lm: LM, rows: Iterable[tuple[str, str]], settings: Sft, key: jax.Array
) -> tuple[Params, np.ndarray]:
    """Returns weights finetuned on (prompt, self-edit) rows, and the loss of each step [i].

    The loss is on the self-edit and the token that ends it alone. By LoRA the adapter is merged.

    Args:
      key: Of the order of rows, and of the fresh adapter.

    Raises:
      SealError: without rows, or where a loss or a weight is not finite.
    """
    edit = Edit(tuple(Example(completion, prompt) for prompt, completion in rows))
    if not edit.examples:
        raise SealError("nothing to finetune on: no self-edit was kept")
    loop = config_lib.Inner(batch_size=settings.batch_size, max_length=settings.max_length)
    end = checkpoint.eos(lm)
    texts = tuple(batching.tokenize(edit, lm.tokenizer, end, loop))
    if cut := sum(text.tokens[-1] != end for text in texts):
        size = settings.max_length
        progress.say(
            f"{cut} of {len(texts)} texts are longer than {size} tokens: their ends are cut"
        )
    one = batching.Candidate(texts, settings.learning_rate, settings.epochs, 0)
    batch = batching.Batch((one,), loop, end)
    batching.check_vocabulary(batch, lm.config.vocab_size)
    (chunk,) = slots_lib.arrange(batch, 1, key)
    mesh = sharding.of(lm.params)
    slots = sharding.share(_one(chunk.slots, sharding.data_size(mesh)), mesh)
    static = {"settings": program(settings), "remat": jax.default_backend() != "cpu"}
    with sharding.use(mesh):
        if settings.method == "full":
            params, losses = fit_all(lm.params, slots, **static)
        else:
            own = sharding.share(key, mesh)
            adapter = jax.jit(lora.init, static_argnums=(0, 1))(lm.config, settings.lora, own)
            adapter, losses = fit_lora(lm.params, adapter, slots, **static)
            params = lora.merge(lm.params, adapter)
    if mesh is not None:
        params = sharding.place(params, jax.tree.map(lambda x: x.sharding, lm.params))
    losses = sharding.fetch(losses)[: int(chunk.slots.total_c[0])]
    if not np.isfinite(losses).all():
        raise SealError(
            f"finetuning diverged: the loss is not finite at step "
            f"{int(np.argmin(np.isfinite(losses)))}; lower its learning rate, "
            f"{settings.learning_rate:g}"
        )
    if not sharding.fetch(_finite(params)):  # no loss was seen after the last step
        raise SealError(
            "finetuning diverged: a weight is not finite after the last step; lower its learning "
            f"rate, {settings.learning_rate:g}"
        )
    return params, losses


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def _one(slots: slots_lib.Slots, parts: int) -> slots_lib.Slots:
    """Returns the only candidate's arrays, rows filled up to a multiple of `parts`."""
    own = one_candidate(slots, lambda x: x[0])
    # Segment 0 and weight 0: rows that see nothing and count nothing.
    fill = lambda x: np.pad(x, ((0, 0), (0, -x.shape[1] % parts), (0, 0)))
    names = ("tokens", "weights", "segments")
    return own.replace(**{name: tuple(map(fill, getattr(own, name))) for name in names})


def one_candidate(slots: slots_lib.Slots, take: Callable[[Any], Any]) -> slots_lib.Slots:
    """Returns arrays without their candidate axis, which `take` takes away."""
    return slots.replace(
        **{
            name: jax.tree.map(take, getattr(slots, name))
            for name in slots_lib.Slots.__dataclass_fields__
            if name not in slots_lib.SHARED
        }
    )


def _mean_loss(params, adapter, tokens_bt, weights_bt, segments_bt, *, remat: bool) -> jax.Array:
    """Returns `optim.loss`, the rows of the batch shared out over devices."""
    parts = sharding.data_size(sharding.current())
    if parts == 1:
        return optim.loss(params, adapter, tokens_bt, weights_bt, segments_bt, remat=remat)
    split = [x.reshape(parts, -1, x.shape[-1]) for x in (tokens_bt, weights_bt, segments_bt)]
    split = [sharding.constrain_rows(x) for x in split]
    one = functools.partial(optim.loss, params, adapter, remat=remat)
    count = jnp.sum(split[1].astype(jnp.float32), (1, 2))
    return jnp.sum(sharding.vmap(one)(*split) * count) / jnp.maximum(jnp.sum(count), 1e-9)


def program(settings: Sft) -> Sft:
    """Returns only what shapes the program."""
    return Sft(
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )


@functools.partial(jax.jit, static_argnames=("settings", "remat"))
def fit_lora(
    params: Params, adapter: Adapter, slots: slots_lib.Slots, *, settings: Sft, remat: bool
) -> tuple[Adapter, jax.Array]:
    """Returns the adapter after all steps, and losses [i]; the weights are frozen."""
    loss_of = functools.partial(_mean_loss, params, remat=remat)
    pin = functools.partial(sharding.pin, config=params.config)
    adapter, measures = inner.fit(loss_of, adapter, slots, settings, pin)
    return adapter, sharding.whole(measures.loss)


@functools.partial(jax.jit, static_argnames=("settings", "remat"))
def fit_all(
    params: Params, slots: slots_lib.Slots, *, settings: Sft, remat: bool
) -> tuple[Params, jax.Array]:
    """Returns the weights after all steps, and losses [i].

    They are trained in float32, and used and returned in the model's own type.
    """
    used = jax.tree.map(lambda x: x.dtype, params)
    cast = lambda tree: jax.tree.map(lambda x, dtype: x.astype(dtype), tree, used)

    def loss_of(trained, tokens_bt, weights_bt, segments_bt):
        return _mean_loss(cast(trained), None, tokens_bt, weights_bt, segments_bt, remat=remat)

    start = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    pin = functools.partial(sharding.pin, config=params.config)
    trained, measures = inner.fit(loss_of, start, slots, settings, pin)
    return cast(trained), sharding.whole(measures.loss)
