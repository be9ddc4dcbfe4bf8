"""Laws of the tiny grids: families kept apart, balanced tasks, sequences that a seed decides."""

import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from seal_jax import checkpoint, sampling
from seal_jax import config as config_lib
from seal_jax.errors import SelfEditError
from seal_jax.tasks import arc
from seal_jax.tasks.arc import compact, tasks
from seal_jax.tasks.registry import load_task
from seal_jax.tiny import grid_tokens, grids, rules

FAMILIES = [(split, name) for split, group in rules.SPLITS.items() for name in group]


def sequences(count, **options):
    return [grids.sequence(grids._rng("test", i), **options) for i in range(count)]


def test_no_family_is_in_two_splits():
    assert len({name for _, name in FAMILIES}) == len(FAMILIES) >= 30
    draws = [family.draw for group in rules.SPLITS.values() for family in group.values()]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("split, name", FAMILIES)
@pytest.mark.parametrize("shape", [(3, 3), (4, 6)])
def test_a_task_follows_one_rule_and_says_enough(split, name, shape):
    family = rules.SPLITS[split][name]
    for seed in range(8):
        pairs = grids.make_task(family, np.random.default_rng(seed), shape)
        again = grids.make_task(family, np.random.default_rng(seed), shape)
        assert list(map(tasks.pair_code, pairs)) == list(map(tasks.pair_code, again))
        *train, test = pairs
        assert all(
            1 <= min(grid.shape) and max(grid.shape) <= 12 for pair in pairs for grid in pair
        )
        assert all(grid.dtype == np.int8 and 0 <= grid.min() <= grid.max() <= 9 for grid in test)
        seen = set().union(*(np.unique(pair.input).tolist() for pair in train))
        assert set(np.unique(test.input).tolist()) <= seen  # every colour was shown
        assert not np.array_equal(*test)  # copying the input is no answer
        if family.fixed:
            assert {pair.input.shape for pair in pairs} == {shape}


def test_rules_do_what_their_names_say():
    grid = np.array([[1, 0, 2], [0, 1, 0], [2, 2, 0]], np.int8)
    draw, palette = np.random.default_rng(0), [0, 1, 2]

    def images(name):
        family = next(group[name] for group in rules.SPLITS.values() if name in group)
        made = (family.draw(draw, grid.shape, palette)(grid) for _ in range(60))
        return {tuple(map(tuple, image.tolist())) for image in made}

    assert images("gravity") == {
        ((0, 0, 0), (1, 1, 0), (2, 2, 2)),
        ((1, 1, 2), (2, 2, 0), (0, 0, 0)),
        ((1, 2, 0), (1, 0, 0), (2, 2, 0)),
        ((0, 1, 2), (0, 0, 1), (0, 2, 2)),
    }
    assert images("shift") == {
        ((0, 0, 0), (1, 0, 2), (0, 1, 0)),
        ((0, 1, 0), (2, 2, 0), (0, 0, 0)),
        ((0, 1, 0), (0, 0, 1), (0, 2, 2)),
        ((0, 2, 0), (1, 0, 0), (2, 0, 0)),
    }
    assert images("antitranspose") == {((0, 0, 2), (2, 1, 0), (2, 0, 1))}
    assert images("copy_column") == {((2, 2, 2), (0, 0, 0), (0, 0, 0))}
    assert images("overlay") == {
        ((1, 2, 2), (0, 1, 0), (2, 2, 2)),
        ((1, 0, 2), (0, 1, 0), (2, 2, 2)),
    }
    assert images("symmetry") == {
        ((1, 0, 1), (0, 1, 0), (2, 2, 2)),
        ((1, 0, 2), (0, 1, 0), (1, 0, 2)),
    }
    assert images("recolour_row") >= {((2, 0, 1), (0, 1, 0), (2, 2, 0))}
    assert images("keep_column") == {
        ((1, 0, 0), (0, 0, 0), (2, 0, 0)),
        ((0, 0, 0), (0, 1, 0), (0, 2, 0)),
        ((0, 0, 2), (0, 0, 0), (0, 0, 0)),
    }
    assert images("last_row") == {((2, 2, 0),) * 3}


def test_held_out_tasks_are_many_balanced_and_new():
    made = load_task(config_lib.Task(name="tiny-grids"))
    assert len(made.contexts) >= 12 and len(made.held_out) >= 24
    for contexts, group in ((made.contexts, rules.RL), (made.held_out, rules.HELD_OUT)):
        names = [context.id.rsplit("-", 2)[0] for context in contexts]
        assert set(names) == set(group)
        assert len({names.count(name) for name in group}) == 1  # each equally often
    every = [*made.contexts, *made.held_out]
    codes = [tasks.code(context.data[0]) for context in every]
    assert len(set(codes)) == len(codes) == len({context.id for context in every})
    shapes = [context.data[0].test.input.shape for context in every]
    assert set(shapes) == {(3, 3)}
    other = load_task(config_lib.Task(name="tiny-grids", seed=1))
    assert not set(codes) & {tasks.code(context.data[0]) for context in other.contexts}


def test_the_task_trains_and_grades_through_the_compact_text():
    made = load_task(config_lib.Task(name="tiny-grids", size=4))
    known = {*compact.WORDS, compact.END}
    for context in made.contexts:
        questions = made.questions(context)
        assert made.grade(context, [question.gold for question in questions]).reward == 1
        written = [made.references[name](context) for name in ("random", "oracle")]
        for text in [*sum(written, []), made.references["fixed"](context)]:
            edit = made.edit(context, text)
            assert edit.examples and edit.loss_on in ("all", "output")
            shown = " ".join(example.prompt + " " + example.completion for example in edit.examples)
            assert set(shown.split()) <= known
        assert made.prompt(context).endswith(f"{compact.END} {compact.EDIT}")


def test_sequences_have_the_weights_of_their_parts():
    for words, weights in sequences(300):
        assert len(words) == len(weights) and weights[0] == 0
        text = " ".join(words)
        body, _, edit = text.partition(f" {compact.EDIT} ")
        outputs = [part.split(f" {compact.OUTPUT} ")[1] for part in body.split("I ")[1:]]
        first, later = len(outputs[0].split()), sum(len(each.split()) for each in outputs[1:])
        assert weights.count(grids.FIRST_OUTPUT_WEIGHT) == first
        assert weights.count(grids.OUTPUT_WEIGHT) == later
        assert weights.count(grids.EDIT_WEIGHT) == len(edit.split())
        assert words[-1] == compact.END and 2 <= len(outputs) <= 5
        for output in outputs:
            assert output.split()[-1] == compact.END  # an answer always ends alike
            assert compact.parse_grid(output.strip().removesuffix(compact.END)) is not None


def test_the_told_share_of_sequences_ends_in_a_self_edit_and_a_few_are_malformed():
    texts = [" ".join(words) for words, _ in sequences(3000)]
    written = [text.split(" E ")[1].removesuffix(compact.END) for text in texts if " E " in text]
    assert abs(len(written) / len(texts) - grids.SELF_EDITS) < 0.05
    valid = []
    for text in written:
        try:
            valid.append(arc.parse_self_edit(text))
        except SelfEditError:
            pass
    share = 1 - len(valid) / len(written)
    assert 0.03 < share < 0.09
    rates = {edit.training.learning_rate for edit in valid}
    assert rates == {float(rate) for rate in compact.RATES}
    assert {edit.training.num_train_epochs for edit in valid} == set(range(1, 9))
    flags = np.array([list(edit.families.values()) for edit in valid])
    assert np.all(abs(flags.mean(0) - 0.5) < 0.06)


def test_most_pretraining_grids_are_three_by_three():
    first = [" ".join(words[1:3]) for words, _ in sequences(1000)]
    assert abs(first.count("h3 w3") / len(first) - (1 - grids.LARGE)) < 0.05
    assert all(
        text.startswith("I h3 w3") for text in (" ".join(w) for w, _ in sequences(50, large=0))
    )


def test_a_seed_decides_the_tokens_in_every_process():
    made = list(itertools.islice(grids.pretraining_sequences(5), 20))
    for ids, weights in made:
        assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights)
    assert not any(grid_tokens.IDS[grid_tokens.UNKNOWN] in ids for ids, _ in made)
    script = (
        "import itertools, json; from seal_jax.tiny import grids\n"
        "made = itertools.islice(grids.pretraining_sequences(5), 20)\n"
        "print('ids', json.dumps([ids.tolist() for ids, _ in made]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ids "))
    assert json.loads(line[4:]) == [ids.tolist() for ids, _ in made]


def test_the_built_in_model_writes_self_edits_that_the_real_parser_takes():
    lm = checkpoint.load_model("tiny-grids", dtype="float32")
    made = load_task(config_lib.Task(name="tiny-grids"))
    prompts = [[sampling.encode(lm, made.prompt(context)) for context in made.contexts[:4]]]
    some = {"samples": 8, "max_tokens": 64, "temperature": 1.0, "key": jax.random.key(0)}
    written = [one for row in sampling.decode(lm, prompts, **some)[0] for one in row]
    found = []
    for one in written:
        try:
            found.append(arc.parse_self_edit(sampling.text(lm, one)))
        except SelfEditError:
            pass
    assert len(found) > 0.8 * len(written)  # 6% malformed in pretraining
    assert len(set(found)) > 0.9 * len(found)  # no configuration is preferred before RL


def test_cells_are_trained_in_parts_that_tell_all_words_apart():
    parts_vp = grid_tokens.word_parts()
    assert parts_vp.shape[0] == len(grid_tokens.VOCABULARY)
    np.testing.assert_allclose((parts_vp**2).sum(1), 1.0, rtol=1e-6)
    assert len({row.tobytes() for row in parts_vp}) == len(parts_vp)
    shared = lambda a, b: int(
        ((parts_vp[grid_tokens.IDS[a]] * parts_vp[grid_tokens.IDS[b]]) > 0).sum()
    )
    assert shared("12a", "12b") == 4 and shared("12a", "13a") == 3  # all but colour; row, colour
    assert shared("13a/", "13a") == 3 and shared("12a", "I") == 0  # another cell comes next
