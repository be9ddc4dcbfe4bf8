"""A whole run of a configuration, twice: seconds by stage, and what compiling takes of them.

    python benchmarks/round.py

The first run starts with an empty cache of compiled programs, the second (the same command in a new
process) with what the first left there. Both are the command itself, `seal_jax run`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_QUICK = ("task.size=8", "outer.rounds=1", "outer.contexts=2", "outer.control=false")
_QUICK += ("evaluation.contexts=0", "sampling.n=2", "inner.epochs=2", "outer.sft.epochs=1")
_STAGES = ("write_s", "test_s", "finetune_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_world.yaml")
    parser.add_argument("--set", nargs="*", default=[], help="changed settings, key=value")
    parser.add_argument("--quick", action="store_true", help="a round of 4 self-edits")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/round.json)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            runs[name] = in_process(args, Path(folder), name)
            show(name, runs[name])
    import machine

    result = {
        "command": machine.command(),
        "machine": machine.describe(),
        "config": args.config.name,
        "settings": [*(_QUICK if args.quick else ()), *args.set],
        "runs": runs,
    }
    machine.report("round", result, args.out, args.quick)


def in_process(args: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """Returns what a run in a new process measured of itself."""
    home = folder / name
    command = [sys.executable, __file__, "--child", str(home), "--config", str(args.config)]
    command += ["--quick"] * args.quick + ["--set", *args.set]
    environment = {**os.environ, "SEAL_JAX_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - start
    return {"seconds": took, **json.loads((home.with_suffix(".json")).read_text())}


def child(args: argparse.Namespace) -> None:
    """Runs the configuration and writes its stages beside the run's folder."""
    sys.path.insert(0, str(Path(__file__).parent))
    start = time.perf_counter()
    import machine

    from seal_jax import config, experiment, runs

    loaded = time.perf_counter() - start
    cfg = config.load_config(args.config, [*(_QUICK if args.quick else ()), *args.set])
    with machine.Compiling() as compiling:
        experiment.run(cfg, args.child)
    rows = runs.records(args.child / "metrics.jsonl")
    stages: dict[str, float] = {"import_s": loaded}
    for row in rows:
        for key in _STAGES:
            stages[key] = stages.get(key, 0.0) + row.get(key, 0.0)
        if str(row.get("stage", "")).startswith("eval/"):
            stages["evaluate_s"] = stages.get("evaluate_s", 0.0) + row.get("seconds", 0.0)
    useful = [row["token_efficiency"] for row in rows if "token_efficiency" in row]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    busy = usage.ru_utime + usage.ru_stime
    result = {
        "stages": stages,
        "compiling_s": compiling.seconds,
        "idle_share_of_cores": 1 - busy / (machine.cores() * (time.perf_counter() - start)),
        "programs_asked_of_cache": compiling.requests,
        "programs_from_cache": compiling.hits,
        "token_efficiency": useful,
    }
    args.child.with_suffix(".json").write_text(json.dumps(result))


def show(name: str, run: dict[str, Any]) -> None:
    """Prints a run's seconds."""
    stages = ", ".join(f"{key[:-2]} {value:.1f}" for key, value in run["stages"].items())
    print(
        f"{name} run: {run['seconds']:.1f} s ({stages}); compiling {run['compiling_s']:.1f} s = "
        f"{run['compiling_s'] / run['seconds']:.0%}, {run['programs_from_cache']} of "
        f"{run['programs_asked_of_cache']} programs from the cache; cores idle "
        f"{run['idle_share_of_cores']:.0%}"
    )


if __name__ == "__main__":
    main()
