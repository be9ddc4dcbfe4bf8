"""Run as its own process with 8 devices: prints what the loops give on a mesh, as numpy arrays.

Usage: python mesh.py OUT.npz DATA MODEL
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import dataclasses  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import toys  # noqa: E402

from seal_jax import config, inner, outer, runtime, sampling, sharding  # noqa: E402
from seal_jax import slots as slots_lib  # noqa: E402
from seal_jax.checkpoint import LM  # noqa: E402

CONFIG = toys.config("qwen2", n_heads=4, n_kv_heads=2, d_model=16, d_ff=32, vocab_size=40, n_layers=1)
LORA = config.Lora(rank=3, alpha=6.0, targets=config.ALL_TARGETS)
INNER = config.Inner(learning_rate=2e-2, epochs=3, chunk=5)
KEY = jax.random.key(5)


class Decoder(toys.Numbers):
    """Also writes ids as text."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(int(x)) for x in ids)


def model(mesh) -> LM:
    params = toys.params(CONFIG)
    if mesh is not None:
        params = sharding.place(params, sharding.weights(CONFIG, mesh))
    return LM(params, Decoder(), CONFIG)


def values(mesh, decode="auto") -> dict[str, np.ndarray]:
    """Returns what each loop comes to."""
    lm = model(mesh)
    cfg = config.Config(lora=LORA, inner=INNER)
    written = [
        ";".join(toys.text(3 + (3 * i + j) % 7, (i, j)) for j in range(1 + i % 3)) for i in range(7)
    ]
    adapters, losses = inner.adapt_many(lm.params, toys.batch(written, INNER), KEY, cfg)
    out = {"losses": losses}
    out |= {f"a_{k}": v for k, v in sharding.fetch(adapters).a.items()}
    lm = sampling.ready(lm, config.Mesh(decode=decode))
    prompts = [[[1 + (7 * c + b + i) % 36 for i in range(4 + b)] for b in range(c % 3)] for c in range(7)]
    answers = sampling.decode(lm, prompts, adapters, max_tokens=6)
    flat = [x for rows in answers for row in rows for x in row]
    out["greedy"] = np.concatenate([x.tokens for x in flat])
    out["greedy_logprobs"] = np.concatenate([x.logprobs for x in flat])
    drawn = sampling.decode(
        lm, [prompts[2] + prompts[5]], samples=3, max_tokens=7, temperature=1.0, key=KEY
    )[0]
    out["drawn"] = np.concatenate([x.tokens for row in drawn for x in row])
    rows = [(toys.text(4, i), toys.text(3 + i, -i)) for i in range(5)]
    for method in ("lora", "full"):
        settings = config.Sft(method=method, lora=LORA, batch_size=3, learning_rate=1e-2)
        trained, own = outer.finetune(lm, rows, settings, KEY)
        out[f"{method}_losses"] = own
        out |= {f"{method}_{k}": v for k, v in sharding.fetch(trained.layers).items()}
    return out


if __name__ == "__main__":
    runtime.keep_compiled()
    jax.config.update("jax_disable_most_optimizations", True)
    import time
    t = time.time()
    base = values(None)
    print("one", time.time() - t)
    for d, m in ((4, 2), (8, 1)):
        for decode in ("fsdp",):
            t = time.time()
            got = values(sharding.make(config.Mesh(d, m)), decode)
            print(d, m, decode, time.time() - t)
            for k in base:
                if base[k].shape != got[k].shape: print("SHAPE", k, base[k].shape, got[k].shape); continue
                print(k, np.nanmax(np.abs(base[k] - got[k]))) if np.nanmax(np.abs(base[k] - got[k]))>1e-5 else None
