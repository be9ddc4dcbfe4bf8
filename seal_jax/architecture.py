"""The architecture in a model folder's config.json, in and out."""

import math
from pathlib import Path
from typing import Any

from seal_jax import files
from seal_jax.errors import SealError
from seal_jax.params import ModelConfig, Params, RopeScaling

_FAMILIES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}


def _qwen(d: int, l: int, n: int, k: int, f: int, tied: bool, v: int = 151936) -> ModelConfig:
    """Returns a Qwen2.5 of these sizes."""
    sizes = dict(vocab_size=v, d_model=d, n_layers=l, n_heads=n, n_kv_heads=k, d_head=d // n)
    return ModelConfig(**sizes, d_ff=f, tied=tied, qkv_bias=True, rope_theta=1e6)


def _llama(d: int, l: int, n: int, h: int) -> ModelConfig:
    """Returns a small Llama 3.2 of these sizes."""
    sizes = dict(vocab_size=128256, d_model=d, n_layers=l, n_heads=n, n_kv_heads=8, d_head=h)
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    return ModelConfig(
        **sizes,
        d_ff=8192,
        tied=True,
        rope_theta=5e5,
        rope_scaling=scaling,
        rms_eps=1e-5,
        family="llama",
    )


# Architectures by hub id, for plans where the model itself is not at hand.
PUBLIC = {
    "Qwen/Qwen2.5-0.5B": _qwen(896, 24, 14, 2, 4864, True),
    "Qwen/Qwen2.5-1.5B": _qwen(1536, 28, 12, 2, 8960, True),
    "Qwen/Qwen2.5-3B": _qwen(2048, 36, 16, 2, 11008, True),
    "Qwen/Qwen2.5-7B": _qwen(3584, 28, 28, 4, 18944, False, 152064),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 64),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 128),
}


def known(path: str) -> ModelConfig | None:
    """Returns the architecture of a public model, instruction-tuned or not, or None."""
    return PUBLIC.get(path.removesuffix("-Instruct"))


def find(path: str, revision: str | None = None) -> ModelConfig:
    """Returns the architecture of a folder, a public model by its id, or what the hub has."""
    folder = Path(path).expanduser()
    if not folder.exists() and known(path) is not None:
        return known(path)
    from seal_jax import checkpoint  # which reads architectures itself

    return read_config(checkpoint.find(path, revision, weights=False))


def read_config(folder: Path) -> ModelConfig:
    """Returns the architecture in config.json, in transformers 4's or 5's spelling.

    Raises:
      SealError: for another architecture, or a setting that would change the numbers unnoticed.
    """
    file = folder / "config.json"
    raw = files.read_settings(file)
    names = raw.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    family = next((_FAMILIES[n] for n in map(str, names) if n in _FAMILIES), None)
    if family is None:
        expected = ", ".join(_FAMILIES)
        raise SealError(f"{file}: architecture {names or 'unnamed'} is not one of {expected}")
    _refuse(raw, file)
    try:
        d, n = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
        config = ModelConfig(
            vocab_size=_size(raw, "vocab_size"),
            d_model=d,
            n_layers=_size(raw, "num_hidden_layers"),
            n_heads=n,
            n_kv_heads=_size(raw, "num_key_value_heads", n),
            d_head=_size(raw, "head_dim", 128 if family == "qwen3" else d // n),
            d_ff=_size(raw, "intermediate_size"),
            rms_eps=_number(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            family=family,
            max_positions=_size(raw, "max_position_embeddings", ModelConfig.max_positions),
            **_rope(raw, file),
            **_ends(raw, folder),
        )
    except KeyError as error:
        raise SealError(f"{file}: no key {error.args[0]!r}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise error if isinstance(error, SealError) else SealError(f"{file}: {error}") from error
    if config.n_heads % config.n_kv_heads:
        raise SealError(
            f"{file}: num_attention_heads={n} is no multiple of num_key_value_heads="
            f"{config.n_kv_heads}"
        )
    return config


def _size(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    size = raw[key] if default is None else raw.get(key)
    size = default if size is None else size
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 31:
        raise ValueError(f"{key}={size!r} is no size")
    return size


def _number(value: Any, key: str) -> float:
    """Returns a number above 0."""
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{key}={value!r} is not a number above 0")
    return number


def _refuse(raw: dict[str, Any], file: Path) -> None:
    """Raises for settings that this implementation does not honour."""
    harmless: dict[str, tuple[Any, ...]] = {
        "hidden_act": (None, "silu"),
        "use_sliding_window": (None, False),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "quantization_config": (None,),
        "partial_rotary_factor": (None, 1, 1.0),
    }
    for key, values in harmless.items():
        if raw.get(key) not in values:
            raise SealError(f"{file}: {key}={raw[key]!r} is not supported")
    if "sliding_attention" in str(raw.get("layer_types")):
        raise SealError(f"{file}: layer_types has sliding_attention, which is not supported")


def _rope(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if old and new and old != new:  # transformers 5 would forget the theta of the new ones
        raise SealError(f"{file}: rope_scaling and rope_parameters differ; only one can hold")
    scaling = new or old
    if not isinstance(scaling, dict) or any(isinstance(x, dict) for x in scaling.values()):
        raise SealError(f"{file}: rope_scaling={scaling!r} is not supported")
    _refuse(scaling, file)  # partial_rotary_factor may stand here
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    theta = _number(theta, "rope_theta")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise SealError(f"{file}: rope type {kind!r} is not supported (default, llama3)")
    values = {name: _number(scaling[name], name) for name in RopeScaling._fields}
    values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**values)}


def _ends(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the ids that end a generation (generation_config.json knows best) or open a text."""
    generation = folder / "generation_config.json"
    better = files.read_settings(generation) if generation.is_file() else {}
    ends: list[int] = []
    for source in (better, raw):
        value = source.get("eos_token_id")
        ends += value if isinstance(value, list) else [] if value is None else [value]
    found = dict.fromkeys(_token(end, "eos_token_id") for end in ends)
    return {
        "eos_ids": tuple(end for end in found if end is not None),
        "bos_id": _token(raw.get("bos_token_id"), "bos_token_id"),
    }


def _token(value: Any, key: str) -> int | None:
    """Returns a token id, or None for none, which is written as -1 too."""
    if value is None:
        return None
    if not isinstance(value, int) or value >= 1 << 31:
        raise ValueError(f"{key}={value!r} is no token")
    return value if value >= 0 else None


def write_config(config: ModelConfig, params: Params) -> dict[str, Any]:
    """Returns config.json in transformers 4's spelling, which version 5 reads as well."""
    name = next(k for k, v in _FAMILIES.items() if v == config.family)
    scaling = config.rope_scaling
    ends = list(config.eos_ids)
    return {
        "architectures": [name],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **scaling._asdict()},
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(params.embed.dtype),
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "bos_token_id": config.bos_id,
    }
