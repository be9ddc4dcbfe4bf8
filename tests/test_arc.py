"""Laws of the ARC task: ours where the reference is inconsistent, and the loops' interface."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from seal_jax import checkpoint, rewards
from seal_jax import config as config_lib
from seal_jax import tasks as task_lib
from seal_jax.batching import SelfEdit
from seal_jax.errors import SealError, SelfEditError
from seal_jax.tasks import Grade, arc
from seal_jax.tasks.arc import (
    augment,
    baselines,
    compact,
    edits,
    generate,
    grids,
    predict,
    tasks,
    voting,
)
from seal_jax.tasks.arc import submission as submissions
from seal_jax.tasks.arc import task as task_module
from seal_jax.tasks.registry import load_task

ROOT = Path(__file__).parents[1]
TASK = (
    "120/304/005>021/403/500|011/200/330>110/002/033|900/080/007>009/080/700"
    "||123/000/400>321/000/004"
)
ALL = dict(basic=True, size=True, chain=True, repeat=True)


def puzzle(code=TASK, key="p"):
    return dataclasses.replace(tasks.decode(code), id=key)


def rng(seed=0):
    return np.random.RandomState(seed)


def write(folder, **puzzles):
    """Writes challenges and solutions; returns their paths."""
    challenges, solutions = {}, {}
    for key, codes in puzzles.items():
        group = [tasks.decode(code) for code in codes]
        rows = [(a.tolist(), b.tolist()) for a, b in group[0].train]
        challenges[key] = {
            "train": [{"input": a, "output": b} for a, b in rows],
            "test": [{"input": one.test.input.tolist()} for one in group],
        }
        solutions[key] = [one.test.output.tolist() for one in group]
    paths = folder / "challenges.json", folder / "solutions.json"
    for path, content in zip(paths, (challenges, solutions), strict=True):
        path.write_text(json.dumps(content))
    return tuple(map(str, paths))


def settings(folder, form="llama", quirks=False, **puzzles):
    path, solutions = write(folder, **(puzzles or {"p": [TASK], "q": [TASK, TASK]}))
    group = config_lib.Arc(solutions=solutions, format=form, reference_quirks=quirks)
    return config_lib.Task(name="arc", path=path, arc=group, order_seed=None)


def test_translation_moves_input_and_output_alike_unless_quirks_are_asked_for():
    square = puzzle(
        "1000/0000/0000/0000>1000/0000/0000/0000||2000/0000/0000/0000>2000/0000/0000/0000"
    )
    own = [augment.apply(augment.TRANSLATION, square, rng(s)) for s in range(20)]
    assert all(np.array_equal(a, b) for one in own for a, b in one.train)
    assert len({tasks.code(one) for one in own}) > 5
    quirky = [augment.apply(augment.TRANSLATION, square, rng(s), True) for s in range(20)]
    assert any(not np.array_equal(a, b) for one in quirky for a, b in one.train)


def test_translation_draws_from_the_generator_it_is_given_unless_quirks_are_asked_for():
    before = rng(3).randint(1 << 30)
    for quirks in (False, True):
        own = rng(3)
        augment.apply(augment.TRANSLATION, puzzle(), own, quirks)
        assert (own.randint(1 << 30) == before) == quirks


def test_tasks_without_a_demonstration_are_made_only_under_quirks():
    two = dataclasses.replace(puzzle(), train=puzzle().train[:2])
    assert generate.initial_tasks(two, 2) == []
    assert [one.train for one in generate.initial_tasks(two, 2, True)] == [(), ()]
    one = dataclasses.replace(two, train=two.train[:1])
    assert all(query.task.train for query in predict.queries(one, rng()))
    assert not any(q.task.train for q in predict.queries(one, rng(), reference_quirks=True))


@pytest.mark.parametrize("quirks", [False, True])
def test_training_tasks_fit_are_unique_and_capped(quirks):
    every = dict(max_examples=1 << 30, reference_quirks=quirks)
    made = arc.augmented_tasks(puzzle(), edits.make(**ALL), rng(), **every)
    codes = [tasks.code(one) for one in made]
    assert len(codes) == len(set(codes)) > 100
    few = arc.augmented_tasks(puzzle(), edits.make(**ALL), rng(), max_examples=7)
    assert len(few) == 7 and [tasks.code(one) for one in few] != codes[:7]  # not only the first
    wide = puzzle("/".join(["1" * 16] * 3) + ">2|3>4||5>6")
    assert all(map(tasks.fits, arc.augmented_tasks(wide, edits.make(**ALL), rng())))
    short = arc.augmented_tasks(puzzle(), edits.make(**ALL), rng(), count_tokens=lambda _: 8192)
    assert short == []


def test_the_test_output_never_reaches_training_data():
    other = dataclasses.replace(puzzle(), test=tasks.Pair(puzzle().test.input, None))
    one, two = (arc.augmented_tasks(each, edits.make(**ALL), rng()) for each in (puzzle(), other))
    assert [tasks.code(each) for each in one] == [tasks.code(each) for each in two]


def test_colour_maps_are_one_to_one_and_keep_black():
    for seed in range(200):
        draws = rng(seed)
        colours = set(draws.permutation(10)[: draws.randint(1, 11)].tolist())
        new = augment.colour_map(colours, draws)
        image = [new[colour] for colour in colours | {0}]
        assert new[0] == 0 and len(set(image)) == len(image) and set(image) <= set(range(10))


def test_answers_are_undone_to_the_form_of_the_test_input():
    asked = predict.queries(puzzle(), rng())
    assert {query.inverter for query in asked} == {None, *predict._UNDO}
    for query in asked:
        back = predict.undone(query.task.test.output, query.inverter)
        assert grids.same(back, puzzle().test.output)


def test_a_prompt_that_is_too_long_is_not_asked():
    assert predict.queries(puzzle(), rng(), max_tokens=10) == []


def test_votes_are_won_by_the_most_frequent_and_survive_odd_sizes():
    one, two, three = (grids.decode(code) for code in ("12/34", "1", "5/6"))
    found = [(one, None), (one, "Flip(0)"), (two, None), (one, "Flip(1)"), (two, "Flip(0)")]
    assert [grids.code(grid) for grid in arc.vote(found)] == ["12/34", "1"]
    assert [grids.code(grid) for grid in arc.vote([(three, None)] * 2)] == ["5/6", "5/6"]
    assert [grids.code(grid) for grid in arc.vote([two, one, one])] == ["12/34", "1"]  # bare
    listed = [[one.tolist(), None], [one.tolist(), "Flip(0)"], two.tolist()]  # as JSON has them
    assert [grids.code(grid) for grid in arc.vote(listed)] == ["12/34", "1"]
    assert arc.vote([]) == []
    empty = np.zeros((1, 0), np.int8)
    assert arc.vote([(empty, None), (empty.T, "Transpose()")])[0].size == 0
    assert grids.code(voting.majority([one, one, grids.decode("92/34")])) == "12/34"


def test_a_majority_takes_rows_of_every_grid_that_has_them():
    shown = [grids.decode(code) for code in ("12/34", "52/34", "52", "7/8/9")]
    assert grids.code(voting.majority(shown)) == "52/34"  # the third has a say in the first row
    turned = [grids.decode(code) for code in ("13/24", "53/24", "5/2", "789")]
    assert grids.code(voting.majority(turned, columns=True)) == "53/24"


def test_undone_in_another_way_predictions_count_among_all_alone():
    one, two = (grids.decode(code) for code in ("1", "2"))
    found = [(one, None), (two, "Rotate(90)"), (two, "Rotate(90)")]
    assert [grids.code(grid) for grid in arc.vote(found)] == ["1", "2"]
    found = [(one, None), (two, "Rotate(270)"), (two, "Rotate(270)")]
    assert [grids.code(grid) for grid in arc.vote(found)] == ["2", "1"]


def test_of_two_equal_grids_the_untransformed_is_the_second_attempt():
    top, plain, other = (grids.decode(code) for code in ("12", "22", "01"))
    found = [(other, "Flip(1)"), (top, "Rotate(270)"), (top, "Flip(0)"), (plain, None)]
    assert [grids.code(grid) for grid in arc.vote(found)] == ["12", "22"]


def test_submissions_are_read_back_and_bad_ones_refused(tmp_path):
    path = tmp_path / "submission.json"
    made = submissions.build([puzzle()], {"p-0": [puzzle().test.output]})
    submissions.write(path, made)
    assert submissions.read(path) == made
    assert made["p"][0]["attempt_2"] == [[0]]
    assert arc.score([puzzle()], made)["competition"] == [1.0, 1, 1.0]
    with pytest.raises(SealError, match="'other' is not among"):
        arc.score([puzzle()], {"other": made["p"]})
    with pytest.raises(SealError, match=r"'p'\[0\]: expected 'attempt_1' and 'attempt_2'"):
        arc.score([puzzle()], {"p": [{"attempt_1": [[0]]}]})
    path.write_text('{"p": [{"attempt_1": [[10]], "attempt_2": [[0]]}]}')
    with pytest.raises(SealError, match=r"'p'\[0\].attempt_1"):
        submissions.read(path)
    path.write_text('{"p": []}')
    with pytest.raises(SealError, match="'p': expected a list with an entry"):
        submissions.read(path)
    bare = dataclasses.replace(puzzle(), test=puzzle().test._replace(output=None))
    with pytest.raises(SealError, match="has no solution to score with"):
        arc.score([bare], made)


def test_a_solutions_file_with_another_number_of_grids_is_refused(tmp_path):
    chosen = settings(tmp_path)
    with open(chosen.arc.solutions, "w") as out:
        json.dump({"p": [[[1]], [[2]]], "q": [[[1]], [[2]]]}, out)
    with pytest.raises(SealError, match="'p': expected a list of 1 grids"):
        load_task(chosen)


def test_a_grid_has_at_most_thirty_rows_and_columns():
    for shape, fits in (((30, 30), True), ((31, 2), False), ((2, 31), False)):
        grid = np.ones(shape, np.int8)
        assert grids.fits(grid) == fits
        assert (grids.parse_grid(grids.list_text(grid)) is not None) == fits


def test_a_translation_may_go_as_far_as_the_largest_grid():
    small, large = np.array([[1]], np.int8), np.arange(9, dtype=np.int8).reshape(3, 3)
    task = tasks.ArcTask((tasks.Pair(small, large),), tasks.Pair(small, small), "p")
    draws = (augment.translated(task, np.random.RandomState(seed)) for seed in range(40))
    moved = {made.train[0].output.tobytes() for made in draws}
    assert len(moved) == 9  # every shift of it


def test_the_fixed_configuration_is_the_reference_s_but_for_the_tiny_model_s_rate():
    for form, rate in (("llama", 1e-4), ("compact", 5e-3)):
        edit = edits.parse_self_edit(baselines.fixed(form))
        assert edit == edits.make(basic=True, learning_rate=rate, epochs=2)


def test_a_grid_of_configurations_has_every_choice_once_and_random_ones_reach_all():
    losses = ("train_using_all_tokens", "train_using_output_tokens")
    for form, rates in (("llama", (2e-4, 1e-4)), ("compact", (1e-2, 3e-3))):
        wanted = itertools.product(losses, rates, ((False, 8), (False, 4), (True, 2), (True, 1)))
        made = [edits.parse_self_edit(text) for text in baselines.grid(form)]
        assert sorted(map(edits.text, made)) == sorted(
            edits.text(edits.make(basic=basic, strategy=loss, learning_rate=rate, epochs=epochs))
            for loss, rate, (basic, epochs) in wanted
        )
    drawn = [baselines.random(np.random.default_rng(seed)) for seed in range(400)]
    assert {edit.training.num_train_epochs for edit in drawn} == set(range(1, 9))
    assert len({edit.training.learning_rate for edit in drawn}) == 30
    flags = np.array([list(edit.data_generation.model_dump().values()) for edit in drawn])
    assert np.all(np.abs(flags.mean(0) - 0.5) < 0.1)  # 4 standard errors


def test_the_size_of_the_task_parts_training_from_held_out_puzzles(tmp_path):
    chosen = settings(tmp_path)
    for size, parts in ((0, (["p", "q"], [])), (1, (["p"], ["q"]))):
        made = load_task(dataclasses.replace(chosen, size=size))
        assert tuple([x.id for x in some] for some in (made.contexts, made.held_out)) == parts


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"a": {"train": []}}', "task 'a': has no list 'test'"),
        ('{"a": {"test": [{"input": [[1]]}]}}', "task 'a': has no list 'train'"),
        ('{"a": {"train": [{"input": [[1]]}], "test": [{}]}}', r"train\[0\]: expected"),
        ('{"a": {"train": [], "test": [{"input": [[1, 2], [3]]}]}}', "equal length"),
        (
            '{"a": {"train": [{"input": [[1]], "output": null}], "test": []}}',
            r"train\[0\]: expected",
        ),
        ('{"a": {"train": [], "test": [{"input": ["12"]}]}}', "list of rows of equal length"),
        (json.dumps({"a": {"train": [], "test": [{"input": [[1] * 31]}]}}), "at most 30 rows"),
        ('{"a": {"train": [3], "test": []}}', r"train\[0\]: expected"),
        ('{"a": {"train": [], "test": [{"input": [[1.0]]}]}}', "integers from 0 to 9"),
        ('{"a": {"train": [], "test": [{"input": [[true]]}]}}', "integers from 0 to 9"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_files_are_refused_with_file_and_task(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(SealError, match=message) as caught:
        arc.load(path)
    assert str(path) in str(caught.value)


def test_the_interface_of_the_loops(tmp_path):
    made = load_task(settings(tmp_path))
    assert [context.id for context in made.contexts] == ["p", "q"]
    context = made.contexts[1]  # two test inputs
    questions = made.questions(context)
    first = sum(question.text.startswith("q-0") for question in questions)
    assert 0 < first < len(questions)
    assert not any(q.prompt.startswith("<|begin_of_text|>") for q in questions)  # one BOS
    perfect = [question.gold for question in questions]
    assert made.grade(context, perfect) == task_lib.Grade(1.0, (True,) * len(perfect))
    half = perfect[:first] + ["[[0]]"] * (len(perfect) - first)
    assert made.grade(context, half).reward == 0.0  # every test input must be right
    assert made.grade(context, ["nonsense"] * len(perfect)) == (0.0, (False,) * len(perfect))
    with pytest.raises(SealError, match="questions"):
        made.grade(context, perfect[1:])
    text = edits.text(edits.make(**ALL, strategy="train_using_all_tokens", epochs=3))
    edit = made.edit(context, text)
    assert (edit.learning_rate, edit.epochs, edit.loss_on) == (1e-4, 3, "all")
    assert len(edit.examples) == len({example for example in edit.examples}) > 100
    with pytest.raises(SelfEditError):
        made.edit(context, "{}")


def test_no_draw_depends_on_company_or_order(tmp_path):
    both = load_task(settings(tmp_path))
    one = task_module.make({"q": both.contexts[1].data}, settings(tmp_path))
    text = edits.text(edits.make(**ALL))
    both.questions(both.contexts[0])
    assert both.questions(both.contexts[1]) == one.questions(one.contexts[0])
    assert both.edit(both.contexts[1], text) == one.edit(one.contexts[0], text)
    other = dataclasses.replace(settings(tmp_path), seed=1)
    assert task_module.make({"q": one.contexts[0].data}, other).edit(
        one.contexts[0], text
    ) != one.edit(one.contexts[0], text)


def test_quirks_keep_the_second_bos_and_the_trailing_header(tmp_path):
    made = load_task(settings(tmp_path, quirks=True))
    edit = made.edit(made.contexts[0], edits.text(edits.make()))
    assert edit.examples[0].prompt.startswith("<|begin_of_text|>")
    assert edit.examples[0].completion.endswith(
        "#<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_puzzles_without_solutions_are_refused(tmp_path):
    chosen = settings(tmp_path)
    bare = dataclasses.replace(chosen, arc=dataclasses.replace(chosen.arc, solutions=None))
    with pytest.raises(SealError, match="p-0 has no solution; see task.arc.solutions"):
        load_task(bare)
    apart = dataclasses.replace(chosen, held_out=chosen.path)
    with pytest.raises(SealError, match="see task.arc.held_out_solutions"):
        load_task(apart)
    same = dataclasses.replace(
        chosen,
        held_out=chosen.path,
        arc=dataclasses.replace(chosen.arc, held_out_solutions=chosen.arc.solutions),
    )
    with pytest.raises(SealError, match="every puzzle in it is also trained on"):
        load_task(same)


def test_compact_texts_are_read_back(tmp_path):
    for code in ("0", "12/34", "/".join(["0123456789" * 3] * 30)):
        grid = grids.decode(code)
        text = " ".join(compact.grid_words(grid))
        assert grids.same(compact.parse_grid(text), grid)
        assert compact.parse_grid(text + " 11./") is None
        assert compact.parse_grid(text.replace(" 11", " 12", 1)) is None  # a cell out of place
    made = load_task(settings(tmp_path, form="compact"))
    golds = [question.gold for question in made.questions(made.contexts[0])]
    assert made.grade(made.contexts[0], golds).reward == 1.0
    edit = made.edit(made.contexts[0], made.references["fixed"](made.contexts[0]))
    words = " ".join(example.prompt + " " + example.completion for example in edit.examples).split()
    assert set(words) <= {*compact.WORDS, compact.END}
    assert set(made.prompt(made.contexts[0]).split()) <= {*compact.WORDS, compact.END}


SCRIPT = """
import dataclasses, hashlib, json, numpy as np
from seal_jax import config
from seal_jax.tasks.arc import edits, task, tasks, vote
from seal_jax.tasks.arc import augmented_tasks
one = dataclasses.replace(tasks.decode(TASK), id="p")
edit = edits.make(True, True, True, True)
made = augmented_tasks(one, edit, np.random.RandomState(0), max_examples=60)
whole = task.make({"p": (one,)}, config.Task())
context = whole.contexts[0]
votes = vote([(pair.input, name) for pair in one.train for name in (None, "Flip(0)")])
seen = [list(map(tasks.code, made)), [grid.tolist() for grid in votes],
        whole.edit(context, edits.text(edit)), whole.questions(context)]
print("digest", hashlib.sha256(json.dumps(seen).encode()).hexdigest())
"""


def test_order_does_not_depend_on_the_hash_seed():
    digests = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", f"TASK = {TASK!r}\n" + SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(next(line for line in done.stdout.splitlines() if line.startswith("digest")))
    assert len(digests) == 1


def test_a_batch_in_which_nothing_can_be_asked_gets_nothing():
    cfg = config_lib.load_config(ROOT / "configs" / "arc_tiny.yaml")
    grid = lambda seed: np.random.default_rng(seed).integers(0, 10, (12, 12)).astype(np.int8)
    pairs = [tasks.Pair(grid(i), grid(i + 9)) for i in range(4)]
    large = tasks.ArcTask(tuple(pairs[:3]), pairs[3], "large")
    task = task_module.make({"large": (large,)}, cfg.task)
    assert not task.questions(task.contexts[0])
    lm = checkpoint.load_model(cfg.model)
    written = [SelfEdit(task.contexts[0], 0, edits.text(edits.make()))]
    ((outcomes, _),) = rewards.evaluate(lm, task, written, jax.random.key(0), cfg)
    assert [x.grade.reward for x in outcomes] == [0.0] and outcomes[0].answers == []


def test_what_changes_nothing_is_not_rewarded_unless_as_the_bare_model():
    cfg = config_lib.load_config(ROOT / "configs" / "arc_tiny.yaml")
    assert cfg.inner.warmup_steps and not cfg.outer.reward_untrained
    task = load_task(cfg.task)
    # Whatever is answered is right.
    task = task._replace(grade=lambda context, answers: Grade(1.0, (True,)))
    lm = checkpoint.load_model(cfg.model)
    made = lambda **own: edits.text(edits.make(**own))
    written = [
        SelfEdit(task.contexts[0], 0, made(learning_rate=0.0, epochs=2)),
        SelfEdit(task.contexts[0], 1, made(learning_rate=1e-4, epochs=2)),
        SelfEdit(task.contexts[0], 2, "no self-edit"),
    ]
    for untrained, expected in ((False, [0.0, 1.0, 0.0]), (True, [1.0, 1.0, 1.0])):
        outer = dataclasses.replace(cfg.outer, reward_untrained=untrained)
        own = dataclasses.replace(cfg, outer=outer)
        found = rewards.evaluate(lm, task, written, jax.random.key(0), own)
        outcomes = sorted((x for part, _ in found for x in part), key=lambda x: x.at)
        assert [x.grade.reward for x in outcomes] == expected
        assert [bool(x.steps) for x in outcomes] == [False, True, False]


def test_another_kind_of_generator_is_refused():
    with pytest.raises(TypeError, match="RandomState"):
        arc.augmented_tasks(puzzle(), edits.make(**ALL), np.random.default_rng(0))


@pytest.mark.parametrize("text", ["[[0 1][2 3]]", "5]0", "[[0 1]]][[2 3]]"])
def test_digits_that_only_a_bracket_parts_are_no_grid(text):
    """The reference takes them for one number."""
    assert grids.parse_grid(text) is None
    assert grids.parse_grid(text.replace("]", "]\n", 1)) is not None
