"""What the reference makes of replies: lenient where ours is strict (see `edits`), for comparison.

Also which replies enter its outer fine-tuning, and its training rows as token ids.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from seal_jax import labels
from seal_jax.errors import SelfEditError
from seal_jax.tasks.arc import edits, prompts
from seal_jax.tasks.arc.edits import ArcEdit

_TRAINING = {"strategy": edits.STRATEGIES[0], "learning_rate": 0, "num_train_epochs": 0}
"""Stands for all of them where one is missing."""
MAX_STEPS = 375


class Reading(NamedTuple):
    """A reply as the reference reads it.

    Attributes:
      config: The object as it is saved, with what was missing filled in.
      families: The chosen families, for `augment.families`.
      epochs: May be a fraction; 0 trains nothing.
      mark: Equal for replies that ask for the same.
    """

    config: dict[str, Any]
    families: dict[str, bool]
    learning_rate: float
    epochs: float
    loss_on_all: bool
    mark: tuple[Any, ...]

    @property
    def edit(self) -> ArcEdit:
        """The families as a self-edit, to generate the training data with."""
        return edits.make(**self.families)

    def limited(self, texts: int) -> "Reading":
        """Returns what is trained on so many texts: nothing where that is too many steps."""
        if not steps(texts, self.epochs) > MAX_STEPS:
            return self
        training = self.config["training"] | {"num_train_epochs": 0}
        return self._replace(config=self.config | {"training": training}, epochs=0)


def read(reply: str) -> Reading | None:
    """Returns the reference's reading of a reply; None where it would ask again (no JSON).

    Any value but a false one switches a family on; a missing one switches all off. A missing or
    unknown value trains nothing; see `Reading.limited` for the limit of steps.

    Raises:
      SelfEditError: where the reference crashes.
    """
    try:
        tree = json.loads(reply)
        data = tree["data_generation"]
        flags = tuple(sorted(data.items()))
        training = tree["training"]
        mark = (flags, tuple(sorted(training.items())))
        hash(mark)
        missing = not set(edits.FLAGS) <= data.keys()
        if missing:
            training["num_train_epochs"] = 0
        if not _TRAINING.keys() <= training.keys():
            training |= _TRAINING
        if training["strategy"] not in edits.STRATEGIES:
            training["num_train_epochs"] = 0
        steps(1, training["num_train_epochs"])
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise SelfEditError(f"self-edit: the reference crashes: {type(error).__name__}") from error
    return Reading(
        config=tree,
        families={
            key.split("_")[1]: not missing and bool(data.get(key, False)) for key in edits.FLAGS
        },
        learning_rate=training["learning_rate"],
        epochs=training["num_train_epochs"],
        loss_on_all=training["strategy"] == edits.STRATEGIES[0],
        mark=mark,
    )


def chosen(
    replies: Iterable[str], count: int, skip_repeated: bool = False
) -> list[tuple[str, Reading]]:
    """Returns the first `count` replies that the reference accepts for a task, with its reading.

    Args:
      skip_repeated: Ask again for a configuration that was sampled before.
    """
    kept: list[tuple[str, Reading]] = []
    seen = set()
    stream = iter(replies)
    while len(kept) < count:
        reply = next(stream, None)
        if reply is None:
            break
        reading = read(reply)
        if reading is None:
            continue
        if skip_repeated and reading.mark in seen:
            continue
        seen.add(reading.mark)
        kept.append((reply, reading))
    return kept


def steps(texts: int, epochs: float, batch_size: int = 2) -> float:
    """Returns how many steps a self-edit asks for; more than `MAX_STEPS` train nothing.

    The last batch of an epoch counts as much as it is full.
    """
    return epochs * texts // batch_size


def rewarded(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    configurations: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[tuple[str, str]]:
    """Returns the (prompt, reply) pairs that enter the outer fine-tuning: all that were right.

    Args:
      results: By self-edit index: columns `task_id` and `correct`.
      configurations: By task and self-edit index: `prompt` and `response`.
    """
    pairs = []
    for index, columns in results.items():
        for row, key in columns["task_id"].items():
            entry = configurations.get(key, {}).get(index)
            if columns["correct"][row] and entry is not None:
                pairs.append((entry["prompt"], entry["response"]))
    return pairs


def outer_text(prompt: str, reply: str) -> str:
    """Returns the text of a pair in the outer fine-tuning."""
    return prompt + reply + prompts.EOT


def rows(
    texts: Sequence[Sequence[int]],
    header: Sequence[int],
    pad_id: int,
    loss_on_all: bool = False,
) -> list[labels.Row]:
    """Returns training rows as both of the reference's ARC trainers make them.

    Rows are padded to the longest. Loss is on what follows the first assistant header, or on
    everything; the next header that ends a training text and the pads carry loss too.

    Args:
      texts: Token ids of each text.
      header: Token ids of `prompts.ASSISTANT`.
    """
    width = max(map(len, texts), default=0)
    return [labels.end_mask(ids, () if loss_on_all else header, width, pad_id) for ids in texts]
