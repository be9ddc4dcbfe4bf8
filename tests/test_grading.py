"""Grading by a model: the reference's prompt to the byte, and how replies are read."""

import shared_data

from seal_jax.tasks import grading


def test_grading_prompts_are_the_reference_s():
    for case in shared_data.read("ki_goldens/answer_and_grade_prompts.json"):
        for item, answer, expected in zip(
            case["eval_questions"], case["preds"], case["grade_prompts"], strict=True
        ):
            assert grading.prompt(item["question"], item["answer"], answer) == expected


def test_replies_are_read_as_the_reference_reads_them():
    for case in shared_data.read("ki_goldens/parse_yes_no.json"):
        assert grading.parse_yes_no(case["text"]) is case["expected"], case["text"]


def test_a_reply_counts_only_as_the_word_yes_without_the_word_no():
    assert grading.parse_yes_no("Verdict: YES, indeed.")
    assert not grading.parse_yes_no("Yesterday, eyes")
    assert not grading.parse_yes_no("Yes. Or rather: No")
    assert grading.parse_yes_no("yes, I know nothing against it")


def test_blank_answers_are_wrong_and_never_graded():
    items = [("q", "g", answer) for answer in ("", " \n", "g", "x")]
    seen = []

    def judge(asked):
        seen.extend(asked)
        return [answer == "g" for _, _, answer in asked]

    assert grading.verdicts(items, judge) == [False, False, True, False]
    assert seen == items[2:]
    assert grading.verdicts(items[:2], lambda asked: 1 / 0) == [False, False]
