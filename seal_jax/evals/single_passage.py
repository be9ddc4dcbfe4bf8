"""One passage at a time (n = 1): an adapter for each self-edit, tested on its passage's questions.

Requests come passage by passage, self-edit by self-edit, seed by seed; an engine gets all of them
at once and may serve them in any grouping.
"""

from collections.abc import Sequence
from typing import Any

from seal_jax.evals import inner_loop
from seal_jax.evals.inner_loop import Engine, Reply, Request
from seal_jax.formats import results
from seal_jax.tasks import Context, Task


def requests(task: Task, context: Context, self_edits: Sequence[str], seeds: int) -> list[Request]:
    """Returns the inner loops of one passage: every self-edit, `seeds` times in a row."""
    asked = inner_loop.asked(task, [context])
    return [
        Request(task.edit(context, text), asked, candidate, seed)
        for candidate, text in enumerate(self_edits)
        for seed in range(seeds)
    ]


def article(
    context: Context, self_edits: Sequence[str], replies: Sequence[Reply], prompt: str = ""
) -> dict[str, Any]:
    """Returns the record of one passage: statistics, self-edits, and every answer.

    Args:
      replies: To `requests`, in their order.
      prompt: That the self-edits answer.
    """
    seeds, rest = divmod(len(replies), len(self_edits))
    if rest:
        raise ValueError(f"{len(replies)} replies to {len(self_edits)} self-edits")
    completions = []
    for i, text in enumerate(self_edits):
        runs = replies[i * seeds : (i + 1) * seeds]
        stats = results.completion_stats(
            [run.baseline_correct for run in runs], [run.adapter_correct for run in runs]
        )
        records = [record for rep, run in enumerate(runs) for record in _records(context, rep, run)]
        completions.append({"text": text, "stats": stats, "questions": records})
    return {
        "stats": results.article_stats([entry["stats"] for entry in completions]),
        "title": context.title,
        "context": context.passage,
        "completions": completions,
        "prompt": prompt,
    }


def run(
    task: Task,
    contexts: Sequence[Context],
    self_edits: Sequence[Sequence[str]],
    engine: Engine,
    *,
    seeds: int = 1,
    prompts: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Returns the record of each passage (`article`), for `formats.results.result`.

    Args:
      self_edits: Of each context; `inner_loop.candidates` takes them from a file.
      seeds: Inner loops of each self-edit.
      prompts: That they answer, one for each context; recorded only.
    """
    each = [
        requests(task, context, texts, seeds)
        for context, texts in zip(contexts, self_edits, strict=True)
    ]
    replies = list(engine([request for rows in each for request in rows]))
    prompts = prompts or [""] * len(contexts)
    made, start = [], 0
    for context, texts, rows, prompt in zip(contexts, self_edits, each, prompts, strict=True):
        made.append(article(context, texts, replies[start : start + len(rows)], prompt))
        start += len(rows)
    if start != len(replies):
        raise ValueError(f"{len(replies)} replies to {start} requests")
    return made


def _records(context: Context, rep: int, run: Reply) -> list[dict[str, Any]]:
    answers = zip(
        context.questions,
        run.baseline_texts,
        run.adapter_texts,
        run.baseline_correct,
        run.adapter_correct,
        strict=True,
    )
    return [
        {
            "rep": rep,
            "question": question.text,
            "answer": question.gold,
            "baseline_answer": before,
            "adapter_answer": after,
            "baseline_correct": right_before,
            "adapter_correct": right_after,
        }
        for question, before, after, right_before, right_after in answers
    ]
