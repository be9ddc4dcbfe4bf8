"""Reads passages with questions: SEAL's JSON, SQuAD's own JSON, and data sets on the hub."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from seal_jax.errors import SealError
from seal_jax.formats.files import need, read_json, read_lines
from seal_jax.tasks import Context, Question


def load(path_or_hub_id: str | Path) -> list[Context]:
    """Returns the passages of a file or data set, in its order.

    A context's `data` holds what else its entry says, such as `completions` and `prompt`.

    Args:
      path_or_hub_id: A JSON file (also .gz): a list of `{"title", "context", "questions":
        [{"question", "answer"}]}` or one of them, SEAL's format, or SQuAD's `{"data": [{"title",
        "paragraphs": [{"context", "qas"}]}]}`. A .jsonl file (also .gz), one row for each passage
        (SEAL's) or question (SQuAD's). Or what `datasets` reads, of such rows: a .parquet file, a
        folder, or a hub id such as `rajpurkar/squad`, with `:SPLIT` after it for another split than
        train.

    Raises:
      SealError: names the file and the entry.
    """
    name = os.path.expanduser(path_or_hub_id)
    path = Path(name)
    plain = name.removesuffix(".gz")
    if path.is_file() and plain.endswith((".json", ".jsonl")):
        # Lines are not for `datasets`: it makes times of texts that are all dates.
        content = read_lines(path) if plain.endswith(".jsonl") else read_json(path)
        squad = isinstance(content, dict) and isinstance(content.get("data"), list)
        entries = _articles(content["data"], name) if squad else content
        if isinstance(entries, dict) and "context" in entries:
            entries = [entries]  # one passage
        elif isinstance(entries, list) and _is_row(entries[:1]):
            entries = _group(entries, name)
    else:
        rows = [dict(row) for row in _rows(name)]
        entries = rows if rows and "questions" in rows[0] else _group(rows, name)
    if not isinstance(entries, list):
        raise SealError(f"{name}: expected a list of passages or SQuAD's {{'data': [...]}}")
    if not entries:
        raise SealError(f"{name}: holds no passage")
    return from_entries(entries, name)


def from_entries(entries: list[Any], origin: str) -> list[Context]:
    """Returns the contexts of entries in SEAL's format.

    Args:
      origin: The file, for error messages.

    Raises:
      SealError: names the entry and what it lacks.
    """
    contexts, seen = [], {}
    for i, entry in enumerate(entries):
        where = f"{origin}: entry {i}"
        title, passage = need(entry, "title", str, where), need(entry, "context", str, where)
        if not passage.strip():
            raise SealError(f"{where}: the context is blank")
        asked = need(entry, "questions", list, where)
        questions = []
        for j, item in enumerate(asked):
            spot = f"{where}, question {j}"
            text, gold = need(item, "question", str, spot), need(item, "answer", str, spot)
            questions.append(Question(prompt="", gold=gold, text=text))
        name = context_id(title, passage)
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name += f"-{seen[name]}"
        rest = {k: v for k, v in entry.items() if k not in ("title", "context", "questions")}
        contexts.append(Context(name, title, passage, tuple(questions), rest))
    return contexts


def context_id(title: str, passage: str) -> str:
    """Returns the name of a passage: the same wherever and in whatever order it is read."""
    return hashlib.sha256(f"{title}\0{passage}".encode()).hexdigest()[:12]


def _articles(data: list[Any], origin: str) -> list[dict[str, Any]]:
    """Returns SQuAD's nested articles as entries in SEAL's format, equal paragraphs as one."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for i, article in enumerate(data):
        where = f"{origin}: article {i}"
        title = need(article, "title", str, where).replace("_", " ")
        for j, paragraph in enumerate(need(article, "paragraphs", list, where)):
            spot = f"{where}, paragraph {j}"
            context = need(paragraph, "context", str, spot)
            entry = {"title": title, "context": context, "questions": []}
            questions = entries.setdefault((title, context), entry)["questions"]
            for k, qa in enumerate(need(paragraph, "qas", list, spot)):
                at = f"{spot}, question {k}"
                if isinstance(qa, dict) and qa.get("is_impossible"):
                    continue  # SQuAD 2.0: a question without an answer cannot be graded
                answers = need(qa, "answers", list, at)
                if not answers or not isinstance(answers[0], dict):
                    raise SealError(f"{at}: no answer is given")
                question, gold = need(qa, "question", str, at), need(answers[0], "text", str, at)
                questions.append({"question": question, "answer": gold})
    return list(entries.values())


def _rows(name: str) -> Iterable[dict[str, Any]]:
    """Returns the rows of a data set, by way of the `datasets` library."""
    parquet = Path(name).suffix == ".parquet"
    hub_id, _, split = name.partition(":")
    if Path(name).is_file() and not parquet:
        raise SealError(f"{name}: expected a .json, .jsonl (or .gz of them) or .parquet file")
    looks_local = name.count("/") > 1 or name.startswith((".", "/", "~"))
    looks_local |= name.endswith((".json", ".jsonl", ".gz", ".parquet"))
    if looks_local and not Path(name).exists() or not name.strip():
        raise SealError(f"{name}: no such file")
    from datasets import load_dataset  # slow to import, and most runs never need it

    try:
        if parquet:
            return load_dataset("parquet", data_files=name, split="train")
        return load_dataset(name if Path(name).is_dir() else hub_id, split=split or "train")
    except Exception as error:  # datasets raises many kinds, from network and parsing alike
        first: BaseException = error
        while first.__cause__ is not None:  # the last one says no more than that there was one
            first = first.__cause__
        reason = str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__
        raise SealError(f"{name}: cannot be read as a file or hub data set: {reason}") from error


def _is_row(first: list[Any]) -> bool:
    """Returns whether a list begins with a question, as SQuAD's rows on the hub are."""
    return bool(first) and isinstance(first[0], dict) and "question" in first[0]


def _group(rows: list[dict[str, Any]], origin: str) -> list[dict[str, Any]]:
    """Returns SQuAD's rows, one for each question, as entries in SEAL's format."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for i, row in enumerate(rows):
        where = f"{origin}: row {i}"
        title = need(row, "title", str, where).replace("_", " ")
        context, question = need(row, "context", str, where), need(row, "question", str, where)
        answers = row.get("answers")
        texts = answers.get("text") if isinstance(answers, dict) else None
        if not isinstance(texts, list):
            raise SealError(f"{where}: expected answers with a list of texts")
        entry = {"title": title, "context": context, "questions": []}
        entry = entries.setdefault((title, context), entry)
        if len(texts):  # SQuAD 2.0: no text, no answer, nothing to grade
            entry["questions"].append({"question": question, "answer": texts[0]})
    return list(entries.values())
