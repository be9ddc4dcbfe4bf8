"""Rows of token ids and labels as the reference's trainers see them; no tokenizer needed.

A label of -100 carries no loss; labels are not shifted.
"""

from collections.abc import Sequence
from typing import NamedTuple

IGNORE = -100


class Row(NamedTuple):
    """One training row."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]


def end_mask(ids: Sequence[int], substring_ids: Sequence[int], max_length: int, pad_id: int) -> Row:
    """Returns a row of the reference's inner loop, cut or padded to `max_length`.

    Pads are trained on (`inner.pad_loss`). Labels up to the end of the first occurrence of the
    substring carry no loss; it is looked for in the padded row, so it may match pads.

    Args:
      substring_ids: Of the text that ends the masked part; empty masks nothing.
    """
    kept = list(ids[:max_length])
    padded = kept + [pad_id] * (max_length - len(kept))
    masked = _end_of(padded, list(substring_ids))
    return Row(
        input_ids=padded,
        attention_mask=[1] * len(kept) + [0] * (max_length - len(kept)),
        labels=[IGNORE] * masked + padded[masked:],
    )


def completion_only(
    prompt_ids: Sequence[int], text_ids: Sequence[int], eos_id: int, max_length: int
) -> Row:
    """Returns a row of the outer fine-tuning: loss on the completion and EOS, not on the prompt.

    Args:
      prompt_ids: Of the prompt alone; only their number matters.
      text_ids: Of prompt and completion together.
      max_length: The row is cut to it, so the longest text may lose its EOS.
    """
    ids = [*text_ids, eos_id][:max_length]
    masked = min(len(prompt_ids), len(ids))
    return Row(ids, [1] * len(ids), [IGNORE] * masked + ids[masked:])


def pad(rows: Sequence[Row], pad_id: int) -> list[Row]:
    """Returns rows padded on the right to the longest, without loss on the pads."""
    width = max((len(row.input_ids) for row in rows), default=0)
    made = []
    for row in rows:
        rest = width - len(row.input_ids)
        made.append(
            Row(
                row.input_ids + [pad_id] * rest,
                row.attention_mask + [0] * rest,
                row.labels + [IGNORE] * rest,
            )
        )
    return made


def _end_of(ids: list[int], substring: list[int]) -> int:
    """Returns the end of the first occurrence; 0 if there is none."""
    size = len(substring)
    for start in range(len(ids) - size + 1):
        if size and ids[start : start + size] == substring:
            return start + size
    return 0
