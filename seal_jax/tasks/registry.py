"""Tasks by name, and tasks of your own: any `package.module:factory`."""

import collections
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable

from seal_jax import config as config_lib
from seal_jax import judge as judges
from seal_jax.errors import SealError
from seal_jax.tasks import Task


def load_task(
    settings: config_lib.Task | str, generate: Callable[[list[str]], list[str]] | None = None
) -> Task:
    """Returns the task that a group of settings (or a name alone) asks for.

    Args:
      generate: Prompts to greedy replies, for the judge `model`; see `judge_model.replies_of`.

    Raises:
      SealError: for an unknown name, or a file that cannot be read.
    """
    if isinstance(settings, str):
        settings = config_lib.Task(name=settings)
    name = settings.name
    if name in ("arc", "tiny-world", "tiny-grids") and settings.judge in ("openai", "model"):
        raise SealError(f"task.judge={settings.judge}: answers of {name} are compared, not judged")
    if name in ("tiny-world", "tiny-grids") and (settings.path or settings.held_out):
        given = f"path={settings.path}" if settings.path else f"held_out={settings.held_out}"
        raise SealError(f"task.{given}: {name} makes its own contexts; squad and arc read files")
    if name == "squad":
        from seal_jax.tasks import squad

        judge = judges.load(settings, generate)
        return squad.task(settings, judge)._replace(references={"passage": lambda context: ""})
    if name == "tiny-world":
        return _tiny_world(settings)
    if name == "arc":
        from seal_jax.tasks.arc.task import task

        return task(settings)
    if name == "tiny-grids":
        from seal_jax.tiny import grids

        return grids.task(settings)
    if ":" not in name:
        known = "squad, arc, tiny-world, tiny-grids or package.module:factory"
        raise SealError(f"task.name={name!r} is unknown: expected {known}")
    module, _, factory = name.partition(":")
    if (here := os.getcwd()) not in sys.path:  # as `python -m` has it, and a script has not
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module), factory)(settings)
    except (ImportError, AttributeError, TypeError) as error:
        raise SealError(f"task.name={name!r}: cannot be loaded: {error}") from error
    if not isinstance(made, Task):
        raise SealError(f"task.name={name!r}: the factory returned {type(made).__name__}, no Task")
    ids = collections.Counter(context.id for context in (*made.contexts, *made.held_out))
    if twice := [key for key, count in ids.items() if count > 1]:
        raise SealError(f"task.name={name!r}: several contexts have the id {twice[0]!r}")
    return made


def _tiny_world(settings: config_lib.Task) -> Task:
    """Returns the built-in world as passages and questions; it has one style and one judge."""
    from seal_jax.tasks import squad
    from seal_jax.tiny import world

    return squad.make(
        world.contexts("train", settings.size or 200, settings.seed),
        dataclasses.replace(settings, style="compact", judge="exact"),
        held_out=world.contexts("held_out", 200, settings.seed),
        references={"passage": lambda context: "", "oracle": world.oracle},
        name="tiny-world",
    )
