"""What compiling takes of a command's time: its first run, and the same command once more.

    python benchmarks/second_run.py -- adapt configs/tiny_world.yaml
    python benchmarks/second_run.py -- run configs/arc_tiny.yaml outer.rounds=1

Both run in processes of their own, the first with an empty cache of compiled programs. Tracing and
reading the cache count as compiling. `{run}` in the command becomes a new folder each time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_USUAL = ["adapt", "configs/tiny_world.yaml"]  # run from the root
_QUICK = ["outer.contexts=2", "sampling.n=2", "inner.epochs=1", "sampling.max_tokens=16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="a command of seal-jax (after --)")
    parser.add_argument("--quick", action="store_true", help="a small adapt")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/second_run.json)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    words = args.words or _USUAL + (_QUICK if args.quick else [])
    if args.child:
        child(words, args.child)
        return
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            runs[name] = in_process(words, Path(folder), name)
            took, spent, backend = (
                runs[name][key] for key in ("seconds", "compiling_s", "backend_s")
            )
            print(
                f"{name} run: {took:.1f} s, compiling {spent:.1f} s = {spent / took:.0%}"
                f" (the compiler or its cache {backend:.1f} s = {backend / took:.0%})",
                flush=True,
            )
    import machine

    command = machine.command()
    result = {"command": command, "machine": machine.describe(), "words": words, "runs": runs}
    machine.report("second_run", result, args.out, args.quick)


def in_process(words: list[str], folder: Path, name: str) -> dict[str, Any]:
    """Returns what a run in a new process measured of itself."""
    out = folder / f"{name}.json"
    own = [word.replace("{run}", str(folder / name)) for word in words]
    environment = {**os.environ, "SEAL_JAX_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, "--child", str(out), "--", *own]
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return {"seconds": time.perf_counter() - start, **json.loads(out.read_text())}


def child(words: list[str], out: Path) -> None:
    """Runs a command and writes what compiling took."""
    import machine

    from seal_jax.__main__ import main as seal_jax

    with machine.Compiling() as compiling:
        if seal_jax(words):
            raise SystemExit("the command failed")
    found = {
        "compiling_s": compiling.seconds,
        "backend_s": compiling.backend,
        "programs_asked_of_cache": compiling.requests,
        "programs_from_cache": compiling.hits,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
