"""Low-rank adapters as their own pytree: frozen and trained things are separate arguments."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seal_jax import config as config_lib
from seal_jax import dims
from seal_jax.errors import SealError

if TYPE_CHECKING:
    from seal_jax.params import ModelConfig, Params

# Input and output dimensions of the seven projections; the weights table is built on this.
PROJECTIONS = {
    "q": ("d", "nh"),
    "k": ("d", "kh"),
    "v": ("d", "kh"),
    "o": ("nh", "d"),
    "gate": ("d", "f"),
    "up": ("d", "f"),
    "down": ("f", "d"),
}

_ROW = 128  # numbers, as a TPU lays arrays out


@struct.dataclass
class Adapter:
    """LoRA factors of each adapted projection, float32; the change of a weight is scale · a·b.

    Attributes:
      a: Per target, [l, in, r].
      b: Per target, [l, r, out].
      scale: alpha / rank.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    scale: float = struct.field(pytree_node=False)

    @property
    def rank(self) -> int:
        return next(iter(self.a.values())).shape[-1]

    @property
    def count(self) -> int:
        """How many are stacked, [c, ...]; 0 for a single one, which has no such axis."""
        leaf = next(iter(self.a.values()))
        return leaf.shape[0] if leaf.ndim == 4 else 0


def shapes(config: "ModelConfig", settings: config_lib.Lora) -> Adapter:
    """Returns the adapter with every array replaced by its jax.ShapeDtypeStruct."""
    size = dims.sizes(config)
    layers, rank = config.n_layers, settings.rank

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    targets = sorted(settings.targets, key=list(PROJECTIONS).index)
    return Adapter(
        a={t: leaf(layers, size[PROJECTIONS[t][0]], rank) for t in targets},
        b={t: leaf(layers, rank, size[PROJECTIONS[t][1]]) for t in targets},
        scale=settings.alpha / rank,
    )


def init(config: "ModelConfig", settings: config_lib.Lora, key: jax.Array) -> Adapter:
    """Returns a fresh adapter that changes nothing: a Kaiming-uniform, b zero, as PEFT does."""
    tree = shapes(config, settings)
    # One draw for all targets: compiling seven of them takes seconds on a CPU.
    flat = jax.random.uniform(
        key, (sum(x.size for x in tree.a.values()),), jnp.float32, minval=-1.0
    )
    a, start = {}, 0
    for target, leaf in tree.a.items():
        part = flat[start : start + leaf.size].reshape(leaf.shape)
        a[target] = part / math.sqrt(leaf.shape[1])
        start += leaf.size
    return tree.replace(a=a, b={t: jnp.zeros(x.shape, x.dtype) for t, x in tree.b.items()})


def project(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    factors: tuple[jax.Array, jax.Array] | None = None,
    scale: float = 1.0,
    ranks: jax.Array | None = None,
) -> jax.Array:
    """Returns x·(weight + scale·a·b) + bias without ever forming the sum, in x's dtype.

    Args:
      x: [..., in].
      weight: [in, out].
      factors: a [in, r] and b [r, out] of an adapter.
      ranks: See `change`.
    """
    y = x @ weight.astype(x.dtype)
    if factors is not None:
        y += change(x, factors, scale, ranks)
    return y if bias is None else y + bias.astype(x.dtype)


def change(
    x: jax.Array,
    factors: tuple[jax.Array, jax.Array],
    scale: float,
    ranks: jax.Array | None = None,
) -> jax.Array:
    """Returns x·(scale·a·b), what an adapter adds to a projection of x, in x's dtype.

    Args:
      ranks: Which of the ranks act, for each row of x [..., r]; all, if None. See `side_by_side`.
    """
    a, b = factors
    inner = x @ a.astype(x.dtype)
    if ranks is not None:
        inner = jnp.where(ranks, inner, 0)
    return scale * (inner @ b.astype(x.dtype))


def merge(params: "Params", adapter: Adapter, cfg: object = None) -> "Params":
    """Returns weights that alone act as the weights with the adapter.

    Args:
      cfg: Not needed, since an adapter carries its scale; accepted like in `save_peft`.

    Raises:
      SealError: for several adapters, stacked, or one of another model.
    """
    del cfg
    check_single(adapter)
    layers = dict(params.layers)
    for target, a in adapter.a.items():
        b = adapter.b[target]
        if (*a.shape[:2], b.shape[2]) != layers[target].shape:
            raise SealError(f"the adapter is of another model: {target} has other sizes there")
        layers[target] = _merged(layers[target], a, b, scale=adapter.scale)
    return params.replace(layers=layers)


@functools.partial(jax.jit, static_argnames="scale")
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    """Returns a stacked weight with its change, a layer at a time: float32 of all is twice bf16."""

    def one(layer):
        weight, a, b = layer
        change = jnp.matmul(a, b, precision="highest") * scale
        return (weight.astype(jnp.float32) + change).astype(weight.dtype)

    return jax.lax.map(one, (weight, a, b))


def check_single(adapter: Adapter) -> None:
    """Raises SealError for stacked adapters, which would be taken for layers."""
    if any(x.ndim > 3 for x in jax.tree.leaves((adapter.a, adapter.b))):
        raise SealError("these are many adapters; take one of them first")


def concat(adapters: Sequence[Adapter]) -> Adapter:
    """Returns one adapter that acts as the sum of several: their ranks laid side by side.

    Raises:
      SealError: where the adapters do not adapt the same projections.
    """
    if not adapters:
        raise SealError("concat: no adapters were given")
    first = adapters[0]
    if len({leaf.ndim for x in adapters for leaf in x.a.values()}) > 1:
        raise SealError("concat: some adapters are stacked, some are single")
    if any(set(x.a) != set(first.a) for x in adapters):
        raise SealError("concat: the adapters adapt different projections")
    if not first.scale:
        raise SealError("concat: the first adapter's scale is 0")
    # The sum has one scale; the others' go into their b factors.
    scales = [x.scale / first.scale for x in adapters]
    return Adapter(
        a={t: jnp.concatenate([x.a[t] for x in adapters], -1) for t in first.a},
        b={
            t: jnp.concatenate(
                [x.b[t] * s if s != 1 else x.b[t] for x, s in zip(adapters, scales, strict=True)],
                -2,
            )
            for t in first.b
        },
        scale=first.scale,
    )


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """Returns adapters of one shape with a leading candidate axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def take(adapters: Adapter, index: jax.Array | np.ndarray | int | Sequence[int]) -> Adapter:
    """Returns some of the stacked adapters.

    Raises:
      SealError: for one that is not there (JAX would take the last).
    """
    if not isinstance(index, jax.Array):
        index, count = np.asarray(index), jax.tree.leaves(adapters)[0].shape[0]
        if index.size and not -count <= index.min() <= index.max() < count:
            raise SealError(f"there are {count} adapters, not one at {index.tolist()}")
    return _taken(adapters, index)


@jax.jit  # one program, not several for each array
def _taken(adapters: Adapter, index: jax.Array) -> Adapter:
    return jax.tree.map(lambda leaf: leaf[index], adapters)


def apart(adapters: Adapter) -> Adapter:
    """Returns stacked adapters [p, ...] with a list of each layer's factors, as weights may lie.

    Of a list nothing is copied to get at a layer, nor is a gradient padded to the whole.
    """
    split = lambda tree: {name: list(jnp.moveaxis(x, 1, 0)) for name, x in tree.items()}
    return adapters.replace(a=split(adapters.a), b=split(adapters.b))


def side_by_side(adapters: Adapter, place_bt: jax.Array) -> tuple[Adapter, jax.Array | None]:
    """Returns one adapter of p·r ranks, and which of them act on each token, [b, t, p·r].

    The products of a token with ranks that are not its own are zeros: wasted, but all tokens of a
    row go through the same two products, whoever's they are.

    Args:
      adapters: Stacked [p, ...]. Of a single one all ranks act on all tokens (None).
      place_bt: Which of the adapters a token belongs to.
    """
    leaf = jax.tree.leaves(adapters.a)[0]
    count, rank = leaf.shape[0], leaf.shape[-1]
    if count == 1:
        return jax.tree.map(lambda x: x[0], adapters), None
    columns = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], count * rank)
    rows = lambda x: jnp.moveaxis(x, 0, -3).reshape(*x.shape[1:-2], count * rank, x.shape[-1])
    joined = adapters.replace(a=jax.tree.map(columns, adapters.a), b=jax.tree.map(rows, adapters.b))
    return joined, place_bt[..., None] == jnp.arange(count * rank) // rank


class Form(NamedTuple):
    """The shapes of an adapter that lies flat: a and b of each target (static), and its scale."""

    targets: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the array that holds it: rows, and numbers in a row; zeros fill the last one.

        In one long row [n] a TPU's compiler comes to no end where some candidates' are changed.
        """
        numbers = sum(math.prod(a) + math.prod(b) for _, a, b in self.targets)
        return -(-numbers // _ROW), _ROW


def form_of(adapter: Adapter) -> Form:
    """Returns the form of an adapter, or of its shapes."""
    names = sorted(adapter.a)  # as JAX sorts them, whatever the order of making
    targets = ((name, adapter.a[name].shape, adapter.b[name].shape) for name in names)
    return Form(tuple(targets), adapter.scale)


def flat(adapter: Adapter) -> jax.Array:
    """Returns an adapter's numbers in one array of the form's shape; its layers may lie apart."""
    pairs = [(adapter.a[name], adapter.b[name]) for name in sorted(adapter.a)]
    parts = [x.ravel() for x in jax.tree.leaves(pairs)]
    if short := -sum(x.size for x in parts) % _ROW:
        parts.append(jnp.zeros(short, parts[0].dtype))
    return jnp.concatenate(parts).reshape(-1, _ROW)


def unflat(numbers_ex: jax.Array, form: Form) -> Adapter:
    """Returns the adapter whose numbers these are."""
    numbers = numbers_ex.ravel()
    a, b, start = {}, {}, 0
    for name, *shapes in form.targets:
        for home, shape in zip((a, b), shapes, strict=True):
            end = start + math.prod(shape)
            home[name] = numbers[start:end].reshape(shape)
            start = end
    return Adapter(a, b, form.scale)
