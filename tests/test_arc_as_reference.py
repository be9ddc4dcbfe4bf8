"""ARC where the recorded cases do not reach: odd puzzles, replies and files, as the reference."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import toys

from seal_jax import config
from seal_jax.errors import SelfEditError
from seal_jax.tasks import arc
from seal_jax.tasks.arc import augment, grids, predict, prompts, replies, tasks, voting
from seal_jax.tasks.arc import submission as submissions
from seal_jax.tasks.arc import task as arc_task

FLAGS = {f"use_{name}_augmentations": False for name in ("basic", "size", "chain", "repeat")}


def reply(flags=FLAGS, more=None, **training):
    return json.dumps({"data_generation": flags, "training": training} | (more or {}))


def full(**own):
    return {"strategy": "train_using_output_tokens", "learning_rate": 1e-4} | own


def rng(seed=0):
    return np.random.RandomState(seed)


def test_colours_are_drawn_for_in_the_order_in_which_a_set_meets_them():
    """1 and 9 want the same slot of a small set: who comes first gets a colour first."""
    maps = []
    for code in ("1190>9||9>1", "9910>1||1>9"):
        one = tasks.decode(code)
        made = augment.recoloured(one, rng())
        pairs = zip(tasks.grids_of(one), tasks.grids_of(made), strict=True)
        maps.append({int(a): int(b) for x, y in pairs for a, b in zip(x.flat, y.flat, strict=True)})
    free = list({2, 3, 4, 5, 6, 7, 8})
    rng().shuffle(free)
    assert maps == [{0: 0, 1: free[-1], 9: free[-2]}, {0: 0, 9: free[-1], 1: free[-2]}]


@pytest.mark.parametrize(
    "text, code",
    [
        ("The answer:\n```\n[[0 1]\n [2 3]]\n```\nDone.", "01/23"),
        ("```\n[[0]]\n``` or ```\n[[1]]\n```", "0"),
        ("[[0 1]\n [2 3]]#[[4 5]]", None),
        ("[[0 1]\n [2 3]]#assistant", None),
        ("[[0 1]]# 2", "012"),
        ("#[[7]]##", "7"),
    ],
)
def test_fences_and_hashes_in_replies(text, code):
    for parse in (grids.parse_grid, grids.decode_as_reference):
        grid = parse(text)
        assert (None if grid is None else grids.code(grid)) == code


def test_what_a_fence_closes_alone_is_a_grid_without_columns():
    assert grids.decode_as_reference("[[1]]```").shape == (1, 0)
    assert grids.parse_grid("[[1]]```") is None
    assert grids.decode_as_reference("[[" + "1 " * 5000 + "]]").shape == (1, 5000)


@pytest.mark.parametrize("quirks", [False, True])
def test_the_right_answers_as_they_are_trained_on_solve_a_puzzle(quirks):
    one = dataclasses.replace(tasks.decode("12>3|45>6||78>9"), id="p")
    settings = config.Task(arc=config.Arc(reference_quirks=quirks))
    task = arc_task.make({"p": (one,)}, settings)
    golds = [question.gold for question in task.questions(task.contexts[0])]
    assert task.grade(task.contexts[0], golds).reward == 1.0


def test_a_symmetric_task_is_not_asked_twice():
    one = dataclasses.replace(tasks.decode("1>2|3>4||5>6"), id="p")
    asked = predict.queries(one, rng(), reference_quirks=True)
    assert [query.inverter for query in asked] == [None, None]
    mirrored = dataclasses.replace(tasks.decode("11/23>4||55/67>8"), id="p")
    made = predict.transformed([mirrored, tasks.decode("11/32>4||55/76>8")], rng())
    assert "Flip(1)" not in [query.inverter for query in made]
    assert len({tasks.code(query.task) for query in made}) == len(made)


def test_where_every_prompt_is_too_long_one_more_demonstration_is_left_out():
    one = dataclasses.replace(tasks.decode("12>3|45>6|78>9||11>2"), id="p")
    count = lambda task: len(task.train)
    for quirks in (False, True):
        ask = lambda most, quirks=quirks: predict.queries(
            one, rng(), max_tokens=most, count_tokens=count, reference_quirks=quirks
        )
        assert {len(query.task.train) for query in ask(3)} == {2}
        assert {len(query.task.train) for query in ask(2)} == {1}  # 2 are not shorter than 2
        assert ask(1) == []


def test_differences_are_written_as_numpy_prints_them():
    one = tasks.decode("01/20>10/20|1>1||33>39")
    made = prompts.chat(one, "diff_format")
    assert made.question[0].content.endswith(
        "The input-diff grids are provided as python arrays:\n"
        "[[0 1]\n [2 0]] ->  + [[1 -1]\n [0 0]]#\n[[1]] ->  + [[0]]#\n"
    )
    assert made.question[1].content == "[[3 3]] -> " and made.answer.content == " + [[0 6]]#"
    unknown = dataclasses.replace(one, test=tasks.Pair(one.test.input, None))
    assert prompts.chat(unknown, "diff_format").answer.content == " + [[0 0]]#"
    wide = tasks.decode("9" * 30 + ">" + "0" * 30 + "||1>1")
    assert prompts.chat(wide, "diff_format").question[0].content.count("-9\n -9") == 1
    assert prompts.chat(tasks.decode("1>11||1>1"), "diff_format") is None


def test_a_submission_ends_with_the_last_attempted_test_input():
    asked = [dataclasses.replace(tasks.decode("1>1||1>2"), id="p", index=i) for i in range(3)]
    first, second = ({f"p-{i}": [[[2]]]} for i in (0, 1))
    one, two = (submissions.build(asked, found) for found in (first, second))
    assert (len(one["p"]), len(two["p"])) == (1, 2)
    assert two["p"][0] == {"attempt_1": [[0]], "attempt_2": [[0]]}
    scores = arc.score(asked, one)  # not solved: two test inputs were not submitted
    assert scores["correct"] == {"p": False} and scores["competition"] == [0.0, 1, 0.0]
    assert scores["per_prediction"] == [1.0, 1, 1.0]
    assert arc.score(asked, two, subpoints=True)["competition"] == [1 / 3, 1, 1 / 3]


def test_what_is_missing_in_a_reply_takes_the_rest_along():
    """Where one directive of training is missing, none of them is kept."""
    nothing = {"strategy": "train_using_all_tokens", "learning_rate": 0, "num_train_epochs": 0}
    for training in (
        {"strategy": "train_using_output_tokens", "num_train_epochs": 2},
        {"learning_rate": 1e-3, "num_train_epochs": 2},
        {"strategy": "other", "num_train_epochs": 2},
        full(),
    ):
        assert replies.read(reply(**training)).config["training"] == nothing
    kept = replies.read(reply({}, **full(num_train_epochs=2)))
    assert kept.config["training"] == full(num_train_epochs=0) and not any(kept.families.values())


@pytest.mark.parametrize(
    "text, error",
    [
        ('{"data_generation": null}', "AttributeError"),
        ('{"data_generation": null, "training": {}}', "AttributeError"),
        ('{"data_generation": {}, "training": []}', "AttributeError"),
        (reply(**full(num_train_epochs=None)), "TypeError"),
        ('{"data_generation": ' + "1" * 5000 + "}", "ValueError"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_replies_that_crash_the_reference(text, error):
    with pytest.raises(SelfEditError, match=error):
        replies.read(text)


def test_repeated_replies_are_those_that_ask_for_the_same():
    def count(*texts):
        return len(replies.chosen(texts, len(texts), skip_repeated=True))

    base = full(num_train_epochs=2)
    assert count(reply(**base), reply(**full(num_train_epochs=2.0))) == 1
    assert count(reply(**base), reply(more={"why": 1}, **base)) == 1
    others = (reply(**(base | {"strategy": "x", "num_train_epochs": n})) for n in (1, 2))
    assert count(*others) == 2


@pytest.mark.parametrize("texts, most", [(250, 3), (125, 6), (107, 7), (3, 250), (1, 751)])
def test_the_limit_of_steps_counts_a_last_batch_as_it_is_filled(texts, most):
    for epochs, kept in ((most, most), (most + 1, 0)):
        made = replies.read(reply(**full(num_train_epochs=epochs))).limited(texts)
        assert made.epochs == made.config["training"]["num_train_epochs"] == kept
    settings = config.Inner(max_steps=replies.MAX_STEPS, batch_size=2)
    written = [";".join(["1 2"] * texts) + f";epochs={n}" for n in (most, most + 1)]
    errors = [made.error for made in toys.batch(written, settings).candidates]
    assert errors[0] is None and "more than 375" in errors[1]


def test_odd_numbers_of_epochs_slip_through():
    for epochs in ("NaN", "Infinity", "-3", "true", "2.5"):
        text = reply(**full(num_train_epochs=0)).replace('epochs": 0', f'epochs": {epochs}')
        made = replies.read(text)
        assert made.limited(250) is made
    assert replies.read(reply(**full(num_train_epochs=1e9))).limited(250).epochs == 0


def test_grids_without_rows_tie_as_numpy_sees_their_shapes():
    """A turned grid without columns has one side, (0,), to the reference."""
    found = [(np.zeros((1, 0), np.int8), None), (grids.decode("12/34"), None)]
    empty = max({(0,), (2, 2)}, key=[(0,), (2, 2)].count) == (0,)
    columns = voting.majority([grid for grid, _ in found], columns=True)
    assert columns.size == (0 if empty else 4)


def test_gzipped_files_are_read(tmp_path):
    tree = {"p": {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}}
    paths = [tmp_path / name for name in ("a.json", "a.json.gz")]
    for path, opener in zip(paths, (open, gzip.open), strict=True):
        with opener(path, "wt") as file:
            json.dump(tree, file)
    assert [tasks.code(arc.load(path)[0]) for path in paths] == ["1>2||3>3"] * 2
