"""Arrays of a run on disk, by Orbax: whole or not at all."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from seal_jax.errors import SealError


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a pytree of arrays; the folder appears when it is complete."""
    ocp.save(Path(folder).absolute(), tree)


def load_tree(folder: Path, like: Any) -> Any:
    """Returns a saved pytree.

    Args:
      like: A tree of the same structure, of arrays or jax.ShapeDtypeStruct.

    Raises:
      SealError: where the folder holds another tree, or is damaged.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", device)),
        like,
    )
    try:
        tree = ocp.load(Path(folder).absolute(), abstract)
    except (ValueError, KeyError, OSError) as error:  # Orbax's own errors derive from these
        cause = error.__cause__ or error
        text = str(cause).strip() or type(cause).__name__
        raise SealError(f"{folder}: cannot be restored: {text.splitlines()[0]}") from error
    same = jax.tree.map(lambda a, b: a.shape == b.shape, tree, like)
    if not all(jax.tree.leaves(same)):
        raise SealError(f"{folder}: holds arrays of other shapes than these settings make")
    return tree


def size(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
