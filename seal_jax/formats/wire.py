"""One inner loop as the reference's servers exchange it: request and reply as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.evals.inner_loop import Asked, Reply, Request
from seal_jax.formats import files, results
from seal_jax.tasks import grading


def request(made: Request) -> dict[str, Any]:
    """Returns what a request trains on and asks, without settings."""
    return {
        "train_sequences": list(made.texts),
        "eval_questions": [_question(item) for item in made.asked],
    }


def settings(
    lora: Mapping[str, float], end_mask_substring: str = "", skip_training: bool | None = None
) -> dict[str, Any]:
    """Returns the settings that follow in a request.

    Args:
      lora: As `results.lora_params` makes it.
      end_mask_substring: No loss up to the end of its first occurrence (`labels.end_mask`).
      skip_training: Left out if None, as the single-passage driver does.
    """
    made = {
        "lora_rank": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "finetune_epochs": lora["epochs"],
        "finetune_lr": lora["lr"],
        "batch_size": lora["batch_size"],
        "gradient_accumulation_steps": lora["grad_accum_steps"],
        "end_mask_substring": end_mask_substring,
    }
    return made if skip_training is None else made | {"skip_training": skip_training}


def read_settings(content: Mapping[str, Any]) -> tuple[config.Lora, config.Inner]:
    """Returns a request's settings; what it does not say is the reference's default, and ours.

    Accumulated batches are one batch for us. What we do not do is refused: dropout, a loss that
    begins behind a text, no training.
    """
    for key in ("end_mask_substring", "skip_training"):
        if content.get(key):
            raise SealError(f"{key}={content[key]!r}: not supported")
    if content.get("lora_dropout", 0):
        raise SealError(f"lora_dropout={content['lora_dropout']}: training has no dropout")
    lora, inner = config.Lora(), config.Inner()
    batch = content.get("batch_size", 1) * content.get("gradient_accumulation_steps", 1)
    return (
        config.Lora(
            rank=content.get("lora_rank", lora.rank),
            alpha=float(content.get("lora_alpha", lora.alpha)),
        ),
        config.Inner(
            learning_rate=content.get("finetune_lr", inner.learning_rate),
            epochs=content.get("finetune_epochs", inner.epochs),
            batch_size=batch,
        ),
    )


def reply(made: Reply) -> dict[str, Any]:
    """Returns a reply with the accuracies and gains that the reference adds."""
    before, after = made.baseline_correct, made.adapter_correct
    return {
        "baseline_accuracy": results.accuracy(before),
        "adapter_accuracy": results.accuracy(after),
        "adapter_gain": results.gain(before, after),
        "baseline_texts": list(made.baseline_texts),
        "adapter_texts": list(made.adapter_texts),
        "baseline_correct": list(before),
        "adapter_correct": list(after),
        "gains": [int(a) - int(b) for b, a in zip(before, after, strict=True)],
    }


def read_reply(content: Mapping[str, Any], where: str = "reply") -> Reply:
    """Returns a reply of the reference; an error it reports is raised."""
    if "error" in content:
        raise SealError(f"{where}: the inner loop failed: {content['error']}")
    fields: Sequence[list[Any]] = [files.need(content, key, list, where) for key in Reply._fields]
    if len({len(values) for values in fields}) != 1:
        raise SealError(f"{where}: answers and verdicts differ in number")
    return Reply(*(tuple(values) for values in fields))


def _question(item: Asked) -> dict[str, str]:
    return {
        "title": item.context.title,
        "context": item.context.passage,
        "question": grading.topic(item.context.title, item.question.text),
        "answer": item.question.gold,
    }
