"""Mixed self-edits of few-shot tasks: rates, epochs and examples differ in every candidate.

    python benchmarks/arc.py

Tiny grids, random configurations as the base policy writes them, a random model. Two ways to run
them together: in lockstep (`slots`, where an adapter is split over devices), in which a candidate
waits until the longest of its chunk is done, and in lanes. `active` is the share of candidate
steps in which a candidate trains; `useful` that of tokens which are not padding or waiting.
"""

import os
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import dataclasses

import inner_loop
import jax
import machine
import numpy as np
import workload

from seal_jax import batching, lanes
from seal_jax import slots as slots_lib
from seal_jax.batching import Batch, SelfEdit
from seal_jax.config import Arc, Inner, Lora
from seal_jax.config import Task as TaskSettings
from seal_jax.params import ModelConfig
from seal_jax.tasks.arc import compact
from seal_jax.tiny import grid_tokens, grids

KEY = jax.random.key(0)
_LORA = Lora(rank=16, alpha=16.0, targets=("q", "v", "gate", "up", "down"))
_INNER = Inner(batch_size=2, schedule="cosine", warmup_steps=11, max_steps=200)
_KEYS = ("way", "chunk", "active", "useful", "candidates_per_s", "compile_s", "programs")


def main() -> None:
    parser = machine.arguments(__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--edits", type=int, default=5, help="self-edits of each task")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--timed", type=int, nargs="*", default=[16], help="chunks to run as well")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.edits, args.chunks, args.timed, args.repeats = 2, 2, [1, 4], [], 1
    task = grids.task(TaskSettings(name="tiny-grids", arc=Arc(format="compact", max_examples=100)))
    rng = np.random.default_rng(0)
    edits = [
        SelfEdit(context, i, " ".join(grids.edit_words(rng)))
        for context in task.contexts[: args.tasks]
        for i in range(args.edits)
    ]
    config = ModelConfig(
        len(compact.WORDS) + 3, 64, 4, 4, 4, 16, 128, tied=True, eos_ids=(1,), family="llama"
    )
    batch = batching.pack(task, edits, grid_tokens.build(), _INNER)
    steps = [c.epochs * -(-len(c.texts) // _INNER.batch_size) for c in batch.candidates]
    result: dict[str, Any] = {
        "command": machine.command(),
        "machine": machine.describe(),
        "architecture": dataclasses.asdict(config),
        "candidates": len(edits),
        "train_nothing": steps.count(0),
        "steps": {"median": float(np.median(steps)), "most": max(steps)},
        "rows": [],
    }
    print(
        f"{len(edits)} self-edits, {steps.count(0)} of them not applicable or too long; "
        f"steps: median {np.median(steps):.0f}, most {max(steps)}"
    )
    params = None
    for chunk in args.chunks:
        result["rows"].append(shares("lockstep", list(slots_lib.arrange(batch, chunk, KEY)), chunk))
        row = shares("lanes", list(lanes.arrange(batch, chunk, KEY)), chunk)
        if chunk in args.timed:
            params = params or workload.random_params(config)
            row |= timed(params, batch, chunk, args.repeats)
        result["rows"].append(row)
    print(machine.table([[row.get(key) for key in _KEYS] for row in result["rows"]], _KEYS))
    machine.report("arc", result, args.out, args.quick)


def shares(way: str, chunks: list[slots_lib.Chunk], size: int) -> dict[str, Any]:
    """Returns which part of candidate steps and tokens is of use."""
    taken = sum(int(np.sum(chunk.slots.total_c)) for chunk in chunks)
    if way == "lanes":
        visits = [visit for chunk in chunks for visit in chunk.slots.visits]
        run = sum(visit.width for visit in visits)
    else:
        run = sum(int(chunk.slots.visits) * len(chunk.index) for chunk in chunks)
    useful = sum(chunk.useful for chunk in chunks)
    processed = sum(chunk.processed for chunk in chunks)
    return {
        "way": way,
        "chunk": size,
        "active": taken / max(run, 1),
        "useful": useful / max(processed, 1),
    }


def timed(params, batch: Batch, chunk: int, repeats: int) -> dict[str, Any]:
    """Returns candidates a second in lanes, and seconds of compiling."""
    chunks = list(lanes.arrange(batch, chunk, KEY))
    work = lambda: inner_loop.all_chunks(params, batch, chunks, _LORA)
    with machine.Compiling() as compiling:
        machine.wait(work())
    took = machine.seconds(work, repeats, warm=False)
    sizes = {(v.width, v.size) for one in chunks for v in one.slots.visits}
    return {
        "candidates_per_s": len(batch) / took,
        "compile_s": compiling.seconds,
        "programs": len(sizes),
    }


if __name__ == "__main__":
    main()
