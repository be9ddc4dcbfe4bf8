"""What the offline judge looks at: how much of the gold is in the answer, and beside what.

All of it is about words, so it knows neither the topic nor the passage. What depends on question
and gold alone is prepared once (`prepare`), since the same question is answered many times.
"""

import bisect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from seal_jax.judge_words import NEGATIONS, STOP, Word, similarity, trigrams, words

SIMILAR = 0.75
"""Words at least this similar count as the same word."""

NAMES = tuple(
    "found found_new found_new_similar found_weighted missing_weight found_weight missing_words "
    "found_words missing_capitals found_capitals run contained first_sentence alternative "
    "trigrams trigrams_new token_f1 precision new_words log_words commas starts_with_gold "
    "question_words near_question same_sentence capitals_new capitals_before hedges negation "
    "negation_differs numbers_found number_distance number_extras".split()
)
"""Of the features, in order."""

_NEGATED = NEGATIONS & STOP
_HEDGES = frozenset("unknown unclear unable unfortunately passage specified mentioned".split())
_TOPIC = re.compile(r"\s*Topic: .*\n")
_OR = re.compile(r"\bor\b|/")


class Gold(NamedTuple):
    """A question and its gold answer, prepared.

    Attributes:
      words: Content words of the gold, all of its words if there are none.
      weights: Their rarity.
      new: Whether each counts: those not in the question, or all if there are no others.
      stems: Of all words of the gold, in order.
      counts: How often each stem is there.
      trigrams: Letter trigrams of its new words.
      numbers: Stems and values of the gold's numbers.
      acronym: Initials of its capitalised words, if there are two or more.
      alternatives: Stems on each side of an "or"; empty without one.
      question: Content stems of the question, with their weights.
      question_stems: All of its stems.
      negated: Whether the gold has a negation.
    """

    words: tuple[Word, ...]
    weights: tuple[float, ...]
    new: tuple[bool, ...]
    stems: tuple[str, ...]
    counts: Counter[str]
    trigrams: frozenset[str]
    numbers: dict[str, float]
    acronym: str
    alternatives: tuple[frozenset[str], ...]
    question: dict[str, float]
    question_stems: frozenset[str]
    negated: bool


class _Said(NamedTuple):
    """An answer's words, by column.

    Attributes:
      stems: Empty for the end of a sentence.
      texts: As `Word.text`.
      capital: As `Word.capital`.
      numbers: As `Word.number`.
      content: Indices of content words.
      ends: Indices of sentence ends.
      places: First index of each stem.
    """

    stems: tuple[str, ...]
    texts: tuple[str, ...]
    capital: tuple[bool, ...]
    numbers: tuple[float | None, ...]
    content: list[int]
    ends: list[int]
    places: dict[str, int]


def prepare(question: str, gold: str, rarity: Callable[[str], float]) -> Gold:
    """Returns what the features need to know of a question and its gold answer.

    Args:
      question: A `Topic: ...` line before it is left out.
      gold: The right answer.
      rarity: Weight of a word as written, in lower case; positive.
    """
    asked = _without_ends(_TOPIC.sub("", question, count=1))
    every = _without_ends(gold)
    chosen = tuple(word for word in every if not word.stop) or tuple(every)
    in_question = frozenset(word.stem for word in asked)
    new = tuple(word.stem not in in_question for word in chosen)
    if not any(new):
        new = (True,) * len(chosen)
    initials = "".join(word.text[0] for word in chosen if word.capital)
    sides = [frozenset(w.stem for w in _without_ends(s) if not w.stop) for s in _OR.split(gold)]
    stems = tuple(word.stem for word in every)
    return Gold(
        words=chosen,
        weights=tuple(rarity(word.text) for word in chosen),
        new=new,
        stems=stems,
        counts=Counter(stems),
        trigrams=_trigrams(word.text for word, counts in zip(chosen, new, strict=True) if counts),
        numbers={word.stem: word.number for word in every if word.number is not None},
        acronym=initials if len(initials) > 1 and initials not in in_question else "",
        alternatives=tuple(side for side in sides if side) if len(sides) > 1 else (),
        question={word.stem: rarity(word.text) for word in asked if not word.stop},
        question_stems=in_question,
        negated=any(word.text in NEGATIONS for word in every),
    )


def features(gold: Gold, answer: str) -> list[float]:
    """Returns the numbers named by NAMES; zeros if gold or answer has no words."""
    said = _said(answer)
    if not gold.words or not said.places:
        return [0.0] * len(NAMES)
    stems, texts, capital, _, content, ends, places = said
    first_end = ends[0] if ends else len(stems)
    total = found_sum = similar_sum = every_sum = opening_sum = 0.0
    missing_weight = found_weight = 0.0
    hits = missing = missing_capitals = found_capitals = 0
    indices = []
    for word, weight, new, (likeness, place) in zip(
        gold.words, gold.weights, gold.new, _match(gold, said), strict=True
    ):
        hit = likeness >= SIMILAR
        hits += hit
        every_sum += weight * hit
        if not new:
            continue
        total += weight
        similar_sum += weight * likeness
        if hit:
            found_sum += weight
            found_weight = max(found_weight, weight)
            found_capitals += word.capital
            if place >= 0:
                indices.append(place)
                opening_sum += weight * (place < first_end)
        else:
            missing += 1
            missing_weight = max(missing_weight, weight)
            missing_capitals += word.capital

    fresh = [i for i in content if stems[i] not in gold.question_stems]
    other = [i for i in fresh if stems[i] not in gold.counts and texts[i] != gold.acronym]
    capitals = [i for i in other if capital[i]]
    first = min(indices, default=len(stems))
    letters = max(len(gold.trigrams), 1)
    letters_new = _among(gold.trigrams, [texts[i] for i in fresh])
    asked = [texts[i] for i in content if stems[i] in gold.question_stems]
    letters_asked = _among(gold.trigrams - letters_new, asked)
    run = _longest_run(gold.stems, stems)
    shared = [min(n, stems.count(stem)) for stem, n in gold.counts.items() if stem in places]
    near, same = _question_around(gold, said, indices)
    negated = not _NEGATED.isdisjoint(texts)
    return [
        hits / len(gold.words),
        found_sum / total,
        similar_sum / total,
        every_sum / sum(gold.weights),
        missing_weight,
        found_weight,
        missing,
        sum(gold.new) - missing,
        missing_capitals,
        found_capitals,
        run / len(gold.stems),
        run == len(gold.stems),
        opening_sum / total,
        max((len(side & places.keys()) / len(side) for side in gold.alternatives), default=-1.0),
        (len(letters_new) + len(letters_asked)) / letters,
        len(letters_new) / letters,
        2 * sum(shared) / (len(gold.stems) + len(stems)),
        (len(fresh) - len(other)) / max(len(fresh), 1),
        len(fresh),
        math.log1p(len(stems)),
        answer.count(",") + answer.count(" and ") + answer.count(" or "),
        stems[0] in gold.counts and stems[0] not in gold.question_stems,
        len(gold.question.keys() & places.keys()) / max(len(gold.question), 1),
        near,
        same,
        len(capitals),
        sum(index < first for index in capitals),
        0 if _HEDGES.isdisjoint(texts) else sum(text in _HEDGES for text in texts),
        negated,
        negated != gold.negated,
        *_numbers(gold, said),
    ]


def _said(answer: str) -> _Said:
    """Returns an answer's words, without places if there are none."""
    every = words(answer)
    stems, texts, capital, stop, numbers, _ = zip(*every, strict=True) if every else [()] * 6
    content = [index for index, skipped in enumerate(stop) if not skipped]
    ends = [index for index, stem in enumerate(stems) if not stem]
    backwards = range(len(stems) - 1, -1, -1)
    places = dict(zip(reversed(stems), backwards, strict=True))  # the first, as the last to come
    places.pop("", None)
    return _Said(stems, texts, capital, numbers, content, ends, places)


def _without_ends(text: str) -> list[Word]:
    return [word for word in words(text) if word.role != "end"]


def _match(gold: Gold, said: _Said) -> list[tuple[float, int]]:
    """Returns how well each word of the gold is found in the answer, and where (-1: nowhere)."""
    _, texts, capital, _, content, _, places = said
    acronym_at = -1
    if gold.acronym:
        acronym_at = next((i for i in content if capital[i] and texts[i] == gold.acronym), -1)
    matches = []
    run_together = ""
    for word in gold.words:
        likeness, place = 0.0, places.get(word.stem, -1)
        if place >= 0:
            likeness = 1.0
        elif acronym_at >= 0 and word.capital:
            likeness, place = 1.0, acronym_at
        elif word.number is None and len(word.text) >= 4:
            for index in content:
                text = texts[index]
                if text[0] == word.text[0] and len(text) >= 4:
                    similar = similarity(word.text, text)
                    if similar > likeness:
                        likeness, place = similar, index
            if likeness < SIMILAR:
                likeness, place = likeness if likeness >= 0.6 else 0.0, -1
                if len(word.text) >= 6:  # "Varah Mihira" for Varahamihira
                    run_together = run_together or "".join([texts[i] for i in content])
                    likeness = 1.0 if word.text in run_together else likeness
        matches.append((likeness, place))
    return matches


def _longest_run(gold: tuple[str, ...], said: tuple[str, ...]) -> int:
    """Returns the most words of the gold that stand in a row in the answer."""
    best = 0
    for start, stem in enumerate(gold):
        longest = len(gold) - start
        if best >= longest:
            break
        at = -1
        for _ in range(said.count(stem)):
            at = said.index(stem, at + 1)
            while best < longest and gold[start : start + best + 1] == said[at : at + best + 1]:
                best += 1
    return best


def _question_around(gold: Gold, said: _Said, indices: list[int]) -> tuple[float, float]:
    """Returns the share of the question's words near what was found, and in its sentences."""
    if not indices:
        return -1.0, -1.0
    places, ends = said.places, said.ends
    sentences = {bisect.bisect(ends, index) for index in indices}
    near = same = total = 0.0
    for stem, weight in gold.question.items():
        total += weight
        if stem in places:
            place = places[stem]
            near += weight * math.exp(-min([abs(place - index) for index in indices]) / 6)
            same += weight * (bisect.bisect(ends, place) in sentences)
    return near / max(total, 1e-9), same / max(total, 1e-9)


def _numbers(gold: Gold, said: _Said) -> tuple[float, float, float]:
    """Returns the share of the gold's numbers found, the distance of the worst, and the others.

    Numbers of the question do not count as others, nor as near ones.
    """
    if not gold.numbers:
        return 1.0, 0.0, -1.0
    given = {said.stems[i]: n for i, n in enumerate(said.numbers) if n is not None}
    hits = sum(
        stem in given or stem.rstrip("s") in given or stem + "s" in given for stem in gold.numbers
    )
    new = {stem: value for stem, value in given.items() if stem not in gold.question_stems}
    distances = [
        min(
            (abs(value - other) / max(abs(value), abs(other), 1e-9) for other in new.values()),
            default=1.0,
        )
        for value in gold.numbers.values()
    ]
    extras = sum(stem not in gold.numbers for stem in new)
    return hits / len(gold.numbers), max(distances), min(extras, 5)


def _among(wanted: frozenset[str], texts: list[str]) -> set[str]:
    """Returns those of the trigrams that are in these words."""
    marked = f"^{'$^'.join(texts)}$"
    return {letters for letters in wanted if letters in marked}


def _trigrams(texts: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*[trigrams(text) for text in texts])
