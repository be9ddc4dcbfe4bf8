"""Self-edits as batches: tokenised training texts of many candidates, ragged, on the host."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from seal_jax import config as config_lib
from seal_jax.errors import SealError, SelfEditError
from seal_jax.tasks import Context, Edit, Task

_ROW = 512  # texts of a full batch are packed into rows of about this many tokens


class SelfEdit(NamedTuple):
    """A self-edit as written: its context, its number among that context's, and its text."""

    context: Context
    index: int
    text: str


class Text(NamedTuple):
    """A tokenised training text.

    Attributes:
      tokens: [t].
      weights: [t], how much predicting each token counts (0 or 1).
      real: Tokens that are text; the rest is padding that is trained on (`pad_loss`).
    """

    tokens: np.ndarray
    weights: np.ndarray
    real: int


Step = list[list[Text]]
"""Rows of texts, for one step of the optimizer."""


class Candidate(NamedTuple):
    """What one candidate trains on. `error` says why a self-edit cannot be applied (no texts)."""

    texts: tuple[Text, ...]
    learning_rate: float
    epochs: int
    id: int
    error: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Batch:
    """Candidates in the order of their self-edits; `slots.arrange` makes arrays of them."""

    candidates: tuple[Candidate, ...]
    settings: config_lib.Inner
    eos_id: int

    @functools.cached_property
    def steps(self) -> list[list[Step]]:
        """The steps of an epoch of each candidate; see `steps_of`."""
        return [steps_of(c.texts, self.settings.batch_size) for c in self.candidates]

    @functools.cached_property
    def total(self) -> list[int]:
        """How many steps each candidate takes."""
        return [c.epochs * len(own) for c, own in zip(self.candidates, self.steps, strict=True)]

    def __len__(self) -> int:
        return len(self.candidates)

    def __repr__(self) -> str:
        texts = [text for candidate in self.candidates for text in candidate.texts]
        tokens = sum(text.real for text in texts)
        return f"Batch({len(self)} candidates: {len(texts)} texts of {tokens:,} tokens)"


def identity(*parts: Any) -> int:
    """Returns 32 bits that name these parts, the same on every machine and run."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def tokenize(edit: Edit, tokenizer: Any, eos_id: int, settings: config_lib.Inner) -> list[Text]:
    """Returns an edit's examples as tokens, each ended by one EOS and cut to `max_length`.

    With `pad_loss` each is instead padded with EOS to `max_length` and all of it counts, as the
    reference does.
    """
    texts = []
    for example in edit.examples:
        prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
        # Special tokens (Llama's BOS) open a text once.
        start = not example.prompt
        body = tokenizer(example.completion, add_special_tokens=start)["input_ids"]
        counts = [int(edit.loss_on == "all")] * len(prompt) + [1] * len(body)
        tokens = [*prompt, *body]
        size = max(0, settings.max_length - len(tokens)) if settings.pad_loss else 1
        tokens = (tokens + [eos_id] * size)[: settings.max_length]
        counts = (counts + [1] * size)[: settings.max_length]
        # The first token is never predicted; only the reference counts it in its mean.
        counts[0] *= settings.pad_loss
        real = len(tokens) - size if settings.pad_loss else len(tokens)
        texts.append(Text(np.asarray(tokens, np.int32), np.asarray(counts, np.int8), real))
    return texts


def pack(
    task: Task,
    edits: SelfEdit | Sequence[SelfEdit] | Sequence[Sequence[SelfEdit]],
    tokenizer: Any,
    settings: config_lib.Inner,
    *,
    eos_id: int | None = None,
) -> Batch:
    """Returns what each self-edit trains on, as a batch with candidates first.

    A self-edit that cannot be applied trains nothing and carries the reason.

    Args:
      edits: A SelfEdit, several, or lists of them (one per context, as `sample_edits` returns).
      eos_id: Ends a text; the tokenizer's by default.

    Raises:
      SealError: where no token ends a text, or the task's `edit` returns no Edit.
    """
    eos_id = tokenizer.eos_token_id if eos_id is None else eos_id
    if eos_id is None:
        raise SealError("the tokenizer names no end-of-text token: pass eos_id")
    candidates = []
    for item in [edits] if isinstance(edits, SelfEdit) else edits:
        for written in [item] if isinstance(item, SelfEdit) else item:
            candidates.append(_candidate(task, written, tokenizer, eos_id, settings))
    return Batch(tuple(candidates), settings, eos_id)


def _candidate(
    task: Task, written: SelfEdit, tokenizer: Any, eos_id: int, settings: config_lib.Inner
) -> Candidate:
    name = identity(written.context.id, written.index)
    try:
        edit = task.edit(written.context, written.text)
    except SelfEditError as error:
        return Candidate((), settings.learning_rate, 0, name, str(error))
    if not isinstance(edit, Edit):
        raise SealError(f"{task.name}: edit returned {type(edit).__name__}, no Edit")
    return candidate(edit, name, tokenizer, eos_id, settings)


def candidate(
    edit: Edit, name: int, tokenizer: Any, eos_id: int, settings: config_lib.Inner
) -> Candidate:
    """Returns what an edit trains on; nothing, and why, where it asks for what cannot be done.

    Args:
      name: 32 bits that stand for the candidate in random keys; see `identity`.
    """
    rate = settings.learning_rate if edit.learning_rate is None else edit.learning_rate
    epochs = settings.epochs if edit.epochs is None else edit.epochs
    if not 0 <= rate < math.inf or not epochs >= 0 or epochs != int(epochs):
        reason = f"asks for {epochs} epochs at a learning rate of {rate}"
        return Candidate((), settings.learning_rate, 0, name, reason)
    texts, epochs = tuple(tokenize(edit, tokenizer, eos_id, settings)), int(epochs)
    # A last batch counts as much as it is full, as in the reference.
    size = settings.batch_size
    steps = epochs * len(texts) // size if size else epochs * len(steps_of(texts, size))
    if settings.max_steps and steps > settings.max_steps:
        reason = f"asks for {steps} steps, more than {settings.max_steps}"
        return Candidate((), rate, 0, name, reason)
    return Candidate(texts, rate, epochs, name)


def check_vocabulary(batch: Batch, size: int) -> None:
    """Raises SealError where a text has tokens that a model of `size` of them does not know."""
    texts = (text for candidate in batch.candidates for text in candidate.texts)
    most = max((int(np.max(text.tokens, initial=0)) for text in texts), default=0)
    if most >= size:
        raise SealError(f"the tokenizer makes token {most}, the model knows {size}")


def steps_of(texts: Sequence[Text], batch_size: int) -> list[Step]:
    """Returns the texts of each optimizer step of an epoch, longest first."""
    ordered = sorted(texts, key=lambda text: -len(text.tokens))  # stable: ties in file order
    if batch_size:
        starts = range(0, len(ordered), batch_size)
        return [[[text] for text in ordered[i : i + batch_size]] for i in starts]
    rows: list[list[Text]] = []
    full: list[int] = []
    for text in ordered:
        size = len(text.tokens)
        home = next((i for i, used in enumerate(full) if used + size <= _ROW), len(rows))
        if home == len(rows):
            rows.append([])
            full.append(0)
        rows[home].append(text)
        full[home] += size
    return [rows] if rows else []
