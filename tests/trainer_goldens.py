"""The reference's trainer runs (`ki_goldens/trainer_numeric`), replayed by our inner loop.

Weights, adapters and settings go the way a user's do: through Hugging Face and PEFT folders.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
import shared_data

from seal_jax import checkpoint, inner, lora, model, peft
from seal_jax.config import Config, Inner, Model
from seal_jax.slots import Slots

_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_SCHEDULES = {"constant_with_warmup": "constant"}


class Replay(NamedTuple):
    """Ours and theirs, per step where there are several."""

    loss: tuple[np.ndarray, np.ndarray]
    grad_norm: tuple[np.ndarray, np.ndarray]
    learning_rate: tuple[np.ndarray, np.ndarray]
    divisors: tuple[list[int], list[int]]
    final: tuple[lora.Adapter, lora.Adapter]
    logits: tuple[np.ndarray, np.ndarray]


def names() -> list[str]:
    """Returns the runs there are."""
    root = shared_data.folder()
    found = sorted((root / "ki_goldens/trainer_numeric").glob("*.npz")) if root else []
    return [file.stem for file in found]


def replay(name: str, work: Path) -> Replay:
    """Returns what our trainer makes of a recorded run.

    Args:
      work: An empty folder for the model and the adapters.
    """
    golden = shared_data.read(f"ki_goldens/trainer_numeric/{name}.json")
    arrays = np.load(shared_data.path(f"ki_goldens/trainer_numeric/{name}.npz"))
    cfg = _base(golden, arrays, work / "base")
    params = checkpoint.read_params(
        Path(cfg.model.path), checkpoint.read_config(Path(cfg.model.path))
    )
    start, final = (
        peft.load_peft(_adapter(golden, arrays, part, work / part), cfg)
        for part in ("lora_init", "lora_final")
    )
    arguments = golden["training_arguments"]
    steps = _steps(golden)
    slots = _slots(golden["rows"], [sum(step, []) for step in steps], arguments["learning_rate"])
    settings = _settings(arguments, len(steps))
    adapt = jax.jit(lambda p, a, s: inner.adapt(p, a, s, settings))
    ours, measures = adapt(params, start, slots)
    history = [entry for entry in golden["log_history"] if "grad_norm" in entry]
    theirs = lambda key: np.array([entry[key] for entry in history])
    micro = golden.get("micro_losses")
    count = [len(step) for step in steps]
    at = np.cumsum([0, *count])
    loss, divisors = theirs("loss"), []
    if micro:  # the log rounds to four decimals, these do not
        parts = [micro[a:b] for a, b in zip(at[:-1], at[1:], strict=True)]
        loss = np.array([sum(x["micro_loss_scaled"] for x in part) for part in parts])
        divisors = [part[0]["num_items_in_batch"] for part in parts]
    tokens_t, _, segments_t = _row(golden["rows"][0])
    forward = jax.jit(lambda p, a, x, s: model.forward(p, a, x, segments_bt=s))
    logits = forward(params, ours, tokens_t[None], segments_t[None])
    return Replay(
        loss=(np.asarray(measures.loss), loss),
        grad_norm=(np.asarray(measures.grad_norm), theirs("grad_norm")),
        learning_rate=(np.asarray(measures.learning_rate), theirs("learning_rate")),
        divisors=([int(x.sum()) for x in slots.weights[0]], divisors),
        final=(ours, final),
        logits=(np.asarray(logits[0]), arrays["logits_row0_after"]),
    )


def _base(golden: dict[str, Any], arrays, folder: Path) -> Config:
    folder.mkdir(parents=True)
    raw = golden["config"] | {"architectures": [_ARCHITECTURES[golden["model_type"]]]}
    (folder / "config.json").write_text(json.dumps(raw))
    _save(arrays, "base/", folder / "model.safetensors")
    return Config(model=Model(path=str(folder)))


def _adapter(golden: dict[str, Any], arrays, part: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    recorded = golden["lora"]
    raw = {key: value for key, value in recorded.items() if key != "resolved_target_modules"}
    raw |= {"peft_type": "LORA", "target_modules": recorded["resolved_target_modules"]}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    _save(arrays, f"{part}/", folder / "adapter_model.safetensors")
    return folder


def _save(arrays, prefix: str, file: Path) -> None:
    tensors = {
        name.removeprefix(prefix).replace(".default.", "."): np.ascontiguousarray(arrays[name])
        for name in arrays.files
        if name.startswith(prefix)
    }
    safetensors.numpy.save_file(tensors, file)


def _steps(golden: dict[str, Any]) -> list[list[list[int]]]:
    """Returns the micro batches (row numbers) of each optimizer step; none spans two epochs."""
    arguments = golden["training_arguments"]
    order = golden["micro_batch_order (row indices per micro batch)"]
    epochs = int(arguments["num_train_epochs"])
    size = arguments.get("gradient_accumulation_steps", 1)
    per_epoch = len(order) // epochs
    steps = []
    for start in range(0, len(order), per_epoch):
        micro = order[start : start + per_epoch]
        steps += [micro[i : i + size] for i in range(0, per_epoch, size)]
    return steps


def _settings(arguments: dict[str, Any], steps: int) -> Inner:
    """Returns our settings of a run; Trainer's defaults where it names none."""
    for key, value in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
        assert arguments.get(key, value) == value, f"{key} is not what seal_jax uses"
    kind = arguments.get("lr_scheduler_type", "linear")
    warmup = arguments.get("warmup_steps") or int(
        np.ceil(arguments.get("warmup_ratio", 0.0) * steps)
    )
    return Inner(
        schedule=_SCHEDULES.get(kind, kind),
        warmup_steps=warmup,
        weight_decay=arguments.get("weight_decay", 0.0),
        clip=arguments.get("max_grad_norm", 1.0),
    )


def _row(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, weights and segments; padding that is trained on is of segment -1."""
    ids = np.asarray(row["input_ids"])
    labels = np.asarray(row["labels"])
    mask = np.asarray(row.get("attention_mask", np.ones_like(ids)))
    assert ((labels == ids) | (labels == -100)).all()
    return ids, labels != -100, np.where(mask == 1, 1, -1)


def _slots(rows: list[dict[str, Any]], steps: list[list[int]], rate: float) -> Slots:
    """Returns one candidate's arrays: step i is slot i."""
    width = max(len(row["input_ids"]) for row in rows)
    shape = (len(steps), max(map(len, steps)), width)
    tokens, weights, segments = np.zeros((3, *shape), np.int32)
    for i, step in enumerate(steps):
        for b, number in enumerate(step):
            ids, counts, own = _row(rows[number])
            place = (i, b, slice(0, len(ids)))
            tokens[place], weights[place], segments[place] = ids, counts, own
    n = len(steps)
    return Slots(
        tokens=(tokens,),
        weights=(weights,),
        segments=(segments,),
        bucket_i=np.zeros(n, np.int32),
        row_i=np.arange(n, dtype=np.int32),
        active_ci=np.ones(n, bool),
        visits=np.int32(n),
        learning_rate_c=np.float32(rate),
        total_c=np.int32(n),
    )
