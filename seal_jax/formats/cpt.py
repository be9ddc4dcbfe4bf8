"""Results of training on many passages at once (continued pretraining)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seal_jax.evals.inner_loop import Reply, Request
from seal_jax.formats import files, results, wire


def overall(content: Mapping[str, Any]) -> dict[str, float]:
    """Returns the `overall` block that the verdicts in a reply of the reference give."""
    before, after = content["baseline_correct"], content["adapter_correct"]
    return {
        "baseline_accuracy": results.accuracy(before),
        "adapter_accuracy": results.accuracy(after),
        "gain": results.gain(before, after),
    }


def result(
    request: Request,
    reply: Reply,
    *,
    dataset: str,
    n_articles: int,
    k: int,
    split_newlines: bool,
    lora: Mapping[str, float],
) -> dict[str, Any]:
    """Returns the content of a result file.

    As in the reference, `per_article` is keyed by title, and the last of several passages of one
    title stays. Its verdicts are those of the passage's own questions, however few were asked
    and in whatever order.
    """
    passages: dict[str, tuple[str, dict[str, list[bool]]]] = {}
    answered = zip(request.asked, reply.baseline_correct, reply.adapter_correct, strict=True)
    for item, before, after in answered:
        title, verdicts = passages.setdefault(
            item.context.id,
            (item.context.title, {"baseline_correct": [], "adapter_correct": []}),
        )
        verdicts["baseline_correct"].append(before)
        verdicts["adapter_correct"].append(after)
    content = wire.reply(reply)
    return {
        "overall": overall(content),
        "dataset": dataset,
        "n_articles": n_articles,
        "k_completions": k,
        "split_newlines": split_newlines,
        "lora_params": dict(lora),
        "per_article": dict(passages.values()),
        "train_sequences": len(request.texts),
        "eval_questions": len(request.asked),
        "server_reply": content,
    }


def read(path: str | Path) -> dict[str, Any]:
    """Returns a result file's content, checked as far as we rely on it."""
    content = files.read_json(path)
    files.need(content, "overall", dict, str(path))
    wire.read_reply(files.need(content, "server_reply", dict, str(path)), f"{path}: server_reply")
    return content


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a result file in the reference's layout."""
    files.write_json(path, content)
