"""TPU slices by name: how to ask the compiler for one, and its published peak figures."""

import re
from typing import Any, NamedTuple

import jax

from seal_jax.errors import SealError

GIB = 1 << 30
HEAD_ROOM = 0.1
"""Share of a device's memory that no program is planned to take."""


class Chip(NamedTuple):
    """Peak figures of one device as JAX counts them, as published by the maker.

    Attributes:
      flops: Matrix products in bfloat16, a second.
      memory: Bytes a second to and from its memory.
      links: Bytes a second to and from other chips, all links together.
      chips: Chips a device makes up (a TPU7x chip is two devices).
      axes: Dimensions of its topologies.
    """

    flops: float
    memory: float
    links: float
    chips: float = 1.0
    axes: int = 2


CHIPS = {
    "v4": Chip(275e12, 1200e9, 300e9, axes=3),
    "v5e": Chip(197e12, 819e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 600e9, axes=3),
    "v6e": Chip(918e12, 1640e9, 400e9),
    "tpu7x": Chip(1153e12, 3690e9, 600e9, chips=0.5, axes=3),
}
MEMORY = {  # bytes of a device that the compiler allows a program
    "v4": int(30.75 * GIB),
    "v5e": int(15.75 * GIB),
    "v5p": int(95.74 * GIB),
    "v6e": int(31.25 * GIB),
    "tpu7x": int(94.75 * GIB),
}
GPUS = {  # by a word of the device's name; dense bfloat16
    "H200": Chip(989e12, 4800e9, 900e9),
    "H100": Chip(989e12, 3350e9, 900e9),
    "A100": Chip(312e12, 2039e9, 600e9),
    "L4": Chip(121e12, 300e9, 64e9),
    "T4": Chip(65e12, 320e9, 32e9),
}
NAMES = {  # slices as clouds sell them
    "v5e-1": "v5e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-8": "v5e:2x4",
    "v5e-16": "v5e:4x4",
    "v6e-1": "v6e:1x1",
    "v6e-4": "v6e:2x2",
    "v6e-8": "v6e:2x4",
    "v5p-8": "v5p:2x2x1",
    "v4-8": "v4:2x2x1",
    "tpu7x-8": "tpu7x:2x2x1",
}


class Slice(NamedTuple):
    """A TPU slice: its kind, its topology as libtpu names it, and what else libtpu must be told."""

    kind: str
    topology: str
    options: dict[str, Any]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]


def memory_of(array: jax.Array) -> int | None:
    """Returns the bytes of the device that an array is on; None where it does not say (a CPU)."""
    stats = array.addressable_shards[0].device.memory_stats() or {}
    return stats.get("bytes_limit")


def gpu(kind: str) -> Chip | None:
    """Returns the peak figures of a GPU by the name JAX has for it; None where it is not known."""
    return next((chip for name, chip in GPUS.items() if re.search(rf"\b{name}\b", kind)), None)


def slice_of(name: str) -> Slice:
    """Returns the slice called such as v5e-8 or v5e:2x4.

    Raises:
      SealError: where no such slice is known.
    """
    topology = NAMES.get(name, name)
    kind, _, grid = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
        raise SealError(f"--topology {name}: not known; --topology list shows what is")
    sides = [int(x) for x in grid.split("x")]
    if len(sides) != CHIPS[kind].axes:
        raise SealError(
            f"--topology {name}: {kind} is laid out in {CHIPS[kind].axes} dimensions, such as "
            f"{next(x for x in NAMES.values() if x.startswith(kind + ':'))}"
        )
    options: dict[str, Any] = {}
    if CHIPS[kind].axes == 2 and sides in ([1, 1], [2, 2], [2, 4]):
        options["chips_per_host_bounds"] = (*sides, 1)  # one host
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    return Slice(kind, topology, options)


def listing() -> str:
    """Returns the slices that have names, with their peaks."""
    lines = ["name      topology      TFLOP/s bf16  GB/s memory  GB/s links   (each device)"]
    for name, topology in NAMES.items():
        chip = CHIPS[topology.partition(":")[0]]
        lines.append(
            f"{name:<9} {topology:<13} {chip.flops / 1e12:>12.0f}  {chip.memory / 1e9:>11.0f}  "
            f"{chip.links / 1e9:>10.0f}"
        )
    return "\n".join([*lines, "Any other grid of these kinds may be asked for, such as v6e:4x4."])
