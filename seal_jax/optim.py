"""Loss, schedules and one AdamW step, for any trained pytree (an adapter or all weights)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from seal_jax import lora, model
from seal_jax.lora import Adapter
from seal_jax.params import Params

# Logits of more than this many (token, vocabulary) pairs are made a part of the sequence at a time.
_LOGITS_AT_ONCE = 1 << 22
_LOSS_CHUNK = 128
_SOUND = 1e3  # trained adapters stay below 1, or below some hundreds at a rate of 1


def token_nll(
    params: Params, x_btd: jax.Array, targets_bt: jax.Array, frozen: bool = False
) -> jax.Array:
    """Returns -log p(target) of each position, [b, t], float32, from final activations.

    Args:
      frozen: The head is not trained (static): the gradient with respect to activations is
        computed along with the values, so that logits are neither kept nor computed twice.
    """
    v = params.config.vocab_size
    b, t = targets_bt.shape
    if frozen:
        nll = lambda x, targets: _frozen_nll(params, x, targets)
    else:
        nll = lambda x, targets: _nll(params, x, targets)[0]
    if b * t * v <= _LOGITS_AT_ONCE or t <= _LOSS_CHUNK:
        return nll(x_btd, targets_bt)
    short = -t % _LOSS_CHUNK
    x = jnp.pad(x_btd, ((0, 0), (0, short), (0, 0))).reshape(b, -1, _LOSS_CHUNK, x_btd.shape[-1])
    targets = jnp.pad(targets_bt, ((0, 0), (0, short))).reshape(b, -1, _LOSS_CHUNK)
    part = nll if frozen else jax.checkpoint(nll)
    parts = jax.lax.map(lambda one: part(*one), (x.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return parts.swapaxes(0, 1).reshape(b, -1)[:, :t]


def _nll(
    params: Params, x: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[list[jax.Array], jax.Array, list[jax.Array]]]:
    """Returns -log p of targets, and what its gradient with respect to the logits needs.

    Each part of the head is gone through by itself: joined, all logits would be copied.
    """
    parts = model.unembed_parts(params, x)
    total = functools.reduce(jnp.logaddexp, [jax.nn.logsumexp(logits, -1) for logits in parts])
    hits, chosen, start = [], 0.0, 0
    for logits in parts:
        at = targets[..., None] - start
        hit = jnp.arange(logits.shape[-1]) == at
        if len(parts) > 1:  # on a CPU
            found = jnp.take_along_axis(logits, jnp.clip(at, 0, logits.shape[-1] - 1), -1)
            inside = (at >= 0) & (at < logits.shape[-1])
            own = jnp.where(inside, found, 0.0)[..., 0]
        else:
            # A masked sum: a gather's gradient is a slow scatter, and a mesh would join the parts.
            own = jnp.sum(jnp.where(hit, logits, 0.0), -1)
        chosen += own
        hits.append(hit)
        start += logits.shape[-1]
    return total - chosen, (parts, total, hits)


@jax.custom_vjp
def _frozen_nll(params: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
    return _nll(params, x, targets)[0]


def _frozen_nll_forward(params: Params, x: jax.Array, targets: jax.Array):
    value, (parts, total, hits) = _nll(params, x, targets)
    by_logits = [
        (jnp.exp(logits - total[..., None]) - hit).astype(x.dtype)
        for logits, hit in zip(parts, hits, strict=True)
    ]
    return value, model.unembed_back(params, by_logits)


def _frozen_nll_backward(by_x: jax.Array, change: jax.Array):
    return None, (change[..., None] * by_x.astype(jnp.float32)).astype(by_x.dtype), None


_frozen_nll.defvjp(_frozen_nll_forward, _frozen_nll_backward)


def loss(
    params: Params,
    adapter: Adapter | None,
    tokens_bt: jax.Array,
    weights_bt: jax.Array,
    segments_bt: jax.Array | None = None,
    *,
    remat: bool = False,
    predicted: int = 0,
) -> jax.Array:
    """Returns the mean -log p of the tokens with weight, float32.

    Args:
      weights_bt: How much predicting *this* token counts. The first of a text is never predicted:
        its weight only enlarges the divisor, as in transformers' Trainer.
      segments_bt: See `model.hidden`; a text's first token is never predicted from another text.
      remat: See `model.hidden` (static).
      predicted: No row has more tokens with weight than this (static): logits are made of so many
        places alone, where the weights are. 0 makes them everywhere.
    """
    x_btd = model.hidden(params, adapter, tokens_bt, segments_bt=segments_bt, remat=remat)
    frozen = adapter is not None
    weighted_bt, _ = _weighted(params, x_btd, tokens_bt, weights_bt, segments_bt, predicted, frozen)
    return jnp.sum(weighted_bt) / jnp.maximum(jnp.sum(weights_bt.astype(jnp.float32)), 1e-9)


def losses(
    params: Params,
    adapters: Adapter,
    tokens_bt: jax.Array,
    weights_bt: jax.Array,
    segments_bt: jax.Array,
    place_bt: jax.Array,
    sound_p: jax.Array,
    *,
    remat: bool = False,
    predicted: int = 0,
) -> jax.Array:
    """Returns the `loss` [p] of each of p adapters over the tokens that are its own.

    Of an adapter that diverged it is NaN.

    Args:
      adapters: Stacked [p, ...].
      place_bt: Which of them a token belongs to; a text's tokens belong to one.
      sound_p: Which of them have not diverged: see `sound`.
    """
    count = jax.tree.leaves(adapters.a)[0].shape[0]
    if count > 1:
        # In a shared row 0 x NaN is NaN: who diverged takes no part, whoever else is there.
        keep = lambda x: jnp.where(sound_p.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
        adapters = jax.tree.map(keep, adapters)
    adapter, ranks_btr = lora.side_by_side(adapters, place_bt)
    if ranks_btr is None:
        texts = (tokens_bt, weights_bt, segments_bt)
        value = loss(params, adapter, *texts, remat=remat, predicted=predicted)
        return jnp.where(sound_p, value, jnp.nan)
    x_btd = model.hidden(
        params, adapter, tokens_bt, segments_bt=segments_bt, remat=remat, ranks_btr=ranks_btr
    )
    weighted_bt, places = _weighted(
        params, x_btd, tokens_bt, weights_bt, segments_bt, predicted, True
    )
    own_bt = place_bt[:, 1:]
    if places is not None:
        own_bt = jnp.take_along_axis(own_bt, places, axis=1)
    share = lambda own_bt, x_bt: jnp.sum(
        jnp.where(own_bt == jnp.arange(count)[:, None, None], x_bt, 0.0), axis=(1, 2)
    )
    divisor_p = share(place_bt, weights_bt.astype(jnp.float32))
    return jnp.where(sound_p, share(own_bt, weighted_bt) / jnp.maximum(divisor_p, 1e-9), jnp.nan)


def sound(numbers: Any) -> jax.Array:
    """Returns whether an adapter's numbers are such as no layer makes infinite; else it diverged.

    A limit of our own: where a model overflows depends on the machine and on the rows' layout.
    """
    largest = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(numbers)]
    return jnp.stack(largest).max() < _SOUND  # False for NaN


def _weighted(params, x_btd, tokens_bt, weights_bt, segments_bt, predicted: int, frozen: bool):
    """Returns weighted -log p of predicted tokens, and the places of these, if not all are made."""
    x_btd, targets_bt = x_btd[:, :-1], tokens_bt[:, 1:]
    weights = weights_bt[:, 1:].astype(jnp.float32)
    if segments_bt is not None:
        segments_bt = jnp.abs(segments_bt)
        weights *= segments_bt[:, 1:] == segments_bt[:, :-1]
    places = None
    if 0 < predicted < targets_bt.shape[1]:
        places = jax.vmap(lambda own: jnp.nonzero(own, size=predicted, fill_value=-1)[0])(weights)
        x_btd = jnp.take_along_axis(x_btd, places[..., None], axis=1)
        targets_bt = jnp.take_along_axis(targets_bt, places, axis=1)
        weights = jnp.where(places < 0, 0.0, jnp.take_along_axis(weights, places, axis=1))
    return token_nll(params, x_btd, targets_bt, frozen) * weights, places


def learning_rate(
    kind: str, step: jax.Array, peak: jax.Array, total: jax.Array, warmup: int
) -> jax.Array:
    """Returns the learning rate of a step (counted from 0), as transformers' schedules do.

    Linear warm-up from 0 over `warmup` steps, then to 0 at `total`: linear, cosine, or constant.
    """
    step = step.astype(jnp.float32)
    rise = step / max(warmup, 1)
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0.0, 1.0)
    fall = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        "constant": jnp.ones_like(progress),
    }[kind]
    return peak * jnp.where(step < warmup, rise, fall)


@struct.dataclass
class TrainState:
    """What is trained, Adam's moments of it, and the steps taken."""

    trained: Any
    moments: optax.OptState
    step: jax.Array


@struct.dataclass
class Measures:
    """Of one step: the loss before it, the gradient's norm before clipping, the rate used."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array


def _adam(b2: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.9, b2=b2, eps=1e-8)


def init(trained: Any, *, b2: float = 0.999) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(trained, _adam(b2).init(trained), jnp.zeros((), jnp.int32))


def state(trained: Any, mean: Any, variance: Any, steps: jax.Array) -> TrainState:
    """Returns the state after some steps, given Adam's moments of what is trained."""
    return TrainState(trained, optax.ScaleByAdamState(steps, mean, variance), steps)


def step(
    state: TrainState,
    loss_of: Callable[[Any], jax.Array],
    rate: Callable[[jax.Array], jax.Array],
    *,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    b2: float = 0.999,
) -> tuple[TrainState, Measures]:
    """Returns the state after one AdamW step, and what was measured.

    Args:
      loss_of: The loss as a function of what is trained.
      rate: The learning rate as a function of the step number.
    """
    value, grads = jax.value_and_grad(loss_of)(state.trained)
    return update(state, value, grads, rate, clip=clip, weight_decay=weight_decay, b2=b2)


def update(
    state: TrainState,
    value: jax.Array,
    grads: Any,
    rate: Callable[[jax.Array], jax.Array],
    *,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    b2: float = 0.999,
) -> tuple[TrainState, Measures]:
    """Returns the state after one AdamW step along given gradients; see `step`.

    Clipping, bias correction and decoupled decay, of all but norms and biases, are torch's and
    transformers' Trainer's.
    """
    norm = optax.tree.norm(grads)
    if clip:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), grads)
    lr = rate(state.step)
    changes, moments = _adam(b2).update(grads, state.moments)
    decay = lambda path: weight_decay if _decays(path) else 0.0
    trained = jax.tree_util.tree_map_with_path(
        lambda path, p, u: (p - lr * (u + decay(path) * p)).astype(p.dtype), state.trained, changes
    )
    return TrainState(trained, moments, state.step + 1), Measures(value, norm, lr)


def _decays(path: tuple[Any, ...]) -> bool:
    """Returns whether a weight at this place of a tree decays: norms and biases do not."""
    return not any(str(part).strip(".[]'").endswith(("norm", "bias")) for part in path)
