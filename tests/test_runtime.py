"""Flags of the compiler come from the configuration, in time or not at all."""

import os
import platform
import subprocess
import sys

import jax
import pytest

from seal_jax import config, runtime
from seal_jax.errors import SealError

SCRIPT = """
from seal_jax import config, runtime
cfg = config.load_config(None, ["compiler.xla_flags=[--xla_force_host_platform_device_count=3]"])
runtime.set_flags(cfg.compiler)
runtime.set_flags(cfg.compiler)  # no flag twice
import jax, os
print(len(jax.devices()), os.environ["XLA_FLAGS"])
"""


def test_flags_are_added_before_jax_starts():
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    flags = "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=3"
    assert done.stdout.split("\n")[-2] == f"3 {flags}"


def test_flags_that_come_too_late_are_refused(monkeypatch):
    jax.devices()
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    runtime.set_flags(config.Compiler())
    with pytest.raises(SealError, match="compiler.libtpu_flags: JAX has started already"):
        runtime.set_flags(config.Compiler(libtpu_flags=("--xla_tpu_x=1",)))
    assert "LIBTPU_INIT_ARGS" not in os.environ


@pytest.mark.parametrize("home", ["", "/dev/null"])
def test_without_a_home_programs_are_compiled_anew_and_nothing_fails(home):
    """No home directory at all, or one that cannot be written to."""
    code = (
        "import pathlib, jax\nfrom seal_jax import runtime\n"
        "def none(): raise RuntimeError('Could not determine home directory.')\n"
        f"pathlib.Path.expanduser = lambda path: path if {home!r} else none()\n"
        "runtime.keep_compiled()\nprint(jax.config.jax_compilation_cache_dir)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["SEAL_JAX_CACHE"] = home and f"{home}/seal"
    if not home:
        del environment["SEAL_JAX_CACHE"]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc's malloc is the one that is told"
)
def test_freed_memory_is_kept_unless_the_environment_has_settings(own):
    """Of 64 MiB, whose pages the system has to clear when they are new."""
    code = (
        "import resource, numpy as np\nfrom seal_jax import runtime\nruntime.keep_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "found = [faults()]\n"
        "for _ in range(2):\n    np.ones(1 << 26, np.int8)\n    found.append(faults())\n"
        "print(*np.diff(found))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC"))}
    command = [sys.executable, "-c", code]
    settings = {"env": {**environment, **own}, "capture_output": True, "text": True, "check": True}
    first, second = map(int, subprocess.run(command, **settings).stdout.split())
    assert (second < first / 10) == (not own)
