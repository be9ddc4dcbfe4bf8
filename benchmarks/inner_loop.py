"""The inner loop on real self-edits: seal_jax in chunks of candidates, transformers and PEFT.

    python benchmarks/inner_loop.py

Peers, one candidate at a time: (a) as the reference does it, each text padded to 2,048 tokens; (b)
without padding. Same weights, same adapters at the start, same texts in the same order; the losses
are compared. A useful token is one of a training text, its EOS included, each time it is visited.
"""

import contextlib
import dataclasses
import os
import statistics
import tempfile
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the card

import jax
import machine
import numpy as np
import peers
import workload

from seal_jax import batching, inner, lanes, lora, readers, runtime, streams
from seal_jax import chunks as chunks_lib
from seal_jax.batching import Batch
from seal_jax.config import ALL_TARGETS, Config, Inner, Lora, Mesh
from seal_jax.slots import Chunk

KEY = jax.random.key(0)
TARGETS = {"q, v": ("q", "v"), "all seven": ALL_TARGETS}
_HEAD = (
    "chunk",
    "candidates/s",
    "useful tokens/s",
    "over (b)",
    "efficiency",
    "of the FLOP floor",
    "cold compile s",
    "from cache s",
    "programs",
)

_CLOSE = {"float32": 1e-4, "bfloat16": 0.05}  # first losses to PEFT's, relatively


def main() -> None:
    parser = machine.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=workload.SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--candidates", type=int, help="self-edits (default: the largest chunk)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--peer-candidates", type=int, default=4)
    parser.add_argument("--padded-steps", type=int, default=4)
    parser.add_argument("--no-cache", action="store_true", help="time no start from the cache")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.chunks, args.epochs, args.repeats = "quick", [1, 2], 2, 1
        args.candidates, args.peer_candidates, args.padded_steps = 4, 2, 1
        args.targets = ["q, v"]
    accelerated = jax.default_backend() != "cpu"
    args.dtype = dtype = args.dtype or ("bfloat16" if accelerated else "float32")
    n = args.candidates or max(args.chunks)
    work = workload.make(args.shape, n, per_context=-(-n // 50), dtype=dtype)
    result: dict[str, Any] = {
        "command": machine.command(),
        "machine": machine.describe(),
        "shape": args.shape,
        "architecture": dataclasses.asdict(work.lm.config),
        "dtype": dtype,
        "texts": work.source,
        "limits": machine.limits(dtype, args.quick)._asdict(),
        "adapters": {},
    }
    limits = result["limits"]
    print(
        f"{result['machine']['processor']}, {result['machine']['cores']} cores, "
        f"{result['machine']['device']}: {limits['flops'] / 1e9:,.0f} GFLOP/s of a {dtype} matrix "
        f"product, {limits['bandwidth'] / 1e9:,.0f} GB/s\n{args.shape}: {n} {work.source}"
    )
    settings = Inner(epochs=args.epochs)
    batch = batching.pack(work.task, work.edits, work.lm.tokenizer, settings)
    adapters = {name: Lora(rank=32, alpha=64.0, targets=TARGETS[name]) for name in args.targets}
    theirs = {name: of_peers(work, batch, own, args) for name, own in adapters.items()}
    runtime.keep_memory()  # as `load_model` does; the peers have run as they do by themselves
    for name, own in adapters.items():
        result["adapters"][name] = compare(work, batch, own, args, limits["flops"], theirs[name])
        print_adapter(name, result["adapters"][name])
    machine.report("inner_loop", result, args.out, args.quick)


def of_peers(work, batch: Batch, own: Lora, args) -> tuple[dict[str, Any], list[np.ndarray]] | None:
    """Returns what `run_peers` does, or None where there are none, or none are wanted."""
    return run_peers(work, batch, own, args) if peers.here() and not args.no_peer else None


def compare(work, batch: Batch, own: Lora, args, flops: float, theirs) -> dict[str, Any]:
    """Returns the figures of one kind of adapter: those of both peers, and of each chunk size."""
    found: dict[str, Any] = {"texts": sum(len(c.texts) for c in batch.candidates)}
    found["tokens"] = sum(len(t.tokens) for c in batch.candidates for t in c.texts)
    per_token = flops_per_token(work.lm.config, own)
    rate, first = None, []
    if theirs:
        found["peers"], first = theirs
        rate = found["peers"]["unpadded"]["useful_tokens_per_s"]
    found["flops_per_useful_token"] = per_token
    found["floor_useful_tokens_per_s"] = flops / per_token
    found["chunks"] = []
    params = readers.readable(readers.ready(work.lm, Mesh()))
    for chunk in args.chunks:
        try:
            row, losses = ours(params, batch, own, chunk, args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found["chunks"].append({"chunk": chunk, "error": "does not fit into memory"})
            if chunk:  # nor do larger ones
                break
            continue
        row["share_of_floor"] = row["useful_tokens_per_s"] * per_token / flops
        if rate:
            padded = found["peers"]["padded"]["useful_tokens_per_s"]
            row["over_unpadded"] = row["useful_tokens_per_s"] / rate
            row["over_padded"] = row["useful_tokens_per_s"] / padded
            gaps = [np.abs(losses[i, : len(x)] / x - 1).max() for i, x in enumerate(first)]
            row["loss_difference"] = gap = float(max(gaps))
            if not gap < _CLOSE[args.dtype]:
                raise SystemExit(f"chunk {chunk}: first losses differ from PEFT's by {gap:.1e}")
        found["chunks"].append(row)
    return found


def flops_per_token(config, own: Lora) -> float:
    """Returns operations of a training step per token: 4 per frozen weight, 6 per trained one.

    A frozen weight takes part in the forward product and in the gradient of its input; attention's
    own products are left out (texts are short).
    """
    adapter = lora.shapes(config, own)
    trained = sum(x.size for x in jax.tree.leaves(adapter))
    return 4.0 * workload.matmul_weights(config) + 6.0 * trained


def ours(params, batch: Batch, own: Lora, size: int, args) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the figures of seal_jax with `size` candidates resident, and all losses [n, i]."""
    settings = dataclasses.replace(batch.settings, chunk=size)
    again = None
    with contextlib.ExitStack() as stack:
        if not args.no_cache:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(cache(folder))
        batch = Batch(batch.candidates, settings, batch.eos_id)
        with machine.Compiling() as compiling:
            settings = chunks_lib.choose(params, batch, Config(lora=own))
            batch = Batch(batch.candidates, settings, batch.eos_id)
            # A program for every size, as in a long run; `inner.arrange` makes fewer for few steps.
            chunks = list(lanes.arrange(batch, inner.chunk_size(settings), KEY))
            every = lambda: all_chunks(params, batch, chunks, own)
            found = machine.wait(every())
        if not args.no_cache:
            jax.clear_caches()
            again, _ = timed_compile(every)
    took = machine.seconds(every, args.repeats, warm=False)
    losses = np.full((len(batch), max(np.shape(x)[1] for _, x in found)), np.nan, np.float32)
    for chunk, (_, loss) in zip(chunks, found, strict=True):
        real = chunk.index >= 0
        losses[chunk.index[real]] = np.asarray(loss)[real]
    useful = sum(chunk.useful for chunk in chunks)
    processed = sum(chunk.processed for chunk in chunks)
    row = {
        "chunk": size,
        "chosen": settings.chunk,
        "seconds": took,
        "candidates_per_s": len(batch) / took,
        "useful_tokens_per_s": useful / took,
        "token_efficiency": useful / processed,
        "activations_kept": not inner.recompute(settings),
        "compile_cold_s": compiling.seconds,
        "compile_from_cache_s": again,
        "programs": len({(v.width, v.size) for x in chunks for v in x.slots.visits}),
        "calls": sum(len(x.slots.visits) for x in chunks),
        "tokens_per_call": processed / sum(len(x.slots.visits) for x in chunks),
        "peak_bytes": _peak(params),
    }
    return row, losses


def _peak(params) -> int | None:
    """Returns the most bytes that were in use on the device so far, where it says."""
    return (params.embed.addressable_shards[0].device.memory_stats() or {}).get("peak_bytes_in_use")


def all_chunks(params, batch: Batch, chunks: list[Chunk], own: Lora) -> list[Any]:
    """Returns adapters and losses of each chunk; they run side by side, as in a run."""
    work = lambda chunk: machine.wait(inner.adapt_chunk(params, batch, chunk, KEY, own))
    return list(streams.ordered(work, chunks))


class cache:
    """An empty folder for compiled programs, for as long as `with` lasts."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.before = jax.config.jax_compilation_cache_dir
        self._set(self.folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.clear_caches()

    def __exit__(self, *_: object) -> None:
        self._set(self.before)

    def _set(self, folder: str | None) -> None:
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", folder)


def timed_compile(work: Any) -> tuple[float, Any]:
    """Returns the seconds of tracing and compiling in a run, and its result."""
    with machine.Compiling() as compiling:
        value = machine.wait(work())
    return compiling.seconds, value


def steps_in_order(chunk: Chunk, at: int) -> list[np.ndarray]:
    """Returns the texts of a candidate in the order in which its steps visit them."""
    steps = chunk.slots.steps[at]
    order = [j for visit in chunk.slots.visits for i, j, _ in visit.lanes if i == at]
    return [steps[j][0][0].tokens for j in order]


def run_peers(work, batch: Batch, own: Lora, args) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Returns the figures of both peers on the first candidates, and the first losses of these."""
    some = Batch(batch.candidates[: args.peer_candidates], batch.settings, batch.eos_id)
    chunks = list(lanes.arrange(some, 1, KEY))
    wrapped = peers.adapted(peers.model(work.lm.params), own)
    unpadded, padded, losses = [], [], {}
    for chunk in chunks:
        texts, index = steps_in_order(chunk, 0), int(chunk.index[0])
        ids = np.array([some.candidates[index].id], np.uint32)
        start = lora.take(inner.init_many(work.lm.config, own, KEY, ids), 0)
        peers.set_adapter(wrapped, start)
        if not unpadded:
            peers.train(wrapped, texts[:2], batch.settings)  # warms up
            peers.set_adapter(wrapped, start)
        theirs = peers.train(wrapped, texts, batch.settings)
        unpadded.append((sum(map(len, texts)), theirs.seconds))
        losses[index] = np.array(theirs.losses[:5])  # later, rounding has grown
        peers.set_adapter(wrapped, start)
        few_texts = texts[:: max(1, len(texts) // args.padded_steps)][: args.padded_steps]
        length = batch.settings.max_length
        slow = peers.train(wrapped, few_texts, batch.settings, pad_to=length, total=len(texts))
        padded.append((sum(map(len, few_texts)), slow.seconds * _share(few_texts, texts)))
    figures = {
        "unpadded": _rates(unpadded, len(chunks)),
        "padded": {"useful_tokens_per_s": _rate(padded), "steps": args.padded_steps * len(chunks)},
        "attention": wrapped.config._attn_implementation,
    }
    del wrapped
    peers.free()
    return figures, [losses[i] for i in range(len(losses))]


def _share(few: list[np.ndarray], texts: list[np.ndarray]) -> float:
    """Returns what makes the time of a few padded steps that of as many useful tokens.

    A padded step takes the same time whatever its text, so the mean text decides.
    """
    mean = lambda x: sum(map(len, x)) / len(x)
    return mean(few) / mean(texts)


def _rate(pairs: list[tuple[int, float]]) -> float:
    return statistics.median(tokens / took for tokens, took in pairs)


def _rates(pairs: list[tuple[int, float]], n: int) -> dict[str, float]:
    return {
        "useful_tokens_per_s": _rate(pairs),
        "candidates_per_s": n / sum(took for _, took in pairs),
        "spread": max(t / s for t, s in pairs) / min(t / s for t, s in pairs),
    }


def print_adapter(name: str, found: dict[str, Any]) -> None:
    """Prints one kind of adapter as a table."""
    print(f"\nrank 32 on {name}: {found['texts']} texts, {found['tokens']} tokens an epoch")
    for kind, label in (("padded", "(a) padded to 2,048"), ("unpadded", "(b) unpadded")):
        if "peers" in found:
            rate = found["peers"][kind]["useful_tokens_per_s"]
            print(f"transformers + PEFT, {label}: {rate:,.0f} useful tokens/s")
    gaps = [row["loss_difference"] for row in found["chunks"] if "loss_difference" in row]
    if gaps:
        print(f"largest relative difference of the first losses: {max(gaps):.1e}")
    keys = (
        "chunk",
        "candidates_per_s",
        "useful_tokens_per_s",
        "over_unpadded",
        "token_efficiency",
        "share_of_floor",
        "compile_cold_s",
        "compile_from_cache_s",
        "programs",
    )
    rows = [[row.get(key) for key in keys] for row in found["chunks"]]
    print(machine.table(rows, _HEAD))
    best = max(found["chunks"], key=lambda row: row.get("useful_tokens_per_s", 0))
    if "over_padded" in best:
        print(
            f"best chunk {best['chunk']}: {best['over_padded']:.0f}x over (a), "
            f"{best['over_unpadded']:.2f}x over (b)"
        )


if __name__ == "__main__":
    main()
