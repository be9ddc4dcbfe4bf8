"""Peak host memory of loading a big model: `python benchmarks/loading.py [--gib 8]`.

Writes a random bfloat16 checkpoint at the width of Qwen2.5-7B, one file a layer, loads it in a
process of its own onto eight virtual CPU devices, each weight cut in eight, and watches that
process's anonymous memory. Device memory is host memory here: the law is peak <= the model + the
largest stacked weight. Loading all files and then stacking would take twice the model.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from seal_jax import architecture
from seal_jax import params as params_lib
from seal_jax.params import ModelConfig

RESULT = Path(__file__).parent / "results" / "loading.json"
WIDE = ModelConfig(
    vocab_size=152064,
    d_model=3584,
    n_layers=28,
    n_heads=28,
    n_kv_heads=4,
    d_head=128,
    d_ff=18944,
    qkv_bias=True,
    eos_ids=(151643,),
)
DEVICES = 8
_LOAD = """
import sys, time, jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from seal_jax import architecture, checkpoint
from seal_jax import params as params_lib

folder, devices = Path(sys.argv[1]), np.array(jax.devices())
mesh = Mesh(devices, ("data",))

def cut(name, weight, shape):
    fits = [i for i, size in enumerate(shape) if size % len(devices) == 0 and weight.dims[i] != "l"]
    axes = [None] * len(shape)
    if fits:
        axes[fits[0]] = "data"
    return NamedSharding(mesh, PartitionSpec(*axes))

config = architecture.read_config(folder)
shardings = params_lib.build(config, cut)
jax.device_put(np.zeros(8), NamedSharding(mesh, PartitionSpec())).block_until_ready()
print("ready", flush=True)
sys.stdin.readline()
start = time.monotonic()
params = checkpoint.read_params(folder, config, jnp.bfloat16, shardings)
jax.block_until_ready(params)
print("seconds", time.monotonic() - start, flush=True)
sys.stdin.readline()
for name in ("embed", "down", "q"):
    value = params_lib.of(params, name)
    assert len(value.addressable_shards) == len(devices)
    weight = params_lib.table(config)[name]
    file = "model-layer-0.safetensors" if weight.dims[0] == "l" else "model-top.safetensors"
    import safetensors.numpy
    stored = safetensors.numpy.load_file(folder / file)[weight.source.format(l=0)]
    mine = np.asarray(value[0] if weight.dims[0] == "l" else value)
    assert (mine == (stored.T if weight.transposed else stored)).all(), name
print("equal", flush=True)
"""


def write(folder: Path, config: ModelConfig, seed: int = 0) -> dict[str, int]:
    """Writes a random checkpoint, a file at a time; returns bytes of it and of its largest part."""
    rng = np.random.default_rng(seed)
    size = params_lib.shapes(config, ml_dtypes.bfloat16)
    index: dict[str, str] = {}
    names: dict[str, list] = {}
    for name, weight in params_lib.table(config).items():
        shape = params_lib.of(size, name).shape
        layered = weight.dims[0] == "l"
        stored = shape[1:] if layered else shape
        for layer in range(config.n_layers) if layered else [None]:
            file = "model-top.safetensors" if layer is None else f"model-layer-{layer}.safetensors"
            key = weight.source.format(l=layer)
            names.setdefault(file, []).append((key, stored[::-1] if weight.transposed else stored))
            index[key] = file
    for file, entries in names.items():
        # Any bits below 0x4000 are a number in [0, 2).
        bits = {key: rng.integers(0, 0x4000, shape, np.uint16) for key, shape in entries}
        tensors = {key: value.view(ml_dtypes.bfloat16) for key, value in bits.items()}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    raw = architecture.write_config(config, size)
    (folder / "config.json").write_text(json.dumps(raw))
    bytes_of = [2 * math.prod(params_lib.of(size, name).shape) for name in params_lib.table(config)]
    return {"model": sum(bytes_of), "largest": max(bytes_of)}


def anonymous(pid: int) -> int:
    """Returns the bytes of memory a process holds that are not backed by a file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def watch(folder: Path) -> dict[str, float]:
    """Returns bytes before loading and at the peak, and the seconds it took, in a new process."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", _LOAD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    if child.stdout.readline() != "ready\n":
        raise SystemExit("the loading process failed")
    before = peak = anonymous(child.pid)
    os.set_blocking(child.stdout.fileno(), False)
    child.stdin.write("go\n")
    child.stdin.flush()
    seconds = ""
    while child.poll() is None and not seconds:
        peak = max(peak, anonymous(child.pid))
        seconds = child.stdout.readline()
        time.sleep(0.002)
    os.set_blocking(child.stdout.fileno(), True)
    out, _ = child.communicate("go\n")
    if child.returncode or out != "equal\n":
        raise SystemExit("the loading process failed")
    return {"before": before, "peak": peak - before, "seconds": float(seconds.split()[1])}


def measure(config: ModelConfig) -> dict[str, float]:
    """Returns what writing and loading a model of this architecture takes; leaves no files."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = write(Path(folder), config)
        return {**sizes, **watch(Path(folder)), "layers": config.n_layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    deep = lambda n: params_lib.shapes(dataclasses.replace(WIDE, n_layers=n))
    whole = lambda n: sum(2 * math.prod(x.shape) for x in jax.tree.leaves(deep(n)))
    layers = max(1, round((chosen.gib * 2**30 - whole(0)) / (whole(1) - whole(0))))
    found = measure(dataclasses.replace(WIDE, n_layers=layers))
    found["bound"] = found["model"] + found["largest"]
    found["within"] = found["peak"] <= found["bound"]
    gib = {k: round(found[k] / 2**30, 3) for k in ("model", "largest", "bound", "peak")}
    record = {
        "command": f"python benchmarks/loading.py --gib {chosen.gib:g}",
        "devices": DEVICES,
        "layers": layers,
        "gib": gib,
        "peak_over_model": round(found["peak"] / found["model"], 3),
        "within_bound": found["within"],
        "seconds": round(found["seconds"], 1),
    }
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
