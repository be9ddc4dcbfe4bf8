"""The process: flags of the compiler, the folder of compiled programs, memory between calls."""

import ctypes
import os
from pathlib import Path

import jax
from jax._src import xla_bridge  # nothing public says whether JAX has started

from seal_jax import config as config_lib
from seal_jax.errors import SealError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h has them


def keep_compiled() -> None:
    """Makes compiled programs persist in a private folder of this user, unless JAX was told where.

    JAX trusts what lies in that folder, so it is readable and writable by its owner alone.
    `SEAL_JAX_CACHE` names another folder; an empty one keeps nothing.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("SEAL_JAX_CACHE")
    if home == "":
        return
    try:
        folder = Path(home or "~/.cache/seal_jax").expanduser() / "compiled"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except (OSError, RuntimeError):
        return  # no home to write to: compile anew each time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_memory() -> None:
    """Makes a CPU's process keep what it frees, for the next call of a program.

    A program on a CPU takes its temporaries from malloc. glibc gives those of over 32 MiB back at
    once, and the system clears each page anew in the next call: a fifth of the time of calls of
    256 tokens (`docs/performance.md`). Blocks of over 1 GiB are still given back. Elsewhere, and
    where the environment has settings of malloc, nothing changes.
    """
    told = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if told or jax.default_backend() != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return  # not glibc
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def set_flags(settings: config_lib.Compiler) -> None:
    """Adds the configured flags to those of the environment.

    Raises:
      SealError: where JAX has read the environment already, as in a notebook that used it before.
    """
    for name, variable in (("xla_flags", "XLA_FLAGS"), ("libtpu_flags", "LIBTPU_INIT_ARGS")):
        present = os.environ.get(variable, "").split()
        missing = [flag for flag in getattr(settings, name) if flag not in present]
        if missing and xla_bridge.backends_are_initialized():
            raise SealError(
                f"compiler.{name}: JAX has started already; set {variable} before it does"
            )
        if missing:
            os.environ[variable] = " ".join([*present, *missing])
