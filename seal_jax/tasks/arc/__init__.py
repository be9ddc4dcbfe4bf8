"""Few-shot adaptation on ARC: the model configures its own training from a few demonstrations."""

from seal_jax.tasks.arc.edits import ArcEdit, parse_self_edit
from seal_jax.tasks.arc.generate import augmented_tasks
from seal_jax.tasks.arc.grids import parse_grid
from seal_jax.tasks.arc.prompts import render, self_edit_prompt
from seal_jax.tasks.arc.submission import score
from seal_jax.tasks.arc.tasks import ArcTask, load
from seal_jax.tasks.arc.voting import vote

__all__ = [
    "ArcEdit",
    "ArcTask",
    "augmented_tasks",
    "load",
    "parse_grid",
    "parse_self_edit",
    "render",
    "score",
    "self_edit_prompt",
    "vote",
]
