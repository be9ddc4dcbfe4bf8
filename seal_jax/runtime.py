"""The process: where compiled programs are kept between runs."""

import os
from pathlib import Path

import jax


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
    folder = Path(home or "~/.cache/seal_jax").expanduser() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError:
        return  # no home to write to: compile anew each time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
