"""What the loops come to on one device and on meshes of 8: run as a process of its own.

Usage: python mesh.py OUT.npz. Arrays are named `DATA x MODEL / what`; 1x1 is no mesh.
"""

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import toys  # noqa: E402

from seal_jax import config, inner, outer, readers, sampling, sharding  # noqa: E402
from seal_jax.checkpoint import LM  # noqa: E402

CONFIG = toys.config("qwen2", d_ff=32, vocab_size=40, n_layers=1)
LORA = config.Lora(rank=3, alpha=6.0, targets=("q", "down"))
INNER = config.Inner(learning_rate=2e-2, epochs=2, chunk=5)
KEY = jax.random.key(5)
# Decoding in each layout on some mesh; finetuning in each way on some mesh. On 2x1 each device
# packs steps of several candidates in a row; on 4x2 adapters are split, in lockstep.
MESHES = [(8, 1, "tensor", "full"), (4, 2, "replicated", "lora"), (2, 1, "fsdp", None)]


class Writer(toys.Numbers):
    """Also writes ids as text."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(int(x)) for x in ids)


def model(mesh) -> LM:
    """Returns the toy model, on the mesh where there is one."""
    params = toys.params(CONFIG)
    if mesh is not None:
        params = sharding.place(params, sharding.weights(CONFIG, mesh))
    return LM(params, Writer(), CONFIG)


def inner_loop(lm: LM):
    """Yields the adapters and losses of 7 candidates: no multiple of 8 or 4."""
    written = [";".join(toys.text(9, (i, j)) for j in range(1 + i % 3)) for i in range(7)]
    cfg = config.Config(lora=LORA, inner=INNER)
    adapters, losses = inner.adapt_many(lm.params, toys.batch(written, INNER), KEY, cfg)
    yield "losses", losses
    for name, leaf in sharding.fetch({"a": adapters.a, "b": adapters.b}).items():
        yield from ((f"{name}_{target}", value) for target, value in leaf.items())
    # Candidates with 0, 1 and 2 prompts.
    prompts = [
        [[1 + (7 * c + b + i) % 36 for i in range(4)] for b in range(c % 3)] for c in range(7)
    ]
    answers = sampling.decode(lm, prompts, adapters, max_tokens=6)
    flat = [x for rows in answers for row in rows for x in row]
    yield "greedy", np.concatenate([x.tokens for x in flat])
    yield "logprobs", np.concatenate([x.logprobs for x in flat])


def drawing(lm: LM):
    """Yields what is drawn for 5 prompts, 3 samples of each."""
    prompts = [toys.tokens(4, seed=i).tolist() for i in range(5)]
    some = {"samples": 3, "max_tokens": 6, "temperature": 1.0, "top_p": 0.9, "key": KEY}
    rows = sampling.decode(lm, [prompts], **some)[0]
    yield "drawn", np.concatenate([x.tokens for row in rows for x in row])


def finetuning(lm: LM, method: str):
    """Yields the losses of finetuning on 5 rows, 3 at once, and some of the weights."""
    settings = config.Sft(method=method, lora=LORA, batch_size=3, learning_rate=1e-2)
    rows = [(toys.text(4, i), toys.text(5, -i)) for i in range(5)]
    params, losses = outer.finetune(lm, rows, settings, KEY)
    yield f"{method}_losses", losses
    yield from ((f"{method}_{n}", sharding.fetch(params.layers[n])) for n in ("q", "down"))


def main(out: Path) -> None:
    found = {}
    methods = [method for *_, method in MESHES if method]
    for data, model_size, layout, method in [(1, 1, None, None), *MESHES]:
        devices = jax.devices()[: data * model_size]
        mesh = sharding.make(config.Mesh(data, model_size), devices) if layout else None
        lm = readers.ready(model(mesh), config.Mesh(decode=layout or "auto"))
        values = [*inner_loop(lm), *drawing(lm)]
        for own in ([method] if method else []) if layout else methods:
            values += finetuning(lm, own)
        found |= {f"{data}x{model_size}/{name}": value for name, value in values}
    np.savez(out, **found)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main(Path(sys.argv[1]))
