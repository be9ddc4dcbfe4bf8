"""The machine under a benchmark: what it is, how fast it multiplies and reads, where results go."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "torch", "transformers", "peft")


class Limits(NamedTuple):
    """What this machine can do at most, measured in the same run.

    Attributes:
      flops: A second, of a large matrix product in the model's type.
      bandwidth: Bytes a second, read from memory.
    """

    flops: float
    bandwidth: float


def arguments(description: str) -> argparse.ArgumentParser:
    """Returns the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/NAME.json)")
    parser.add_argument("--no-peer", action="store_true", help="without transformers and PEFT")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each; the median counts")
    return parser


def command() -> str:
    """Returns the command that is running, but for where its result goes."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def cores() -> int:
    """Returns the cores this process may use: both sides of a comparison are given all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def describe() -> dict[str, Any]:
    """Returns processor, cores, device and versions."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": cores(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": versions,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def wait(value: Any) -> Any:
    """Returns the value when the device is done with it."""
    return jax.block_until_ready(value)


def seconds(work: Callable[[], Any], repeats: int = 3, warm: bool = True) -> float:
    """Returns the median time of some work, after one run that compiles."""
    if warm:
        wait(work())
    times = []
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        wait(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def once(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the time of one run, and its result."""
    start = time.perf_counter()
    value = wait(work())
    return time.perf_counter() - start, value


def limits(dtype: str = "float32", quick: bool = False) -> Limits:
    """Returns the best matrix product and the best memory read of several, as XLA does them."""
    cpu = jax.default_backend() == "cpu"
    n = 512 if quick else 1536 if cpu else 8192
    # Random numbers: of ones or zeros an accelerator's product is faster than of any real data.
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.float32).astype(dtype)
    multiply = jax.jit(lambda a: a @ a)
    x = jnp.ones(((1 << 24) if quick else (1 << 26) if cpu else (1 << 29),), jnp.float32)
    read = jax.jit(lambda x: jnp.sum(x))
    wait([multiply(a), read(x)])
    fast = lambda work: min(once(work)[0] for _ in range(3 if quick else 8))
    return Limits(2 * n**3 / fast(lambda: multiply(a)), x.nbytes / fast(lambda: read(x)))


class Compiling:
    """Counts seconds of tracing and compiling while `with` it; JAX reports them as events.

    Attributes:
      seconds: All of it: tracing, lowering, and the compiler or reading the cache.
      backend: Of these the compiler, or reading the cache.
      requests: Programs asked of the cache; `hits` of them were there.
    """

    _BACKEND = "/jax/core/compile/backend_compile_duration"
    _EVENTS = (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        _BACKEND,
    )

    def __init__(self) -> None:
        self.seconds = self.backend = 0.0
        self.hits = self.requests = 0
        self._spans: list[tuple[str, float, float]] = []

    def __enter__(self) -> "Compiling":
        jax.monitoring.register_event_duration_secs_listener(self._add)
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        from jax._src import monitoring

        monitoring.unregister_event_duration_listener(self._add)
        monitoring.unregister_event_listener(self._count)
        self.seconds = _union([span for _, *span in self._spans])
        self.backend = _union([span for event, *span in self._spans if event == self._BACKEND])

    def _add(self, event: str, duration: float, **_: Any) -> None:
        if event in self._EVENTS:
            end = time.perf_counter()
            self._spans.append((event, end - duration, end))

    def _count(self, event: str, **_: Any) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.requests += event == "/jax/compilation_cache/compile_requests_use_cache"


def _union(spans: Sequence[Sequence[float]]) -> float:
    """Returns the length of the union of spans: a trace inside a trace counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """Returns rows as aligned text."""
    cells = [[str(x) for x in head], *([_cell(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            x.ljust(w) if i == 0 else x.rjust(w)
            for i, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def report(name: str, result: dict[str, Any], out: Path | None, quick: bool) -> Path:
    """Returns the JSON file to which the result was written; quick runs overwrite no figures."""
    file = out or RESULTS / (f"quick_{name}.json" if quick else f"{name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"\n{file}")
    return file
