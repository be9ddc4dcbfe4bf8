"""Laws of a loaded model as judge."""

import itertools

import pytest

from seal_jax import config, judge, judge_model
from seal_jax.errors import SealError

ITEMS = [("Q", "a", "a"), ("Q", "b", "c"), ("Q", "b", " "), ("Q", "a", "a")]


def ask(replies, items=ITEMS):
    """Returns the verdicts and the prompts that the model saw."""
    seen = []

    def generate(prompts):
        seen.extend(prompts)
        return replies[: len(prompts)]

    return judge.load(config.Task(judge="model"), generate)(items), seen


def test_each_distinct_answer_is_asked_about_once_and_blank_ones_never():
    verdicts, seen = ask([" Yes", "No, it is not."])
    assert verdicts == [True, False, False, True]
    assert len(seen) == 2
    assert "Gold answer: b\nStudent answer: c\n" in seen[1]


def test_an_odd_reply_counts_as_no_with_a_warning():
    with pytest.warns(UserWarning, match="1 of 2 replies .*'perhaps'.* count as no"):
        assert ask(["yes", "perhaps"])[0] == [True, False, False, True]


def test_a_model_that_says_neither_yes_nor_no_is_no_judge():
    own = judge.load(config.Task(judge="model"), lambda prompts: ["ba ba"] * len(prompts))
    with pytest.raises(SealError, match="50 of 50 replies say neither yes nor no"):
        own([("Q", "a", str(i)) for i in range(50)])


def test_odd_replies_of_a_few_passages_are_no_reason_to_stop():
    replies = itertools.cycle(["ba", "yes", "ba", "no", "no"])
    own = judge.load(config.Task(judge="model"), lambda asked: [next(replies) for _ in asked])
    with pytest.warns(UserWarning, match="1 of 1 replies"):
        assert own([("Q", "a", "b")]) == [False]
    with pytest.warns(UserWarning, match="32 of 78 replies"):
        for i in range(99):  # one question at a time, two in five of them odd
            own([("Q", "a", str(i))])


def test_a_run_s_own_model_is_asked_with_the_grading_prompt():
    replies = judge_model.replies_of(config.load_config(None, ["task.judge=model"]))
    (reply,) = replies(["Question: What grows in Nowhere? Answer:"])
    assert reply.strip()  # the tiny model answers with a word of its world, never yes or no
    with pytest.warns(UserWarning, match="2 of 2 replies say neither yes nor no"):
        judge.load(config.Task(judge="model"), replies)(ITEMS)
    assert judge_model.replies_of(config.load_config(None)) is None


def test_a_model_judge_needs_a_model():
    with pytest.raises(SealError, match="no model was given"):
        judge.load(config.Task(judge="model"))
