"""Data sets with completions: SEAL's entries, each with the self-edits written for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.formats import files
from seal_jax.tasks import Context


def prompts(asked: Sequence[str], k: int) -> list[str]:
    """Returns what to generate from: each prompt `k` times in a row."""
    return [prompt for prompt in asked for _ in range(k)]


def entries(
    contexts: Sequence[Context], asked: Sequence[str], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the data set: contexts in SEAL's format with their stripped self-edits and prompt.

    What else an entry said stays, as in the reference; self-edits it had are replaced.

    Args:
      asked: The prompt of each context.
      texts: What `prompts(asked, k)` gave, in its order.

    Raises:
      SealError: a self-edit is blank, or some are missing, as the reference refuses both.
    """
    k, rest = divmod(len(texts), len(contexts)) if contexts else (0, len(texts))
    if rest or len(asked) != len(contexts):
        raise SealError(f"{len(texts)} self-edits do not divide among {len(contexts)} passages")
    made = []
    for i, (context, prompt) in enumerate(zip(contexts, asked, strict=True)):
        completions = [text.strip() for text in texts[i * k : (i + 1) * k]]
        if "" in completions:
            raise SealError(f"passage {i}: self-edit {completions.index('')} is blank")
        rest = context.data if isinstance(context.data, dict) else {}
        made.append({**entry(context), **rest, "completions": completions, "prompt": prompt})
    return made


def entry(context: Context) -> dict[str, Any]:
    """Returns a context in SEAL's format."""
    asked = [{"question": q.text, "answer": q.gold} for q in context.questions]
    return {"title": context.title, "context": context.passage, "questions": asked}


def meta(
    model: str,
    dataset_in: str,
    dataset_out: str,
    sampling: config.Sampling,
    n: int,
    timestamp: str,
) -> dict[str, Any]:
    """Returns the settings that the reference writes beside a data set, as `FILE.meta`."""
    return {
        "model": model,
        "dataset_in": dataset_in,
        "dataset_out": dataset_out,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "n": n,
        "k": sampling.n,
        "timestamp": timestamp,
    }


def write(path: str | Path, made: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Writes a data set and its `.meta`."""
    files.write_json(path, list(made))
    files.write_json(f"{path}.meta", about)
