"""Arrays of a run on disk or in a bucket, by Orbax: whole or not at all.

Of several processes the first one reads and writes, so that no shared file system is needed.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from seal_jax import files, multihost, sharding
from seal_jax.errors import SealError

_NEWER = "state"  # where Orbax's newer interface puts a tree within its folder
_SUMS = "sums"  # what Orbax keeps for us beside a tree
_LAST = "commit_success.txt"  # what it writes last, in a bucket, where nothing can be renamed


def is_saved(folder: files.AnyPath) -> bool:
    """Returns whether a folder holds a tree, whole: a folder of a bucket is there before it is."""
    return files.exists(folder if isinstance(folder, Path) else folder / _LAST)


def save_tree(folder: files.AnyPath, tree: Any) -> None:
    """Writes a pytree of arrays, and sums of their bits.

    The folder appears when it is complete, in a bucket before.
    """
    torn = not isinstance(folder, Path)  # what a kill left there may be written over
    about = {_SUMS: _sums(tree)}
    if jax.process_count() == 1:
        try:
            with _saving():
                ocp.save(_absolute(folder), tree, overwrite=torn, custom_metadata=about)
        except (ValueError, OSError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise SealError(f"{folder}: cannot be saved: {text[0]}") from error
        return
    # Leaf by leaf: one is whole on the devices at a time.
    whole = jax.tree.map(lambda x: _to_leader(x), tree)

    def write() -> bytes:
        _alone().save(_absolute(folder), whole, force=torn, custom_metadata=about)
        return b""

    multihost.agree(write)


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    """Makes Orbax create folders first, and leave it to us to say what failed.

    Its threads that wait for a folder which cannot be made keep a process from ending for minutes.
    """
    context, log = ocp.Context(), logging.getLogger("absl")
    context.asynchronous.create_directories_asynchronously = False
    before, log.disabled = log.disabled, True
    try:
        with context:
            yield
    finally:
        log.disabled = before


def _to_leader(x: jax.Array) -> np.ndarray:
    """Returns an array whole in process 0, and nothing in the others."""
    x = sharding.gather(x)
    return np.asarray(x) if multihost.leads() else np.zeros(0, x.dtype)


def _alone() -> orbax.Checkpointer:
    """Returns Orbax without its waiting for other processes; its files are those of `ocp`.

    Orbax's newer interface compares paths with all processes, whatever its options.
    """
    only = orbax.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone"
    )
    handler = orbax.PyTreeCheckpointHandler(multiprocessing_options=only)
    return orbax.Checkpointer(handler, multiprocessing_options=only)


def _absolute(folder: files.AnyPath) -> files.AnyPath:
    folder = files.path(folder)
    return folder.absolute() if isinstance(folder, Path) else folder


def load_tree(folder: files.AnyPath, like: Any) -> Any:
    """Returns a saved pytree.

    Args:
      like: A tree of the same structure, of arrays or jax.ShapeDtypeStruct.

    Raises:
      SealError: where the folder holds another tree, or is damaged.
    """
    if jax.process_count() > 1:
        return _load_by_leader(folder, like)
    with _damage(folder):
        tree = ocp.load(_absolute(folder), jax.tree.map(_restored, abstract(like)))
    tree = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)
    return _undamaged(_checked(tree, like, folder), folder)


def check_tree(folder: files.AnyPath, like: Any) -> None:
    """Raises SealError where a folder holds no tree of these shapes; no array is read."""

    shapes = lambda tree: {name: tuple(x.shape) for name, x in _named(tree).items()}

    def check() -> bytes:
        with _damage(folder):
            found = shapes(ocp.metadata(_absolute(folder)).metadata)
        for name, shape in shapes(like).items():
            if found.get(name) != shape:
                there = found.get(name, "missing")
                raise SealError(f"{folder}: holds another model: {name} is {there}, not {shape}")
        return b""

    multihost.agree(check)


def sums(folder: files.AnyPath) -> dict[str, list[Any]]:
    """Returns what tells the tree of a folder from others: type and sum of the bits of each array.

    No array is read. A folder of an earlier version has none.
    """

    def read() -> bytes:
        with _damage(folder):
            about = ocp.metadata(_absolute(folder)).custom_metadata or {}
        return json.dumps(about.get(_SUMS, {})).encode()

    return json.loads(multihost.agree(read))


def _sums(tree: Any) -> dict[str, list[Any]]:
    found = _named(sharding.fetch(_sum_bits(tree)))
    return {name: [str(x.dtype), int(found[name])] for name, x in _named(tree).items()}


@jax.jit
def _sum_bits(tree: Any) -> Any:
    """Returns a sum of 32 bits of each array, the same however it lies on devices.

    Of the bits as they are, two changed signs would leave the sum as it was.
    """

    def one(x: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # as MurmurHash mixes
            bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
        return jnp.sum(bits, dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _undamaged(tree: Any, folder: files.AnyPath) -> Any:
    """Returns a tree whose arrays are those that were saved, unless of another type than then."""
    saved = sums(folder)
    for name, (kind, own) in _sums(tree).items() if saved else ():
        before, there = saved.get(name, (kind, own))
        if before == kind and there != own:
            raise SealError(f"{folder}: damaged: {name} is not what was saved")
    return tree


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name."""
    name = lambda path: "/".join(str(getattr(k, "name", getattr(k, "key", k))) for k in path)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name(path): leaf for path, leaf in leaves}


def abstract(tree: Any) -> Any:
    """Returns the shapes of arrays, with their shardings where they are bound to devices."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        free = isinstance(x, jax.Array) and not x.committed
        sharding = None if free else getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _restored(x: jax.ShapeDtypeStruct) -> Any:
    """Returns what tells Orbax how to restore a leaf like this one.

    One that is bound to no device is read to the host first: Orbax binds what it places, and a
    program whose arguments are bound is another one, to be traced and compiled anew.
    """
    return np.empty(x.shape, x.dtype) if x.sharding is None else x


def _load_by_leader(folder: files.AnyPath, like: Any) -> Any:
    """Returns the tree laid out as `like`: process 0 reads it and tells the others."""
    empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    read = []

    def load() -> bytes:
        inside = _absolute(folder) / _NEWER
        home = inside if inside.exists() else _absolute(folder)
        args = orbax.checkpoint_utils.construct_restore_args(empty)
        with _damage(folder):
            tree = _alone().restore(home, item=empty, restore_args=args)
        read.append(_checked(tree, like, folder))
        return b""

    multihost.agree(load)
    found = read[0] if read else empty
    tree = jax.tree.map(
        lambda x, own: sharding.place(multihost.broadcast(np.asarray(x)), own.sharding), found, like
    )
    return _undamaged(tree, folder)


@contextlib.contextmanager
def _damage(folder: files.AnyPath) -> Iterator[None]:
    """Makes errors of reading a sentence."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:  # Orbax's own errors derive from these
        cause = error.__cause__ or error
        text = str(cause).strip() or type(cause).__name__
        if text.startswith("The truth value"):  # of arrays, which Orbax compares to say what is off
            text = "it holds other arrays than these settings make"
        raise SealError(f"{folder}: cannot be restored: {text.splitlines()[0]}") from error


def _checked(tree: Any, like: Any, folder: files.AnyPath) -> Any:
    same = jax.tree.map(lambda a, b: a.shape == b.shape, tree, like)
    if not all(jax.tree.leaves(same)):
        raise SealError(f"{folder}: holds arrays of other shapes than these settings make")
    return tree
