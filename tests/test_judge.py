"""The offline judge: agreement with GPT-4.1 on real answers, and cases anyone would decide."""

import numpy as np
import pytest
import shared_data

from seal_jax import config, judge, judge_trees, judge_words
from seal_jax.errors import SealError

WHEN = "When did the Normans arrive?"


@pytest.mark.parametrize(
    ("question", "gold", "answer"),
    [
        (WHEN, "1066", "The Normans arrived in 1066."),
        (WHEN, "September 1066", "They came in September of 1066"),
        ("How many people live there?", "3 million", "About three million people live there."),
        ("How many people live there?", "3,000", "The town has 3000 inhabitants."),
        ("Who led them?", "William the Conqueror", "They were led by William the Conqueror."),
        ("Who led them?", "William the Conqueror", "william the conqueror"),
        ("What share voted?", "25%", "25 percent of them voted"),
        ("Where is it?", "Côte d'Azur", "On the Cote d'Azur"),
        ("When was it?", "January 2, 1971", "Passed on May 1, 1970, it began on 2 January 1971."),
        ("Where is it?", "Washington, D.C", "It is in Washington, D.C."),
        ("Where is it?", "U.S", "It is in the U.S., not in Canada."),
        ("When did he wake?", "1 a.m", "He woke at 1 a.m. with pains."),
        ("Which sign is it?", "+", "+"),
        ("What is its scope not?", "universal", "Its scope is not universal."),
        (WHEN, "1066", "Not only in 1066"),
        ("Who led them?", "William", "William, not Harold"),
        ("Which title is it?", "Politics and Polemics 1531–1546", "Politics and Polemics 1531–46"),
        ("Which centuries?", "6th and 7th centuries", "7th and 6th centuries"),
    ],
)
def test_the_right_answer_in_other_dress_is_right(question, gold, answer):
    assert judge.offline(question, gold, answer)
    assert judge.offline(f"Topic: Normans\n{question}", gold, answer)


@pytest.mark.parametrize(
    ("question", "gold", "answer"),
    [
        (WHEN, "1066", ""),
        (WHEN, "1066", " \n\t"),
        (WHEN, "1066", "The Normans arrived in 1067."),
        (WHEN, "1066", "The Normans arrived."),
        ("How many people live there?", "3 million", "About three thousand people live there."),
        ("Who led them?", "William the Conqueror", "They were led by Harold Godwinson."),
        ("Who led them?", "William", "I do not know."),
        ("Who led them?", "William", "It was not William."),
        ("Who led them?", "the king", "It was not the king."),
        ("Who led them?", "king", "It was not the king."),
        ("Who led them?", "William", "They weren't led by him; it wasn’t William but Harold."),
        ("When was the series shown?", "8 November 2010", "28 November 2010"),
        ("When was the series shown?", "September 30, 1960", "September 30, 1967."),
        ("When did it debut?", "November 3, 1975", "It was on November 4, 1975."),
        ("When did it debut?", "November 3, 1975", "It was on the 3rd of November, 1976."),
        ("What is the speed?", "3600 revolutions per minute", "3610 revolutions per minute"),
        ("How cold was it?", "-5", "5"),
        ("Which sign is it?", "+", "-"),
    ],
)
def test_a_wrong_or_blank_answer_is_wrong(question, gold, answer):
    assert not judge.offline(question, gold, answer)


@pytest.mark.parametrize("text", ["?", "…", "\u200b", "🙂", "٣", "x" * 100_000, "a b " * 20_000])
def test_odd_text_gets_a_verdict(text):
    for item in [(text, "gold", "answer"), ("q", text, "answer"), ("q", "gold", text)]:
        assert judge.offline(*item) in (True, False)


@pytest.mark.parametrize("digit", "❶➓⓿፩①²٣")
def test_every_kind_of_digit_gets_a_verdict(digit):
    assert judge.offline("How many?", f"{digit} bridges", f"There are {digit} bridges")
    assert not judge.offline(f"{digit}?", "three", f"{digit}{digit} of them")


def test_the_judge_agrees_with_gpt_4_1_on_real_answers():
    """Nearly every row was trained on: this guards the shipped weights, it measures nothing.

    Agreement on unseen articles is what `benchmarks/judge.py` measures.
    """
    rows = shared_data.read("grader/grader_public.jsonl")[::7]
    rows = [row for row in rows if row["answer"].strip()]
    same = [
        judge.offline(r["question"], r["gold"], r["answer"]) == bool(r["verdict"]) for r in rows
    ]
    assert sum(same) / len(same) > 0.88


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_one_row_gets_the_log_odds_it_gets_among_many(depth):
    rng = np.random.default_rng(depth)
    some = judge_trees.Trees(
        bias=0.5,
        features_td=rng.integers(7, size=(9, depth)),
        thresholds_td=rng.normal(size=(9, depth)),
        leaves_tl=rng.normal(size=(9, 1 << depth)),
    )
    rows_nf = rng.normal(size=(20, 7))
    one_n = [judge_trees.log_odds(some, row) for row in rows_nf]
    np.testing.assert_allclose(one_n, judge_trees.log_odds_many(some, rows_nf), rtol=1e-12)


def test_words_are_those_of_the_lines_with_an_end_between():
    one, other = "The U.S. won, 3", "million’s déjà\u00a0vu.\u2028Then…  no"
    lines = [judge_words.words(line) for line in (one, other)]
    (end,) = judge_words.words("\n")
    assert judge_words.words(f"{one}\n{other}") == [*lines[0], end, *lines[1]]
    assert [word.text for word in lines[1]] == "million deja vu  then  no".split(" ")


def test_the_verdict_does_not_depend_on_what_was_judged_before():
    items = [(WHEN, "1066", "in 1066"), ("Who?", "Bob", "It was Alice"), (WHEN, "1066", "1067")]
    forward = [judge.offline(*item) for item in items]
    assert [judge.offline(*item) for item in reversed(items)] == forward[::-1]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("rice", " rice", True),
        ("rice", "Rice.\nMore", True),
        ("rice", "rice pudding", False),
        ("1.5", "15", False),
        ("5", "-5", False),
        ("", "", False),
    ],
)
def test_exact_is_one_form_up_to_case_space_and_punctuation(gold, answer, right):
    assert judge.exact("q", gold, answer) is right


def test_load_gives_the_judge_the_settings_name():
    item = ("Who led them?", "William", "They were led by William")
    assert judge.load(config.Task(judge="offline"))([item]) == [True]
    assert judge.load(config.Task(judge="exact"))([item]) == [False]
    with pytest.raises(SealError, match="task.judge=model"):
        judge.load(config.Task(judge="model"))
