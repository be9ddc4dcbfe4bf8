"""Texts of ARC tasks for chat models: messages, Llama 3.2's rendering, the self-edit prompt."""

import re
from typing import NamedTuple

import numpy as np

from seal_jax.errors import SealError
from seal_jax.tasks.arc import grids
from seal_jax.tasks.arc.grids import Grid
from seal_jax.tasks.arc.tasks import ArcTask, Pair

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
DATE = "26 Jul 2024"
"""Llama's template writes today's date; a fixed one gives the same prompts on every day."""

_HEAD = (
    "Figure out the underlying transformation in the following examples and apply it to the test "
    "case. Here are some examples from this transformation, your answer must follow the format.\n"
    "The input-{} grids are provided as python arrays:\n"
)
_BARC_SYSTEM = (
    "You are a world-class puzzle solver with exceptional pattern recognition skills. Your task is "
    "to analyze puzzles, spot patterns, and provide direct solutions."
)
_BARC_HEAD = (
    "Given input-output grid pairs as reference examples, carefully observe the patterns to "
    "predict the output grid for new test input. Each pair follows the same transformation rule. "
    "Grids are 2D arrays represented as strings, with cells (colors) separated by spaces and rows "
    "by newlines.\nHere are the input and output grids for the reference examples:\n"
)
_BARC_TAIL = (
    "Directly provide the output grids corresponding to the given test input grids, based on the "
    "patterns observed in the reference examples."
)
_SELF_EDIT_SYSTEM = (
    "You are a helpful assistant that provide the correct output for the given task immediately."
)
_SELF_EDIT = """------


You are configuring a model training pipeline by selecting from predefined tools.

You must make two decisions:

1. **Data Generation Tools** — For each of the following, choose true or false:
    - use_basic_augmentations
    - use_size_augmentations
    - use_chain_augmentations
    - use_repeat_augmentations

2. **Training Configuration** — Choose one of:
    - "train_using_all_tokens"
    - "train_using_output_tokens"

Also specify:
    - learning_rate (float)
    - num_train_epochs (integer)

### Output Format

Respond with a valid JSON object. Do not include any explanation, markdown, or extra text. \
Use lowercase `true`/`false` for booleans and ensure correct JSON syntax.

Example output:

{
  "data_generation": {
    "use_basic_augmentations": ...,
    "use_size_augmentations": ...,
    "use_chain_augmentations": ...,
    "use_repeat_augmentations": ...
  },
  "training": {
    "strategy": ...,
    "learning_rate": ...,
    "num_train_epochs": ...
  }
}
"""


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


class Chat(NamedTuple):
    """A task as a chat: the turns of the question, and the turn that answers it."""

    question: tuple[Message, Message]
    answer: Message


FORMATTERS = ("new_format", "default", "barc_format", "diff_format")
"""The reference's names; `new_format` is the one it trains and predicts with."""


def chat(task: ArcTask, formatter: str = "new_format") -> Chat | None:
    """Returns a task as a chat; None where the formatter cannot write it.

    `diff_format` writes an output as its difference from the input, which exists only where their
    shapes are equal.

    Raises:
      SealError: for an unknown formatter.
    """
    if formatter == "barc_format":
        return _barc(task)
    if formatter not in FORMATTERS:
        raise SealError(f"formatter {formatter!r}: expected one of {', '.join(FORMATTERS)}")
    end = "" if formatter == "default" else "#"
    write, what = _output, "output"
    if formatter == "diff_format":
        write, what = _difference, "diff"
        if any(one.shape != _known(one, other).shape for one, other in (*task.train, task.test)):
            return None
    lines = (f"{grids.list_text(pair.input)} -> {write(pair)}{end}\n" for pair in task.train)
    system = Message("system", _HEAD.format(what) + "".join(lines))
    user = Message("user", f"{grids.list_text(task.test.input)} -> ")
    return Chat((system, user), Message("assistant", write(task.test) + end))


def _barc(task: ArcTask) -> Chat:
    word = grids.word_text
    examples = (
        f"Example {i}:\nInput:\n{word(a)}\n\nOutput:\n{word(b)}\n"
        for i, (a, b) in enumerate(task.train, 1)
    )
    user = (
        f"{_BARC_HEAD}{''.join(examples)}\n\nHere is the input grid for the test example:\n"
        f"Input:\n{word(task.test.input)}\n\n\n{_BARC_TAIL}"
    )
    known = word(_known(*task.test))
    answer = f"The output grid for the test input grid is:\n\n```\n{known}\n```"
    return Chat(
        (Message("system", _BARC_SYSTEM), Message("user", user)), Message("assistant", answer)
    )


def _known(one: Grid, other: Grid | None) -> Grid:
    """Returns the output, or the input where it is not known, as the reference."""
    return one if other is None else other


def _output(pair: Pair) -> str:
    return grids.list_text(_known(*pair))


def _difference(pair: Pair) -> str:
    """Returns output minus input as numpy prints it, which aligns numbers and breaks long rows."""
    text = np.array2string(_known(*pair) - pair.input, max_line_width=75, threshold=1000)
    return " + " + text.replace("  ", " ").replace("[[ ", "[[").replace("[ ", "[")


def llama(messages: tuple[Message, ...]) -> str:
    """Returns Llama 3.2's rendering of messages, ready for the assistant's turn."""
    text = BOS
    for i, (role, content) in enumerate(messages):
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        if i == 0:
            text += f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"
        text += content.strip() + EOT
    return text + ASSISTANT


def render(task: ArcTask, formatter: str = "new_format") -> tuple[str, str]:
    """Returns the prompt that asks for the test output, and the answer (without end of turn).

    The answer to a test input whose output is not known is empty.

    Raises:
      SealError: where the formatter cannot write the task.
    """
    made = chat(task, formatter)
    if made is None:
        raise SealError(f"task {task.name}: cannot be written by formatter {formatter}")
    return llama(made.question), "" if task.test.output is None else made.answer.content


def training_text(task: ArcTask, formatter: str = "new_format") -> str | None:
    """Returns the reference's training text: the whole chat, ready for yet another answer."""
    made = chat(task, formatter)
    return None if made is None else llama((*made.question, made.answer))


def self_edit_prompt(task: ArcTask) -> str:
    """Returns the prompt that shows the demonstrations and asks for a configuration."""
    examples = (
        f"Input:\n{grids.plain_text(a)}\n\nOutput:\n{grids.plain_text(b)}\n\n"
        for a, b in task.train
    )
    turns = (Message("system", _SELF_EDIT_SYSTEM), Message("user", "".join(examples) + _SELF_EDIT))
    text = "".join(
        f"<|start_header_id|>{m.role}<|end_header_id|>\n\n{m.content}{EOT}" for m in turns
    )
    return BOS + text + ASSISTANT


_SPECIAL = re.compile(r"(<\|[a-z_]+\|>)")
_PIECE = re.compile(  # Llama 3 cuts text so before it merges; grids and chat are one token a piece
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?[^\W\d_]+|\d{1,3}| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_tokens(text: str) -> int:
    """Returns how many tokens Llama 3 makes of a prompt in `new_format`; close for other texts."""
    count = text.count("]]#") + text.count("-output")  # pieces that are two tokens
    for part in _SPECIAL.split(text):
        count += 1 if _SPECIAL.fullmatch(part) else len(_PIECE.findall(part))
    return count


def count_tokens(task: ArcTask) -> int:
    """Returns the length of a task's training text as the reference counts it, with two BOS."""
    text = training_text(task)
    assert text is not None  # new_format writes every task
    return llama_tokens(text) + 1
