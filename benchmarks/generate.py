"""Generation: samples of prompts, and questions under many adapters; transformers' `generate`.

    python benchmarks/generate.py

Same weights, same prompts, greedy, no end token, so that every row makes all its tokens; the tokens
are compared. With adapters the peer is PEFT, one adapter at a time, each with a batch of its own.
The floor: every weight (and adapter) is read once for each token of a batch.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the card

import jax
import machine
import numpy as np
import peers
import workload

from seal_jax import inner, lora, readers, sampling
from seal_jax.config import Lora, Mesh

KEY = jax.random.key(0)
_OWN = Lora(rank=32, alpha=64.0, targets=("q", "v"))
_KEYS = (
    "rows",
    "tokens_per_s",
    "peer_tokens_per_s",
    "ratio",
    "share_of_bandwidth",
    "share_of_flops",
    "compile_s",
    "agreement",
)


def main() -> None:
    parser = machine.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=workload.SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each row")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--questions", type=int, default=4, help="of each adapter")
    parser.add_argument("--processes", type=int, default=1, help="whose medians are reported")
    args = parser.parse_args()
    if args.processes > 1:
        result = of_processes(args.processes)
        show(result["cases"])
        machine.report("generate", result, args.out, args.quick)
        return
    if args.quick:
        args.shape, args.rows, args.tokens, args.repeats = "quick", [4], 8, 1
        args.adapters, args.questions = 2, 2
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    work = workload.make(args.shape, 1, dtype=dtype)
    config = workload.endless(work.lm.config)
    lm = work.lm._replace(config=config, params=work.lm.params.replace(config=config))
    limits = machine.limits(dtype, args.quick)
    result: dict[str, Any] = {
        "command": machine.command(),
        "machine": machine.describe(),
        "shape": args.shape,
        "architecture": dataclasses.asdict(config),
        "dtype": dtype,
        "new_tokens": args.tokens,
        "limits": limits._asdict(),
        "cases": {},
    }
    print(
        f"{result['machine']['processor']}, {result['machine']['cores']} cores, "
        f"{result['machine']['device']}: {limits.flops / 1e9:,.0f} GFLOP/s, "
        f"{limits.bandwidth / 1e9:,.0f} GB/s; {args.shape}, {args.tokens} new tokens, greedy"
    )
    prompts = questions(work, max(*args.rows, args.adapters * args.questions))
    peer = peers.model(lm.params) if peers.here() and not args.no_peer else None
    for rows in args.rows:
        name = f"{rows} prompts"
        result["cases"][name] = plain(lm, peer, prompts[:rows], args, limits)
    name = f"{args.rows[0]} prompts x 4 samples"
    result["cases"][name] = samples(lm, prompts[: args.rows[0]], args, limits)
    name = f"{args.adapters} adapters x {args.questions} questions"
    result["cases"][name] = adapted(lm, peer, prompts, args, limits)
    show(result["cases"])
    machine.report("generate", result, args.out, args.quick)


def show(cases: dict[str, dict[str, Any]]) -> None:
    """Prints the cases as a table."""
    rows = [[name, *(case.get(key) for key in _KEYS)] for name, case in cases.items()]
    print(machine.table(rows, ("case", *_KEYS)))


def of_processes(n: int) -> dict[str, Any]:
    """Returns the result of the same command with every figure the median of n processes.

    Each case keeps all its ratios too: where the machine lays a process's threads decides on more
    than chance within one.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(n):
            out = Path(folder) / f"{number}.json"
            command = [sys.executable, *sys.argv, "--processes", "1", "--out", str(out)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results.append(json.loads(out.read_text()))
    cases = {}
    for name, first in results[0]["cases"].items():
        every = [one["cases"][name] for one in results]
        cases[name] = {key: statistics.median(one[key] for one in every) for key in first}
        if "ratio" in first:
            cases[name]["ratios"] = sorted(one["ratio"] for one in every)
    return {**results[0], "command": machine.command(), "processes": n, "cases": cases}


def questions(work: workload.Work, n: int) -> list[list[int]]:
    """Returns n prompts, the questions of the workload's contexts in turn."""
    prompts = [
        sampling.encode(work.lm, question.prompt)
        for context in work.task.contexts
        for question in work.task.questions(context)
    ]
    return (prompts * -(-n // len(prompts)))[:n]


def ours(lm, prompts: list[list[list[int]]], args, adapters=None, n: int = 1) -> dict[str, Any]:
    """Returns tokens a second and seconds of compiling; and the tokens, under `found`."""
    lm = readers.ready(lm, Mesh())  # as the stages of a run do

    def work() -> Any:
        # Answers need no log-probabilities, self-edits do.
        how = {"temperature": 1.0, "key": KEY} if n > 1 else {"logprobs": False}
        return sampling.decode(lm, prompts, adapters, samples=n, max_tokens=args.tokens, **how)

    with machine.Compiling() as compiling:
        found = work()
    took = machine.seconds(work, args.repeats, warm=False)
    rows = sum(map(len, prompts)) * n
    return {
        "rows": rows,
        "seconds": took,
        "tokens_per_s": rows * args.tokens / took,
        "compile_s": compiling.seconds,
        "found": found,
    }


def floor(lm, case: dict[str, Any], adapter_weights: int, limits: machine.Limits) -> None:
    """Adds the shares of the two floors: reading all weights for each step, and the products."""
    weights = workload.matmul_weights(lm.config)
    size = lm.params.embed.dtype.itemsize
    steps_per_s = case["tokens_per_s"] / case["rows"]
    bytes_per_step = weights * size + 4 * adapter_weights * case.get("adapters", 0)
    case["share_of_bandwidth"] = steps_per_s * bytes_per_step / limits.bandwidth
    case["share_of_flops"] = case["tokens_per_s"] * 2 * weights / limits.flops


def plain(lm, peer, prompts: list[list[int]], args, limits) -> dict[str, Any]:
    """Returns the figures of one batch of prompts, without adapters."""
    case = ours(lm, [prompts], args)
    found = case.pop("found")[0]
    floor(lm, case, 0, limits)
    if peer is not None:
        peers.generate(peer, prompts, args.tokens)
        runs = [peers.generate(peer, prompts, args.tokens) for _ in range(args.repeats)]
        took = statistics.median(seconds for _, seconds in runs)
        case["peer_tokens_per_s"] = len(prompts) * args.tokens / took
        case["ratio"] = case["tokens_per_s"] / case["peer_tokens_per_s"]
        case["agreement"] = agreement([one[0].tokens for one in found], runs[0][0])
    return case


def samples(lm, prompts: list[list[int]], args, limits) -> dict[str, Any]:
    """Returns the figures of several samples of each prompt, which is read once."""
    case = ours(lm, [prompts], args, n=4)
    del case["found"]
    floor(lm, case, 0, limits)
    return case


def adapted(lm, peer, prompts: list[list[int]], args, limits) -> dict[str, Any]:
    """Returns the figures of questions under adapters of their own."""
    c, q = args.adapters, args.questions
    shared = [prompts[i * q : (i + 1) * q] for i in range(c)]
    adapters = inner.init_many(lm.config, _OWN, KEY, np.arange(c, dtype=np.uint32))
    # Fresh adapters change nothing: give them something to say.
    adapters = adapters.replace(b=jax.tree.map(lambda x: x + 0.01, adapters.b))
    case = ours(lm, shared, args, adapters) | {"adapters": c}
    found = case.pop("found")
    own = sum(x.size for x in jax.tree.leaves(lora.shapes(lm.config, _OWN)))
    floor(lm, case, own, limits)
    if peer is not None:
        wrapped = peers.adapted(peer, _OWN)
        took, same = 0.0, []
        for i in range(c):
            peers.set_adapter(wrapped, lora.take(adapters, i))
            if i == 0:
                peers.generate(wrapped, shared[i], args.tokens)
            tokens, seconds = peers.generate(wrapped, shared[i], args.tokens)
            took += seconds
            same.append(agreement([one[0].tokens for one in found[i]], tokens))
        case["peer_tokens_per_s"] = case["rows"] * args.tokens / took
        case["ratio"] = case["tokens_per_s"] / case["peer_tokens_per_s"]
        case["agreement"] = float(np.mean(same))
    return case


def agreement(ours: list[np.ndarray], theirs: np.ndarray) -> float:
    """Returns the share of rows with the same tokens throughout (near ties may part them)."""
    return float(np.mean([np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)]))


if __name__ == "__main__":
    main()
