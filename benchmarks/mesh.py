"""Inner loops on a mesh, in lockstep and in lanes.

    python benchmarks/mesh.py

`planned`: real self-edits on 8 devices, by what the host plans alone. Each call gathers the frozen
weights once (`gathers`), and of the tokens that it processes a share is `useful`. `run`: this CPU
as 2 devices, a core for each, with a small model.
"""

from typing import Any

import jax
import machine
import numpy as np
import workload

from seal_jax import batching, inner, lanes, sharding
from seal_jax import slots as slots_lib
from seal_jax.config import Inner, Lora, Mesh
from seal_jax.slots import Chunk

jax.config.update("jax_platforms", "cpu")
_DEVICES = 2
jax.config.update("jax_num_cpu_devices", _DEVICES)
KEY = jax.random.key(0)
_LORA = Lora(rank=32, alpha=64.0, targets=("q", "v"))
_PLANNED = ("way", "chunk", "gathers", "tokens", "useful")
_RUN = ("way", "chunk", "useful", "candidates_per_s", "compile_s")


def main() -> None:
    parser = machine.arguments(__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, default=50, help="5 self-edits of each are planned")
    parser.add_argument("--chunks", type=int, nargs="+", default=[40, 88, 256])
    parser.add_argument("--candidates", type=int, default=16, help="to run, in one chunk")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    if args.quick:
        args.contexts, args.chunks, args.candidates, args.epochs, args.repeats = 4, [8], 4, 1, 1
    result: dict[str, Any] = {"command": machine.command(), "machine": machine.describe()}
    work = workload.make("quick" if args.quick else "small", 5 * args.contexts, per_context=5)
    result["texts"] = work.source
    batch = batching.pack(work.task, work.edits, work.lm.tokenizer, Inner(epochs=args.epochs))
    rows = result["planned"] = []
    for chunk in args.chunks:
        rows.append(planned("lockstep", slots_lib.arrange(batch, chunk, KEY, 8), chunk))
        rows.append(planned("lanes", lanes.arrange(batch, chunk, KEY, 4096, parts=8), chunk))
    print(machine.table([[row.get(key) for key in _PLANNED] for row in rows], _PLANNED))
    few = batching.Batch(batch.candidates[: args.candidates], batch.settings, batch.eos_id)
    mesh = sharding.make(Mesh())
    params = sharding.place(work.lm.params, sharding.weights(work.lm.config, mesh))
    ways = {
        "lockstep": list(slots_lib.arrange(few, 0, KEY, _DEVICES)),
        "lanes": list(lanes.arrange(few, 0, KEY, parts=_DEVICES)),
    }
    rows = result["run"] = [timed(params, few, *way, args.repeats) for way in ways.items()]
    if abs(rows[0].pop("loss") - rows[1].pop("loss")) > 1e-3:
        raise SystemExit("the two ways start from different losses")
    print(machine.table([[row.get(key) for key in _RUN] for row in rows], _RUN))
    machine.report("mesh", result, args.out, args.quick)


def planned(way: str, chunks, size: int) -> dict[str, Any]:
    """Returns what a plan comes to."""
    made = list(chunks)
    visits = [chunk.slots.visits for chunk in made]
    processed = sum(chunk.processed for chunk in made)
    return {
        "way": way,
        "chunk": size,
        "gathers": sum(len(x) if isinstance(x, list) else int(x) for x in visits),
        "tokens": processed,
        "useful": sum(chunk.useful for chunk in made) / processed,
    }


def timed(params, batch: batching.Batch, way: str, chunks: list[Chunk], repeats: int) -> dict:
    """Returns candidates a second, seconds of compiling, and the mean of all first losses."""
    work = lambda: [inner.adapt_chunk(params, batch, chunk, KEY, _LORA) for chunk in chunks]
    with machine.Compiling() as compiling:
        first = [sharding.fetch(losses)[:, 0] for _, losses in machine.wait(work())]
    seconds = machine.seconds(work, repeats, warm=False)
    return {
        "way": way,
        "chunk": len(batch),
        "useful": sum(c.useful for c in chunks) / sum(c.processed for c in chunks),
        "candidates_per_s": len(batch) / seconds,
        "compile_s": compiling.seconds,
        "loss": float(np.sum(first) / len(batch)),
    }


if __name__ == "__main__":
    main()
