"""What needs a GPU, in one call: numerics first, then speed, then a whole round; the table last.

    python benchmarks/gpu.py --shapes qwen2.5-0.5b          # 10 minutes or so for each shape
    python benchmarks/gpu.py --dry-run                      # the same code, tiny, on any machine

Random weights of the true shape in bfloat16, real self-edits where `$SEAL_JAX_DATA` has them. A
round is 50 contexts x 5 self-edits x 3 seeds: run where `--round` names the shape, else projected
from the rates measured. Every aim is printed beside what was reached.
"""

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the card
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

import generate
import inner_loop
import jax
import jax.numpy as jnp
import machine
import numpy as np
import workload

from seal_jax import batching, inner, lora, model, readers, rewards, sft, writing
from seal_jax.batching import Batch
from seal_jax.config import Answers, Config, Inner, Lora, Mesh, Outer, Sampling, Sft

KEY = jax.random.key(0)
_SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
_AIMS = {"seconds_per_candidate": 1.0, "utilisation": 0.5, "over_unpadded": 5.0}
# Relative distance to float32 on the CPU: float32's own rounding, and bfloat16's over the layers.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def main() -> None:
    parser = machine.arguments(__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--shapes", nargs="+", choices=workload.SHAPES, default=list(_SHAPES))
    parser.add_argument("--round", default="qwen2.5-0.5b", help="shape at which a round is run")
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 16, 64, 128])
    parser.add_argument("--candidates", type=int, default=250, help="self-edits adapted")
    parser.add_argument("--targets", nargs="+", choices=inner_loop.TARGETS, default=["q, v"])
    parser.add_argument("--contexts", type=int, default=50)
    parser.add_argument("--written", type=int, default=256, help="tokens of a written self-edit")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="prompts decoded")
    parser.add_argument("--peer-candidates", type=int, default=2)
    parser.add_argument("--no-numerics", action="store_true")
    args = parser.parse_args()
    args.no_cache = True  # a start from the cache is not timed
    args.padded_steps, args.epochs = 4, 10
    args.tokens, args.adapters, args.questions = 64, 16, 5
    args.dtype = "bfloat16"
    if args.quick or args.dry_run:
        args.quick, args.shapes, args.round = True, ["quick"], "quick"
        args.chunks, args.epochs, args.repeats, args.contexts, args.written = [1, 2], 2, 1, 2, 8
        args.candidates, args.peer_candidates, args.padded_steps = 4, 1, 1
        args.dtype = "float32"
        args.rows, args.tokens, args.adapters, args.questions = [4], 8, 2, 2
    limits = machine.limits(args.dtype, args.quick)
    result: dict[str, Any] = {
        "command": machine.command(),
        "machine": machine.describe(),
        "dtype": args.dtype,
        "limits": limits._asdict(),
        "numerics": None if args.no_numerics else numerics(args),
        "shapes": {},
    }
    for shape in args.shapes:
        print(f"\n== {shape}", flush=True)
        # As in a run, what the choice of a chunk has compiled is found again.
        with tempfile.TemporaryDirectory() as folder, inner_loop.cache(folder):
            found = result["shapes"][shape] = {}
            for _ in measure(shape, args, limits, found):
                machine.report("gpu", result, args.out, args.quick)  # what is measured is kept
            if not any(map(fitting, found["adapters"].values())):
                print(f"{shape}: no chunk fits into memory", flush=True)
    show(result)


def numerics(args: argparse.Namespace) -> dict[str, float]:
    """Returns relative distances of this device's results from float32 ones on the CPU.

    Raises:
      SystemExit: where one is out of tolerance; nothing is worth timing then.
    """
    shape = "quick" if args.quick else "small"
    work = workload.make(shape, 4)
    config = work.lm.config
    rng = np.random.default_rng(0)
    tokens_bt = rng.integers(1, config.vocab_size, (4, 64)).astype(np.int32)
    own = Lora(rank=8, alpha=16.0, targets=("q", "v"))
    batch = batching.pack(work.task, work.edits, work.lm.tokenizer, Inner(epochs=2))

    def results(dtype: str, chunk: int) -> dict[str, np.ndarray]:
        params = jax.tree.map(lambda x: x.astype(dtype), work.lm.params)
        settings = dataclasses.replace(batch.settings, chunk=chunk)
        with jax.default_matmul_precision("highest"):
            logits = jax.jit(model.forward)(params, None, jnp.asarray(tokens_bt))
            adapters, losses = inner.adapt_many(
                params, Batch(batch.candidates, settings, batch.eos_id), KEY, Config(lora=own)
            )
        return {"logits": np.asarray(logits), "losses": losses, "adapters": _flat(adapters)}

    with jax.default_device(jax.devices("cpu")[0]):
        exact = results("float32", 4)
    found = {}
    for dtype, chunk in (("float32", 2), ("float32", 4), ("bfloat16", 4)):
        for name, value in results(dtype, chunk).items():
            if name == "adapters" and dtype == "bfloat16":
                continue  # Adam's first steps go by signs: rounding turns small ones around
            gap = _distance(value, exact[name])
            found[f"{dtype}, C={chunk}, {name}"] = gap
            if not gap < _TOLERANCE[dtype]:
                raise SystemExit(f"{name} in {dtype} at C={chunk}: {gap:.1e} from the CPU's")
    print("numerics: " + ", ".join(f"{name} {gap:.1e}" for name, gap in found.items()), flush=True)
    return found


def _flat(adapters: lora.Adapter) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(adapters)])


def _distance(value: np.ndarray, exact: np.ndarray) -> float:
    """Returns |value - exact| / |exact| over what both have; losses past the end are NaN."""
    real = np.isfinite(exact)
    value, exact = np.float64(value[real]), np.float64(exact[real])
    return float(np.linalg.norm(value - exact) / np.linalg.norm(exact))


def measure(
    shape: str, args: argparse.Namespace, limits: machine.Limits, found: dict[str, Any]
) -> Iterator[None]:
    """Fills in the figures of one shape, stage by stage: inner loops, generation, a round."""
    work = workload.make(shape, args.candidates, -(-args.candidates // 50), dtype=args.dtype)
    settings = Inner(epochs=args.epochs)
    batch = batching.pack(work.task, work.edits, work.lm.tokenizer, settings)
    found |= {"architecture": dataclasses.asdict(work.lm.config), "adapters": {}}
    for name in args.targets:
        own = Lora(rank=32, alpha=64.0, targets=inner_loop.TARGETS[name])
        theirs = inner_loop.of_peers(work, batch, own, args)
        figures = inner_loop.compare(work, batch, own, args, limits.flops, theirs)
        found["adapters"][name] = figures
        inner_loop.print_adapter(name, figures)
        yield
    ran = fitting(next(iter(found["adapters"].values())))
    if not ran:
        return
    found["generation"] = generation(work, args, limits)
    found["projected"] = projected(found, args)
    yield
    del work
    if shape == args.round:
        best = max(ran, key=lambda row: row["candidates_per_s"])
        found["round"] = run_round(shape, best["chunk"], args)
        yield


def generation(work, args: argparse.Namespace, limits: machine.Limits) -> dict[str, Any]:
    """Returns the figures of `generate.py` for the shape, without its peer."""
    config = workload.endless(work.lm.config)
    lm = work.lm._replace(config=config, params=work.lm.params.replace(config=config))
    lm = readers.ready(lm, Mesh())
    prompts = generate.questions(work, max(*args.rows, args.adapters * args.questions))
    cases = {f"{n} prompts": generate.plain(lm, None, prompts[:n], args, limits) for n in args.rows}
    name = f"{args.adapters} adapters x {args.questions} questions"
    cases[name] = generate.adapted(lm, None, prompts, args, limits)
    return cases


def fitting(compared: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the figures of the chunks that fitted into memory."""
    return [row for row in compared["chunks"] if "candidates_per_s" in row]


def run_round(shape: str, chunk: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of a round's stages, as a run goes through them.

    Random weights write no self-edits worth applying, so what is applied are the reference's.
    """
    n = 5 * args.contexts
    work = workload.make(shape, n, per_context=5, dtype=args.dtype)
    lm = readers.ready(work.lm, Mesh())
    contexts = [edit.context for edit in work.edits[::5]]
    cfg = Config(
        lora=Lora(rank=32, alpha=64.0, targets=("q", "v")),
        inner=Inner(epochs=args.epochs, chunk=chunk),
        sampling=Sampling(n=5, max_tokens=args.written),
        answers=Answers(max_tokens=args.tokens),
        outer=Outer(contexts=args.contexts, sft=Sft(learning_rate=1e-5)),
    )
    free = work.lm._replace(config=workload.endless(lm.config), reader=lm.reader)
    write_s, _ = machine.once(
        lambda: writing.write(free, work.task, contexts, 5, KEY, cfg) and None
    )
    test_s = 0.0
    for seed in range(cfg.outer.seeds):
        key = jax.random.fold_in(KEY, seed)
        seconds, parts = machine.once(
            lambda key=key: [
                part for _, part in rewards.evaluate(lm, work.task, work.edits, key, cfg)
            ]
        )
        test_s += seconds
    rows = [(work.task.prompt(edit.context), edit.text) for edit in work.edits[::5]]
    sft_s, _ = machine.once(lambda: sft.finetune(work.lm, rows, cfg.outer.sft, KEY)[0])
    useful, processed = (sum(getattr(p, name) for p in parts) for name in ("useful", "processed"))
    return {
        "self_edits": n * cfg.outer.seeds,
        "write_s": write_s,
        "test_s": test_s,
        "finetune_s": sft_s,
        "seconds": write_s + test_s + sft_s,
        "token_efficiency": useful / processed,
    }


def projected(found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Returns a round's seconds from the best rates measured; without compiling and finetuning."""
    self_edits = 5 * args.contexts
    loops = 3 * self_edits
    first = next(iter(found["adapters"].values()))
    candidates = max(row["candidates_per_s"] for row in fitting(first))
    cases = list(found["generation"].values())
    writing = max(case["tokens_per_s"] for case in cases[:-1])
    answering = cases[-1]["tokens_per_s"]
    write_s = self_edits * args.written / writing
    test_s = loops / candidates + loops * args.questions * args.tokens / answering
    return {
        "self_edits": loops,
        "write_s": write_s,
        "test_s": test_s,
        "seconds": write_s + test_s,
    }


def show(result: dict[str, Any]) -> None:
    """Prints what was reached beside the aims, shape by shape."""
    rows = []
    for shape, found in result["shapes"].items():
        for name, compared in found["adapters"].items():
            ran = fitting(compared)
            if not ran:
                continue
            best = max(ran, key=lambda row: row["candidates_per_s"])
            many = [row["share_of_floor"] for row in ran if row["chosen"] >= 16]
            rows.append(
                (
                    f"{shape}, {name}",
                    best["chosen"],
                    1 / best["candidates_per_s"],
                    max(many, default=best["share_of_floor"]),
                    best.get("over_unpadded"),
                    found["projected"]["seconds"],
                    found.get("round", {}).get("seconds"),
                )
            )
    head = ("shape, adapter", "best C", "s per candidate", "utilisation")
    print("\n" + machine.table(rows, (*head, "over (b)", "round projected s", "round run s")))
    aims = ", ".join(f"{name} {aim}" for name, aim in _AIMS.items())
    print(f"aims (7B on an H200): {aims}")


if __name__ == "__main__":
    main()
