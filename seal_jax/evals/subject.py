"""What an evaluation is of: a model or policy, contexts, self-edits, and where its records go."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from seal_jax import files, held_out, outer, policies, runs
from seal_jax.batching import SelfEdit
from seal_jax.config import Config
from seal_jax.evals import inner_loop
from seal_jax.tasks import Context, Task


class Subject(NamedTuple):
    """What is evaluated, and the folder of its records."""

    models: policies.Policies
    policy: policies.Saved
    task: Task
    contexts: list[Context]
    home: files.AnyPath
    metrics: runs.Metrics

    def self_edits(self, n: int, cfg: Config) -> list[SelfEdit]:
        """Returns the self-edits to apply, up to n of each context, contexts in order.

        The policy's own are drawn by the keys of a run's held-out table.
        """
        kind = cfg.evaluation.self_edits
        if kind == "own":
            lm, key = self.models.load(self.policy), outer.key_of(cfg, "write", "held-out")
            file = self.home / "edits.jsonl"
            return outer.write_edits(lm, self.task, self.contexts, n, file, key, cfg)
        if kind != "file":
            return held_out.reference_edits(self.task, kind, self.contexts)
        return [
            SelfEdit(context, i, text)
            for context in self.contexts
            for i, text in enumerate(inner_loop.candidates(context, n))
        ]

    def texts(self, n: int, cfg: Config) -> list[list[str]]:
        """Returns the texts of `self_edits`, a list for each context."""
        return self.by_context(self.self_edits(n, cfg))

    def by_context(self, edits: Sequence[SelfEdit]) -> list[list[str]]:
        """Returns the texts of self-edits, a list for each context."""
        own: dict[str, list[str]] = {context.id: [] for context in self.contexts}
        for one in edits:
            own[one.context.id].append(one.text)
        return [own[context.id] for context in self.contexts]

    def write_result(self, content: dict[str, Any]) -> None:
        """Writes a result file in the reference's layout."""
        text = json.dumps(content, indent=2, ensure_ascii=False)
        runs.write_text(self.home / "result.json", text)
