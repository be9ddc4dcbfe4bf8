"""One mesh, and rules from dimension letters to its axes. The mesh travels with the weights.

Axis `data` carries candidates (and parts of the frozen weights, FSDP), axis `model` heads,
feed-forward and vocabulary. Nothing here is global: weights placed by `weights` know their mesh
(`of`), callers of a jitted program stand inside `use(of(params))`, and what is traced there sees
the mesh by `current()`. Without a mesh, or on one device, everything here does nothing.

The `data` axis appears in a program only where `vmap` is written: `sharding.vmap` is `jax.vmap`
whose axis lies on `data`. So what is inside (a constraint, or an attention kernel in `per_device`)
names `model` alone, and is the same whether it runs for candidates, prompts or rows of a batch.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seal_jax import config as config_lib
from seal_jax import dims, lora
from seal_jax import params as params_lib
from seal_jax.errors import SealError
from seal_jax.lora import Adapter
from seal_jax.params import ModelConfig, Params

DATA, MODEL = "data", "model"
Layout = Literal["fsdp", "tensor", "replicated", "apart"]  # the last on one device alone

_WHOLE = {"nh": "n", "kh": "k"}  # split between heads, never within one
_SPLIT = ("nh", "kh", "f", "v", "n", "k")  # dimensions that may lie on `model`
_ROOM = 0.4  # of a device's memory: a copy of the weights this small is kept for decoding


def make(settings: config_lib.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh `data` x `model`.

    Args:
      devices: All of this run by default; may be those of a TPU topology that is not there.

    Raises:
      SealError: where the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    n, model = len(devices), settings.model
    data = settings.data or n // model
    if data * model != n:
        raise SealError(
            f"mesh.data={settings.data}, mesh.model={model}: do not make up {n} devices"
        )
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=kinds, devices=devices)


def of(tree: Any) -> Mesh | None:
    """Returns the mesh that arrays (or ShapeDtypeStructs) lie on; None on a single device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh if sharding.mesh.size > 1 else None
    return None


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Returns a context in which programs are traced for this mesh (None: for one device)."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current() -> AbstractMesh | None:
    """Returns the mesh of the surrounding `use`, also while tracing; None on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def data_size(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the number of devices that share out candidates: chunks are multiples of it."""
    return 1 if mesh is None else mesh.shape[DATA]


def splits_adapters(mesh: Mesh | AbstractMesh | None) -> bool:
    """Returns whether an adapter lies on several devices."""
    return mesh is not None and mesh.shape[MODEL] > 1


vmap = functools.partial(jax.vmap, spmd_axis_name=DATA)


def _axis(letter: str, config: ModelConfig, size: int, axis: Any = MODEL) -> Any:
    """Returns the mesh axis of a dimension that is split as outputs of a projection are."""
    count = dims.sizes(config)[_WHOLE.get(letter, letter)] if letter in _SPLIT else 0
    return axis if count and count % size == 0 else None


def spec(
    letters: Sequence[str],
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    layout: Layout = "fsdp",
) -> P:
    """Returns the partition of a frozen weight with these dimensions.

    `fsdp` splits `d` over `data` and heads, `f` or `v` over `model`, each where the size divides;
    programs gather a layer at a time. `replicated` leaves `d` whole. `tensor` splits heads, `f` and
    `v` over both axes together (over `model` alone where that does not divide). Vectors (norms,
    biases) are whole along `data`.
    """
    data, model = mesh.shape[DATA], mesh.shape[MODEL]
    matrix = len([x for x in letters if x != "l"]) > 1
    parts = []
    for letter in letters:
        part = _axis(letter, config, model) if model > 1 else None
        if layout == "tensor" and matrix:
            part = _axis(letter, config, data * model, (DATA, MODEL)) or part
        if layout == "fsdp" and matrix and letter == "d" and config.d_model % data == 0:
            part = DATA
        parts.append(part)
    return P(*parts)


def weights(config: ModelConfig, mesh: Mesh, layout: Layout = "fsdp") -> Params:
    """Returns the tree of weights with a NamedSharding in each place."""
    return params_lib.build(
        config,
        lambda name, weight, shape: NamedSharding(mesh, spec(weight.dims, config, mesh, layout)),
    )


def adapters(
    config: ModelConfig, settings: config_lib.Lora, mesh: Mesh, *, stacked: bool = True
) -> Adapter:
    """Returns the tree of an adapter with a NamedSharding in each place.

    Factors lie over `model` where their side of the base weight does. Adam's moments of an adapter
    are trees like it and lie as it does.

    Args:
      stacked: Candidates first, over `data`; else one adapter, the same on all of `data`.
    """
    tree = lora.shapes(config, settings)
    specs = _factors(tree, config, mesh.shape[MODEL], (DATA,) if stacked else ())
    return jax.tree.map(lambda x: NamedSharding(mesh, x), specs, is_leaf=lambda x: isinstance(x, P))


def _factors(tree: Adapter, config: ModelConfig, model: int, lead: tuple[str, ...]) -> Adapter:
    """Returns the partition of each factor of an adapter."""

    def side(target: str, which: int) -> Any:
        return _axis(lora.PROJECTIONS[target][which], config, model) if model > 1 else None

    return tree.replace(
        a={t: P(*lead, None, side(t, 0), None) for t in tree.a},
        b={t: P(*lead, None, None, side(t, 1)) for t in tree.b},
    )


def candidates(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays with a leading candidate axis."""
    return NamedSharding(mesh, P(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def decode_layout(
    config: ModelConfig,
    settings: config_lib.Mesh,
    mesh: Mesh,
    itemsize: int,
    memory: int | None = None,
) -> Layout:
    """Returns how the weights lie while decoding.

    By default the first that fits of: whole along `data`; split over all devices as tensors; FSDP
    (which gathers every weight for every token).

    Args:
      itemsize: Bytes of a number in the weights.
      memory: Bytes of a device; asked of the device by default (CPUs do not say: all fits).
    """
    if settings.decode != "auto":
        return settings.decode
    if memory is None:
        own = next((d for d in mesh.devices.flat if d.process_index == jax.process_index()), None)
        memory = ((own and own.memory_stats()) or {}).get("bytes_limit")
    for layout in ("replicated", "tensor"):
        if memory is None or bytes_per_device(config, mesh, layout, itemsize) <= _ROOM * memory:
            return layout
    return "fsdp"


def bytes_per_device(config: ModelConfig, mesh: Mesh, layout: Layout, itemsize: int) -> int:
    """Returns the bytes of the weights on one device."""
    shapes, places = params_lib.shapes(config), weights(config, mesh, layout)
    parts = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))), shapes, places)
    return itemsize * sum(jax.tree.leaves(parts))


def place(tree: Any, shardings: Any) -> Any:
    """Returns arrays laid out as told; host arrays must be the same in every process.

    Args:
      shardings: A tree like `tree`, or one sharding for all of it.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            return _relay(sharding)(x)
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def share_out(tree: Any, mesh: Mesh | None) -> Any:
    """Returns host arrays with a leading candidate axis, each candidate's on its device."""
    return jax.device_put(tree) if mesh is None else place(tree, candidates(mesh))


def share(tree: Any, mesh: Mesh | None) -> Any:
    """Returns host arrays whole on every device."""
    return jax.device_put(tree) if mesh is None else place(tree, replicated(mesh))


@functools.cache
def _relay(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def fetch(tree: Any) -> Any:
    """Returns arrays as numpy, in every process the whole of them."""
    return jax.device_get(jax.tree.map(gather, tree))


def gather(x: Any) -> Any:
    """Returns an array that this process can read whole."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return _relay(replicated(x.sharding.mesh))(x)


def whole(tree: Any) -> Any:
    """Returns traced arrays constrained to lie whole on every device: what is to be fetched."""
    if current() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def constrain_rows(x: jax.Array, columns: bool = False) -> jax.Array:
    """Returns a traced array constrained to lie over `data` by its first axis.

    Args:
      columns: It is made by columns, over all devices: else the compiler may rather move the matrix
        that they are the products with.
    """
    if current() is None:
        return x
    if columns:
        split = P(*[None] * (x.ndim - 1), (DATA, MODEL))
        x = jax.lax.with_sharding_constraint(x, split)
    return jax.lax.with_sharding_constraint(x, P(DATA))


def splits_vocabulary(params: Params) -> bool:
    """Returns whether the vocabulary lies over all devices, as in the layout `tensor`."""
    place = getattr(params.embed, "sharding", None)
    return isinstance(place, NamedSharding) and (DATA, MODEL) in tuple(place.spec)


def pin(tree: Any, config: ModelConfig, *, stacked: bool = False) -> Any:
    """Returns a traced tree whose adapters and weights (Adam's moments too) lie by the rules.

    Compilers guess layouts of a loop's state, and guess some of them whole on every device.

    Args:
      stacked: Adapters have a candidate axis here (inside of `sharding.vmap` they have none).
    """
    mesh = current()
    if mesh is None:
        return tree

    def one(x: Any) -> Any:
        if isinstance(x, Adapter):
            specs = _factors(x, config, mesh.shape[MODEL], (DATA,) if stacked else ())
        elif isinstance(x, Params):
            specs = params_lib.build(config, lambda _, w, shape: spec(w.dims, config, mesh))
        else:
            return x
        return jax.tree.map(jax.lax.with_sharding_constraint, x, specs)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Adapter | Params))


def constrain(x: jax.Array, letters: str, config: ModelConfig) -> jax.Array:
    """Returns x, laid out by its dimension letters: heads, `f` and `v` over `model`, others whole.

    The axis of a surrounding `sharding.vmap` lies on `data`.
    """
    mesh = current()
    if mesh is None:
        return x
    size = mesh.shape[MODEL]
    parts = [_axis(letter, config, size) if size > 1 else None for letter in letters]
    return jax.lax.with_sharding_constraint(x, P(*parts))


def locally(work: Callable[..., Any], whole: int = 0) -> Callable[..., Any]:
    """Returns work that each device does on its own part of arrays [devices of `data`, ...].

    The work sees its part without that axis; nothing in it is split, and nothing moves. Without a
    mesh there is no such axis, and the work is returned as it is.

    Args:
      whole: Arguments, the last, that every device has whole.
    """
    if current() is None:
        return work

    def on_own(*arrays: Any) -> Any:
        part = lambda tree: jax.tree.map(lambda x: x[0], tree)
        split = len(arrays) - whole
        done = work(*map(part, arrays[:split]), *arrays[split:])
        return jax.tree.map(lambda x: x[None], done)

    def run(*arrays: Any) -> Any:
        specs = (*[P(DATA)] * (len(arrays) - whole), *[P()] * whole)
        return jax.shard_map(on_own, in_specs=specs, out_specs=P(DATA), check_vma=False)(*arrays)

    return run


def each(work: Callable[..., Any]) -> Callable[..., Any]:
    """Returns work for arrays [devices of `data`, ...] that shares weights split over devices.

    Written for one, as for `locally`, but the compiler splits it, and gathers what it shares.
    """
    return work if current() is None else vmap(work)


def per_device(
    kernel: Callable[..., jax.Array], q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, *rest
) -> jax.Array:
    """Returns kernel(q, k, v, *rest), [b, t, n, h], run by each device on its own part.

    Compilers cannot split a hand-written kernel over devices, so it stands in a `shard_map`: its
    candidates are those of this device (by `sharding.vmap`), its heads too where both `n` and `k`
    divide the `model` axis, and `rest` (masks, segments, without a head axis) is whole. Without a
    mesh the kernel is called as it is.
    """
    mesh = current()
    if mesh is None:
        return kernel(q_btnh, k_bskh, v_bskh, *rest)
    size = mesh.shape[MODEL]
    divides = q_btnh.shape[2] % size == 0 and k_bskh.shape[2] % size == 0
    heads = P(None, None, MODEL if divides and size > 1 else None, None)
    return jax.shard_map(
        kernel,
        in_specs=(heads, heads, heads, *(P() for _ in rest)),
        out_specs=heads,
        check_vma=False,
    )(q_btnh, k_bskh, v_bskh, *rest)
