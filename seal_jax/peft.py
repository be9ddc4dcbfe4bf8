"""LoRA adapters in PEFT's format, in and out: adapter_config.json and one safetensors file.

What cannot be honoured is refused by name: an adapter read back acts exactly as it did in PEFT.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from seal_jax import checkpoint, dims, files
from seal_jax import config as config_lib
from seal_jax.errors import SealError
from seal_jax.lora import PROJECTIONS, Adapter, check_single
from seal_jax.params import ModelConfig, table

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that do not change what a trained adapter does; any other must be empty or off.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    # The others change the base weights as well.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def save_peft(adapter: Adapter, folder: str | Path, cfg: config_lib.Config | ModelConfig) -> Path:
    """Writes an adapter that PEFT, vLLM and `load_peft` read; returns its folder.

    The folder appears complete or not at all.

    Args:
      adapter: Of one candidate; `lora.take` picks one of many.
      cfg: `cfg.model.path` is written down as the base model; an architecture names none.

    Raises:
      SealError: for stacked adapters, or where something stands in the folder already.
    """
    folder = Path(folder).expanduser().absolute()
    check_single(adapter)
    model = cfg.model if isinstance(cfg, config_lib.Config) else None
    tensors = {}
    for target, a in adapter.a.items():
        for part, value in (("A", a), ("B", adapter.b[target])):
            for layer, matrix in enumerate(np.asarray(value)):
                # safetensors 0.8 writes wrong data for transposed views, without an error.
                tensors[_name(target, layer, part)] = np.ascontiguousarray(matrix.T)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model and model.path,
        "revision": model and model.revision,
        "r": adapter.rank,
        "lora_alpha": _alpha(adapter),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{target}_proj" for target in adapter.a],
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with files.new_folder(folder) as work:
        safetensors.numpy.save_file(tensors, work / _WEIGHTS, metadata={"format": "pt"})
        (work / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def load_peft(folder: str | Path, cfg: config_lib.Config | ModelConfig) -> Adapter:
    """Returns a folder's adapter, float32.

    Args:
      cfg: Names the base model (`cfg.model`), or is its architecture (`lm.config`).

    Raises:
      SealError: names the setting or tensor that is missing, misshapen or not supported.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise SealError(f"{folder}: no such folder")
    config = cfg
    if isinstance(cfg, config_lib.Config):
        config = checkpoint.read_config(checkpoint.find(cfg.model.path, cfg.model.revision))
    rank, scale, wanted = _settings(folder / _CONFIG)
    tensors = _tensors(folder / _WEIGHTS)
    found = {m[1] for name in tensors if (m := re.search(r"\.(\w+)_proj\.lora_A", name))}
    targets = [t for t in PROJECTIONS if t in found | set(wanted or ())]
    if not targets:
        raise SealError(f"{folder / _WEIGHTS}: no adapted projection is in it")
    size, read = dims.sizes(config), set()

    def stack(target: str, part: str) -> jnp.ndarray:
        into, out = (size[x] for x in PROJECTIONS[target])
        shape = (rank, into) if part == "A" else (out, rank)
        layers = []
        for layer in range(config.n_layers):
            name = _name(target, layer, part)
            read.add(name)
            if name not in tensors:
                raise SealError(f"{folder / _WEIGHTS}: tensor {name!r} is missing")
            value = tensors[name]
            if value.shape != shape:
                raise SealError(
                    f"{folder / _WEIGHTS}: tensor {name!r} has shape {value.shape}, not {shape}"
                )
            layers.append(value.T.astype(np.float32))
        return jnp.asarray(np.stack(layers))

    a = {target: stack(target, "A") for target in targets}
    b = {target: stack(target, "B") for target in targets}
    strange = sorted(set(tensors) - read)
    if strange:
        raise SealError(f"{folder / _WEIGHTS}: tensor {strange[0]!r} is not supported")
    return Adapter(a, b, scale)


def _name(target: str, layer: int, part: str) -> str:
    """Returns the name of a factor: that of the weight it adapts, within PEFT's wrapping."""
    base = _SOURCES[target].format(l=layer).removesuffix(".weight")
    return f"{_PREFIX}{base}.lora_{part}.weight"


_SOURCES = {
    name: weight.source
    for name, weight in table(ModelConfig(1, 1, 1, 1, 1, 1, 1)).items()
    if name in PROJECTIONS
}


def _alpha(adapter: Adapter) -> float:
    """Returns the alpha that gives back the scale exactly when divided by the rank."""
    near = adapter.scale * adapter.rank
    options = (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, 0))
    return next((x for x in options if x / adapter.rank == adapter.scale), near)


def _settings(file: Path) -> tuple[int, float, list[str] | None]:
    """Returns rank, scale and the targets, where they are a list of names."""
    raw = files.read_settings(file)
    for key, value in raw.items():
        allowed = _ALLOWED.get(key, (None, False))
        # By type as well: layer 0 is not "no layers".
        off = key not in _ALLOWED and value in ([], {})
        if key in _HARMLESS or off or any(type(value) is type(x) and value == x for x in allowed):
            continue
        raise SealError(f"{file}: {key}={value!r} is not supported")
    rank, alpha, modules = (raw.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SealError(f"{file}: r={rank!r} is no rank")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SealError(f"{file}: lora_alpha={alpha!r} is no number")
    if not isinstance(modules, list):  # a pattern, or "all-linear": the tensors tell
        return rank, alpha / rank, None
    targets = []
    for module in modules:
        target = str(module).rpartition(".")[2].removesuffix("_proj")
        if target not in PROJECTIONS or not str(module).endswith("_proj"):
            raise SealError(f"{file}: target module {module!r} is not supported")
        targets.append(target)
    return rank, alpha / rank, targets


def _tensors(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file() and file.with_suffix(".bin").is_file():
        raise SealError(f"{file.with_suffix('.bin')}: only safetensors are read")
    try:
        tensors = safetensors.numpy.load_file(file)
    except (OSError, safetensors.SafetensorError, AttributeError) as error:
        raise SealError(f"{file}: not readable as safetensors: {error}") from error
    for name, value in tensors.items():
        if value.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise SealError(f"{file}: tensor {name!r} has type {value.dtype}")
    return tensors
