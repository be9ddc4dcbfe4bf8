"""Weights as programs that run often read them: layers apart, or laid out anew on a mesh.

A scan over stacked layers is the same for models of any depth and compiles fast; where a slice of
the stack is a copy, made at every step, a list of layers reads less.
"""

import functools

import jax
import jax.numpy as jnp

from seal_jax import config as config_lib
from seal_jax import hardware, model, sharding
from seal_jax.checkpoint import LM
from seal_jax.params import ModelConfig, Params


def few_layers(config: ModelConfig) -> bool:
    """Returns whether a model has so few layers that programs take them apart themselves."""
    return config.n_layers <= model.UNROLLED_LAYERS


def are_apart(params: Params) -> bool:
    """Returns whether weights lie as `layers_apart` lays them."""
    return isinstance(params.layers["o"], list)


def layers_apart(params: Params, always: bool = False) -> Params:
    """Returns the weights of a model as programs that run often want them.

    A list of arrays for each stacked array, since a slice of it is a copy, made every time; q, k
    and v as one matrix; on a CPU the head in two parts, which two cores take at the same time.
    Weights on a mesh stay as they are, for `lax.scan`, and so do models of many layers unless
    `always`: it makes a copy of all weights, and programs that take longer to compile.
    """
    stacked = all(isinstance(x, jax.Array) for x in params.layers.values())
    wanted = always or few_layers(params.config)
    if not stacked or not wanted or sharding.current() is not None:
        return params
    layers = dict(params.layers)
    layers["qkv"] = jnp.concatenate([layers.pop(name) for name in "qkv"], -1)
    if "q_bias" in layers:
        layers["qkv_bias"] = jnp.concatenate([layers.pop(f"{name}_bias") for name in "qkv"], -1)
    head = params.head
    if jax.default_backend() == "cpu":
        head = params.embed.T if head is None else head
        head = [jax.lax.optimization_barrier(part) for part in jnp.array_split(head, 2, axis=1)]
    return params.replace(layers={name: list(x) for name, x in layers.items()}, head=head)


apart = jax.jit(functools.partial(layers_apart, always=True))


def ready(lm: LM, settings: config_lib.Mesh) -> LM:
    """Returns the model with a copy of its weights laid out for reading, where that pays.

    On one device inner loops read it too; on a mesh generation alone.
    """
    mesh = sharding.of(lm.params)
    if lm.reader is not None:
        return lm
    if mesh is None:
        size = sum(x.nbytes for x in jax.tree.leaves(lm.params))
        device = lm.params.embed.addressable_shards[0].device
        if takes_a_copy(lm.config, size, device, hardware.memory_of(lm.params.embed)):
            return lm._replace(reader=apart(lm.params))
        return lm
    itemsize = lm.params.embed.dtype.itemsize
    layout = sharding.decode_layout(lm.config, settings, mesh, itemsize)
    if layout == "fsdp":
        return lm
    return lm._replace(reader=sharding.place(lm.params, sharding.weights(lm.config, mesh, layout)))


def takes_a_copy(config: ModelConfig, size: int, device: jax.Device, memory: int | None) -> bool:
    """Returns whether a device holds weights of `size` bytes apart too: few layers, or room.

    That is a GPU of which two copies leave half free. There a scan over stacked layers copies each
    before it multiplies; a TPU has no need to.
    """
    return few_layers(config) or (device.platform == "gpu" and 2 * size <= (memory or 0) / 2)


def readable(lm: LM) -> Params:
    """Returns the weights that inner loops read: `ready`'s copy, if it is for them."""
    return lm.params if lm.reader is None or sharding.of(lm.params) is not None else lm.reader
