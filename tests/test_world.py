"""The tiny world: disjoint names, answerable passages, one way to cut text into tokens."""

import functools
import itertools
import random

import jax
import numpy as np
import pytest

from seal_jax import checkpoint, model, optim
from seal_jax.errors import SealError
from seal_jax.model import ModelConfig
from seal_jax.tasks import squad
from seal_jax.tiny import pretrain, tokens, world

SPLITS = ("known", "train", "held_out", "fresh")


@pytest.fixture(scope="module")
def lm():
    return checkpoint.load_model("tiny-world", dtype="float32")


def test_no_name_is_in_two_splits_or_twice_in_one():
    everything = [name for split in SPLITS for name in world.names(split)]
    assert len(everything) == len(set(everything)) == 240 + 8000 + 8000 + 43040
    drawn = {split: {c.title for c in world.contexts(split, 200, seed=3)} for split in SPLITS}
    assert all(len(titles) == 200 and titles <= set(world.names(s)) for s, titles in drawn.items())


def test_pretraining_names_no_training_or_held_out_entity():
    texts = itertools.islice(world.pretraining_texts(seed=1), 3000)
    words = {word.strip(".?,") for text in texts for word in "".join(text).split()}
    assert not words & {*world.names("train"), *world.names("held_out")}
    # The check can fail: the words of known and fresh entities are found by it.
    assert words & set(world.names("known")) and words & set(world.names("fresh"))


def test_known_entities_appear_only_without_a_passage():
    known = set(world.names("known"))
    for text in itertools.islice(world.pretraining_texts(seed=2), 3000):
        words = {word.strip(".?,") for word in "".join(text).split()}
        assert bool(words & known) == (text.prompt == "")


def test_contexts_depend_on_split_and_seed_only():
    few, many = world.contexts("train", 5, seed=1), world.contexts("train", 20, seed=1)
    assert few == many[:5] and [c.data for c in few] == [c.data for c in many[:5]]
    assert world.contexts("train", 5, seed=2) != few
    assert len({c.id for c in many}) == 20


def test_known_contexts_ask_for_the_facts_that_were_taught():
    facts = {thing.name: thing for thing in world.known()}
    assert all(facts[c.title] == c.data for c in world.contexts("known", 240, seed=5))


def test_too_many_contexts_are_refused():
    with pytest.raises(SealError, match="240 names"):
        world.contexts("known", 241)
    with pytest.raises(SealError, match="unknown split 'test'"):
        world.contexts("test", 1)


def test_passage_states_every_answer_and_the_name_once():
    for context in world.contexts("held_out", 100):
        words = [word.strip(".") for word in context.passage.split()]
        assert words.count(context.title) == 1
        assert len(context.questions) == 15
        for question in context.questions:
            assert question.gold in words
            assert context.title in question.text
            assert question.prompt == f"Question: {question.text} Answer:"


def test_questions_are_what_the_squad_task_asks():
    for context in world.contexts("held_out", 20):
        for question in context.questions:
            asked = squad.answer_prompt(context.title, question.text, style="compact")
            assert asked == question.prompt


def test_oracle_says_every_fact_by_name_and_as_an_answered_question():
    for context in world.contexts("train", 50):
        lines = world.oracle(context).split("\n")
        asked = {f"{q.prompt} {q.gold}" for q in context.questions}
        answered = [line for line in lines if line.startswith("Question:")]
        named = [line for line in lines if line not in answered]
        assert len(answered) == len(named) == 5 and set(answered) <= asked
        for value in context.data.values:
            assert any(line.endswith(f" {value}.") and context.title in line for line in named)
            assert any(line.endswith(f" {value}") for line in answered)


def test_styles_differ_in_what_they_give_away():
    thing = world.contexts("train", 1)[0].data
    edits = {s: world.self_edit(thing, s, 5, random.Random(0)) for s in world.STYLES}
    assert sum(world.STYLES.values()) == pytest.approx(1.0)
    for style in ("facts", "qa"):
        assert edits[style].count(thing.name) == 5
        assert all(value in edits[style] for value in thing.values)
    assert thing.name not in edits["pronoun"] and all(v in edits["pronoun"] for v in thing.values)
    assert not any(value in edits["vague"] for value in thing.values)


def test_seven_in_ten_hallucinated_values_are_wrong():
    rng, thing = random.Random(0), world.contexts("train", 1)[0].data
    lines = [world.line(thing, 0, "hallucinated", rng) for _ in range(1000)]
    wrong = sum(thing.values[0] not in line for line in lines) / len(lines)
    assert wrong == pytest.approx(0.7, abs=0.06)  # four standard errors


def test_shipped_tokenizer_is_the_one_training_makes(lm):
    made = tokens.train()
    assert made.get_vocab() == lm.tokenizer.get_vocab()
    assert made.eos_token_id == lm.tokenizer.eos_token_id in lm.config.eos_ids
    for text in itertools.islice(world.pretraining_texts(seed=3), 300):
        whole = text.prompt + text.completion
        assert made(whole)["input_ids"] == lm.tokenizer(whole)["input_ids"]


def test_tokenizer_gives_every_text_back(lm):
    texts = ["".join(text) for text in itertools.islice(world.pretraining_texts(seed=4), 300)]
    texts += ["Ünïcode — 東京 1853\n\n\ttabs", "", " "]
    for text in texts:
        assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"]) == text


def test_no_name_that_must_be_copied_is_a_token(lm):
    words = {lm.tokenizer.convert_tokens_to_string([token]) for token in lm.tokenizer.get_vocab()}
    names = {name for split in ("known", "train", "held_out") for name in world.names(split)}
    assert not {word.strip() for word in words} & names


def test_a_prompt_and_its_answer_are_cut_alike_apart_and_together(lm):
    cut = lambda text: lm.tokenizer(text)["input_ids"]
    for context in world.contexts("held_out", 20):
        for question in context.questions:
            together = cut(f"{question.prompt} {question.gold}")
            assert together == cut(question.prompt) + cut(f" {question.gold}")
        prompt = squad.prompt(context.title, context.passage, style="compact")
        edit = world.random_self_edit(context.data, random.Random(0))
        assert cut(prompt + edit) == cut(prompt) + cut(edit)


def test_packing_loses_cuts_and_repeats_nothing():
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 40, 400)
    texts = [
        (np.full(n, i + 10, np.int32), np.full(n, 0.5, np.float32)) for i, n in enumerate(sizes)
    ]
    too_long = (np.zeros(65, np.int32), np.ones(65, np.float32))
    batches = list(pretrain.packed(iter([too_long, *texts]), 0, rows=4, length=64))
    seen = []
    for batch in batches:
        for row, segments, weights in zip(*batch, strict=True):
            for segment in range(1, segments.max() + 1):
                (place,) = np.nonzero(segments == segment)
                assert place[-1] - place[0] + 1 == len(place)
                assert len(set(row[place])) == 1 and (weights[place] == 0.5).all()
                assert len(place) == sizes[row[place[0]] - 10]
                seen.append(row[place[0]])
            assert (row[segments == 0] == 0).all() and (weights[segments == 0] == 0).all()
    assert len(seen) == len(set(seen)) > 250
    assert np.mean([(b.segments_bt > 0).mean() for b in batches]) > 0.95


def test_rows_of_one_text_each_lose_none_and_are_alike_in_length():
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 40, 200)
    texts = (
        (np.full(n, 10 + i, np.int32), np.full(n, 0.5, np.float32)) for i, n in enumerate(sizes)
    )
    seen = []
    for batch in pretrain.bucketed(texts, 0, ((12, 4), (32, 3))):
        assert batch.tokens_bt.shape in {(4, 12), (3, 32)} and batch.segments_bt is None
        for row, weight in zip(batch.tokens_bt, batch.weights_bt, strict=True):
            n = sizes[row[0] - 10]
            assert (row[:n] == row[0]).all() and (row[n:] == 0).all()
            assert (weight[:n] == 0.5).all() and (weight[n:] == 0).all()
            assert (n > 12) == (len(row) == 32) and n <= 32
            seen.append(row[0])
    assert len(seen) == len(set(seen)) > (sizes <= 32).sum() - 7


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_pretraining_depends_on_its_seed_only_and_learns(kind):
    config = ModelConfig(64, 16, 1, 2, 2, 8, 32, tied=True, qkv_bias=True)
    text = (np.arange(10, dtype=np.int32), np.ones(10, np.float32))

    def start(params):
        if kind == "adam":
            return optim.init(params, b2=0.95), pretrain.train_step
        step = functools.partial(pretrain.muon_step, parts_vp=np.eye(64, dtype=np.float32))
        return pretrain.muon_state(params, 30), step

    def run(seed):
        losses = []
        batches = pretrain.packed(itertools.repeat(text), 0, rows=2, length=32)
        note = lambda seen: losses.append(float(seen.loss))
        params = pretrain.train(*start(model.init(config, seed)), batches, 30, note)
        return jax.tree.leaves(params), losses

    (first, losses), (again, _), (other, _) = run(0), run(0), run(1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    assert losses[0] == pytest.approx(np.log(64), abs=0.6) and losses[-1] < losses[0] - 0.5


def test_pretraining_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SealError, match="not empty"):
        pretrain.tiny_world(tmp_path)


def test_shipped_model_answers_from_its_weights_what_it_was_taught(lm):
    known = [q for c in world.contexts("known", 40) for q in c.questions]
    strange = [q for c in world.contexts("held_out", 40) for q in c.questions]
    assert _accuracy(lm, known) > 0.97
    assert _accuracy(lm, strange) < 0.15  # chance is 1 in 20


def _accuracy(lm, questions) -> float:
    """Returns the share of questions whose whole answer, EOS included, is the greedy one."""
    eos = lm.tokenizer.eos_token_id
    tokens_bt = np.full((len(questions), 32), eos, np.int32)
    answer_bt = np.zeros(tokens_bt.shape, bool)
    for b, question in enumerate(questions):
        prompt = lm.tokenizer(question.prompt)["input_ids"]
        answer = [*lm.tokenizer(f" {question.gold}")["input_ids"], eos]
        tokens_bt[b, : len(prompt) + len(answer)] = [*prompt, *answer]
        answer_bt[b, len(prompt) : len(prompt) + len(answer)] = True
    best_bt = np.asarray(jax.jit(model.forward)(lm.params, None, tokens_bt)).argmax(-1)
    right_bt = (best_bt[:, :-1] == tokens_bt[:, 1:]) | ~answer_bt[:, 1:]
    return right_bt.all(-1).mean()
