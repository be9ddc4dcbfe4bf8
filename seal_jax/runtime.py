"""The process: flags of the compiler, and where compiled programs are kept between runs."""

import os
from pathlib import Path

import jax
from jax._src import xla_bridge  # nothing public says whether JAX has started

from seal_jax import config as config_lib
from seal_jax.errors import SealError


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


def set_flags(settings: config_lib.Compiler) -> None:
    """Adds the configured flags to those of the environment.

    Raises:
      SealError: where JAX has read the environment already, as in a notebook that used it before.
    """
    for name in ("xla_flags", "libtpu_flags"):
        variable = {"xla_flags": "XLA_FLAGS", "libtpu_flags": "LIBTPU_INIT_ARGS"}[name]
        present = os.environ.get(variable, "").split()
        missing = [flag for flag in getattr(settings, name) if flag not in present]
        if missing and xla_bridge.backends_are_initialized():
            raise SealError(
                f"compiler.{name}: JAX has started already; set {variable} before it does"
            )
        if missing:
            os.environ[variable] = " ".join([*present, *missing])
