"""ReST-EM's training set: the best self-edits of each passage, `{"prompt", "completion"}` lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seal_jax.formats import files


def rows(result: Mapping[str, Any], k: int = 1) -> list[dict[str, str]]:
    """Returns the rows of a result file's `k` best self-edits for each passage.

    Best is the highest mean accuracy, the first of equals. Blank self-edits compete and are then
    left out, so a passage may give fewer rows than `k`, or none.
    """
    made = []
    for i, article in enumerate(result["articles"]):
        best = sorted(article["completions"], key=lambda entry: -entry["stats"]["adapter_mean"])
        texts = [entry["text"].strip() for entry in best[:k]]
        prompt = files.need(article, "prompt", str, f"article {i}")
        made += [{"prompt": prompt, "completion": text} for text in texts if text]
    return made


def file_name(result: Mapping[str, Any], k: int = 1) -> str:
    """Returns what the reference calls the file: `sft_best1of5_0508_015401.jsonl`.

    The 5 are the first passage's self-edits; others may have fewer or more.
    """
    count = len(result["articles"][0]["completions"]) if result["articles"] else 0
    return f"sft_best{k}of{count}_{files.need(result, 'timestamp', str, 'result file')}.jsonl"


def text(made: Sequence[Mapping[str, str]]) -> str:
    """Returns rows as the reference's lines, to the byte."""
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in made)


def write(path: str | Path, made: Sequence[Mapping[str, str]]) -> None:
    """Writes rows as a file of lines."""
    files.write_text(path, text(made))
