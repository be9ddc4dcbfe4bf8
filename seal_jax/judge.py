"""Is this answer right? One verdict for each (question, gold, answer).

`offline` agrees with GPT-4.1 as far as a small lexical model can, without network or key; `exact`
is for generated worlds, where the right answer has one form. `load` returns the judge a task asks
for. Blank answers are wrong for every judge.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seal_jax import (
    checkpoint,
    config,
    judge_features,
    judge_model,
    judge_openai,
    judge_trees,
    multihost,
)
from seal_jax.errors import SealError
from seal_jax.tasks.grading import Item

Judge = Callable[[Sequence[Item]], list[bool]]


def load(settings: config.Task, generate: Callable[[list[str]], list[str]] | None = None) -> Judge:
    """Returns the judge named by `settings.judge`, a function from items to verdicts.

    Args:
      settings: Of the task; `settings.openai` is read for that judge only.
      generate: Prompts to replies, greedily; the judge `model` needs it.

    Raises:
      SealError: where that judge is asked for and none is given.
    """
    if settings.judge == "openai":
        return judge_openai.Judge(settings.openai)
    if settings.judge == "model":
        if generate is None:
            raise SealError(
                "task.judge=model: no model was given to judge with, as "
                "load_task(cfg.task, judge_model.replies_of(cfg)) does"
            )
        return judge_model.Judge(generate)
    one = {"offline": offline, "exact": exact}[settings.judge]
    return lambda items: [one(*item) for item in items]


def check(settings: config.Task) -> None:
    """Raises SealError where the judge could not be asked: a run would notice after hours only.

    Of several processes only the first one needs a key, or the judge's model.
    """
    if not multihost.leads():
        return
    if settings.judge == "openai":
        judge_openai.check(settings.openai)
    if settings.judge == "model" and settings.judge_model:
        checkpoint.read_config(checkpoint.find(settings.judge_model))


def exact(question: str, gold: str, answer: str) -> bool:
    """Returns whether the answer's first line is the gold, up to case, spaces and punctuation."""
    first = _first_line(answer)
    found, wanted = plain(first), _wanted(gold).plain
    if not wanted:  # a sign, such as + or ∞
        return bool(first) and first == gold.strip()
    return found == wanted


def offline(question: str, gold: str, answer: str) -> bool:
    """Returns whether GPT-4.1 would likely accept the answer; needs no network and no key.

    A `Topic: ...` line before the question makes no difference.
    """
    if not answer.strip():
        return False
    short = len(answer) < 2 * len(gold) + 8
    if short and exact(question, gold, answer):
        return True
    row = judge_features.features(_prepared(question, gold), answer)
    if not any(row):  # no words
        return exact(question, gold, answer)
    if judge_trees.log_odds(weights().trees, np.array(row, np.float64)) <= 0:
        return False
    return not (
        short
        and _other_numbers(gold, answer)
        or _other_date(gold, answer)
        or _denied(question, gold, answer)
    )


class Weights(NamedTuple):
    """What the offline judge has learned.

    Attributes:
      trees: From features to log-odds.
      words: The most frequent English words, in order.
      rarity: Weight of a word: the logarithm of its rank.
    """

    trees: judge_trees.Trees
    words: list[str]
    rarity: Callable[[str], float]


@functools.lru_cache(1)
def weights() -> Weights:
    """Returns the weights that ship with the package, read once."""
    content = judge_trees.read(Path(__file__).with_name("judge_weights.json"))
    if tuple(content["features"]) != judge_features.NAMES:
        raise SealError("judge_weights.json is of other features: run benchmarks/train_judge.py")
    words = content["words"].split()
    return Weights(content["trees"], words, rarity_of(words))


def rarity_of(words: Sequence[str]) -> Callable[[str], float]:
    """Returns a function from a word to the logarithm of its rank among words by frequency."""
    ranks = {word: math.log(rank + 10) for rank, word in enumerate(words)}
    unknown = math.log(3 * len(words) + 10)
    return lambda word: ranks.get(word, unknown)


@functools.lru_cache(20_000)
def _prepared(question: str, gold: str) -> judge_features.Gold:
    return judge_features.prepare(question, gold, weights().rarity)


class _Wanted(NamedTuple):
    """A gold answer, prepared for the rules.

    Attributes:
      plain: Its plain text.
      masked: The same with # for every number.
      numbers: As written in the plain text.
      dates: Days of a year.
    """

    plain: str
    masked: str
    numbers: list[str]
    dates: set[tuple[str, int, int]]


@functools.lru_cache(20_000)
def _wanted(gold: str) -> _Wanted:
    text = plain(gold)
    return _Wanted(text, _NUMBER.sub("#", text), _NUMBER.findall(text), _dates(text))


def _first_line(answer: str) -> str:
    return (answer.strip().splitlines() or [""])[0].strip()


def _other_numbers(gold: str, answer: str) -> bool:
    """Returns whether the answer is the gold but for a number: a wrong date, amount or share.

    Words alone would carry it. Numbers in another order, or years cut to two digits, are no others.
    """
    wanted = _wanted(gold)
    if not wanted.numbers:
        return False
    said = plain(_first_line(answer))
    if wanted.masked != _NUMBER.sub("#", said):
        return False
    pairs = list(zip(wanted.numbers, _NUMBER.findall(said), strict=True))
    if sorted(float(a) for a, _ in pairs) == sorted(float(b) for _, b in pairs):
        return False
    return not all(float(a) == float(b) or _cut(a, b) or _cut(b, a) for a, b in pairs)


def _other_date(gold: str, answer: str) -> bool:
    """Returns whether both name days of a year, and no day is in both."""
    wanted = _wanted(gold).dates
    said = _dates(plain(answer)) if wanted else wanted
    return bool(wanted and said) and not wanted & said


def _dates(text: str) -> set[tuple[str, int, int]]:
    found = _DATE.findall(text)
    return {(a or d, int(b or c), int(year)) for c, a, d, b, year in found}


def _denied(question: str, gold: str, answer: str) -> bool:
    """Returns whether the answer has the gold once, right behind a `not` that was not asked for."""
    folded = _folded(answer)
    if not any(word in folded for word in _NOT):  # most answers, and spacing joins no words
        return False
    said, wanted = _spaced(folded), _wanted(gold).plain
    if not wanted or said.count(wanted) != 1 or _NEGATION.search(f"{question} {gold}"):
        return False
    ends = {end for found in _DENIAL.finditer(said) for end in (found.end(), found.end("not"))}
    return any(f"{said} ".startswith(f" {wanted} ", end) for end in ends)


def _cut(year: str, short: str) -> bool:
    return len(year) == 4 and len(short) == 2 and year.endswith(short)


_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_DATE = re.compile(rf"\b(?:{_DAY}(?: of)? {_MONTH}|{_MONTH} {_DAY}) (\d{{4}})\b")
_NEGATION = re.compile(r"\b(?:no|not|never|none|nor|neither|without|except)\b|n['’]t\b", re.I)
_NOT = "not never isnt wasnt arent werent didnt doesnt dont".split()
_DENIAL = re.compile(rf"\b(?P<not>{'|'.join(_NOT)})(?: (?:a|an|the|at|by|from|in|on|to))?(?= )")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_APOSTROPHES = re.compile(r"['’`]")
_GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(r"(?:(?<!\d)\.|\.(?!\d)|(?<!\s)-|-(?!\d)|[^\w\s.-]|_)+")


def plain(text: str) -> str:
    """Returns the text in lower case, with single spaces and without punctuation.

    Decimal points and signs stay: 1.5 is not 15, and -5 not 5.
    """
    return _spaced(_folded(text))


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    return _APOSTROPHES.sub("", folded)


def _spaced(folded: str) -> str:
    folded = _GROUPED_DIGITS.sub("", folded)
    return " ".join(_PUNCTUATION.sub(" ", " " + folded).split())
