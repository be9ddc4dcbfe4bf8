"""Grammar-constrained sampling: every text is of the language, and nothing else changes."""

import random
import re

import jax
import numpy as np
import pytest
import toys
from tokenizers import AddedToken

from seal_jax import grammar, sampling
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError, SelfEditError
from seal_jax.grammar import chain, either, one_of, text, up_to
from seal_jax.tasks.arc import baselines, compact, edits, syntax
from seal_jax.tiny import grid_tokens, tokens


def test_combinators_mean_what_regular_expressions_mean():
    part = chain(up_to(either(text("ab"), one_of("cd")), 3), text("b"), either(text(""), text("a")))
    machine, pattern = grammar.automaton(part), re.compile(r"(ab|[cd]){0,3}b(a)?")
    draw = random.Random(0)
    texts = {"".join(draw.choices("abcd", k=draw.randrange(8))) for _ in range(5000)}
    found = {word: machine.accepts(word) for word in texts}
    assert found == {word: bool(pattern.fullmatch(word)) for word in texts}
    assert 20 < sum(found.values()) < len(found) / 2


@pytest.mark.parametrize("form", ["compact", "llama"])
def test_the_language_of_self_edits_has_what_is_written_and_nothing_that_is_refused(form):
    language = syntax.self_edits()
    rng = np.random.default_rng(0)
    for _ in range(50):
        written = baselines.written(baselines.random(rng), form)
        assert language.accepts(written)
        at = rng.integers(len(written))
        damaged = written[:at] + "}]x9"[rng.integers(4)] + written[at + 1 :]
        if language.accepts(damaged):
            edits.parse_self_edit(damaged)
    assert not language.accepts("{}") and not language.accepts("")


def lm_of(tokenizer) -> LM:
    """Returns a model with random weights for a tokenizer."""
    size, eos = len(tokenizer), tokenizer.eos_token_id
    config = toys.config("qwen2", vocab_size=size, eos_ids=(eos,))
    return LM(toys.params(config, deviation=0.02), tokenizer, config)


def walk(rules: grammar.Grammar, ends: set[int], rng) -> list[int]:
    """Returns tokens drawn uniformly from those allowed, until one ends the text."""
    table, kinds = np.asarray(rules.next_sk), np.asarray(rules.kind_v)
    state, made = 0, []
    while True:
        token = int(rng.choice(np.flatnonzero(table[state][kinds] >= 0)))
        if token in ends:
            return made
        made.append(token)
        state = table[state][kinds[token]]


@pytest.mark.parametrize("build", [grid_tokens.build, tokens.train])
def test_every_walk_through_a_tokenizer_ends_in_a_valid_self_edit(build):
    tokenizer = build()
    words = grammar.token_texts(tokenizer)
    ends = {tokenizer.eos_token_id}
    rules = grammar.compile(syntax.self_edits(), words, sorted(ends), len(tokenizer) + 7)
    assert rules.kind_v.shape == (len(tokenizer) + 7,)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(100):
        edit = edits.parse_self_edit(tokenizer.decode(walk(rules, ends, rng)))
        assert edit.training.num_train_epochs >= 1 and edit.training.learning_rate > 0
        seen.add(edit)
    assert len(seen) > 90


def test_constrained_samples_are_valid_where_free_ones_are_not():
    tokenizer = grid_tokens.build()
    lm = lm_of(tokenizer)
    rules = sampling.constrain(lm, syntax.self_edits())
    call = {"samples": 8, "max_tokens": 120, "temperature": 1.0, "key": jax.random.key(0)}
    prompt = tokenizer("I h1 w1 11a/ O h1 w1 11b/ " + compact.EDIT)["input_ids"]
    free = sampling.decode(lm, [[prompt]], **call)[0][0]
    held = sampling.decode(lm, [[prompt]], grammar=rules, **call)[0][0]
    for one in free:
        with pytest.raises(SelfEditError):
            edits.parse_self_edit(sampling.text(lm, one))
    assert all(one.ended for one in held)
    texts = {sampling.text(lm, one) for one in held}
    assert len({edits.parse_self_edit(words) for words in texts}) == 8
    # The model's own log-probabilities: a random model gives each token about 1 in all.
    assert all(
        np.mean(one.logprobs) == pytest.approx(-np.log(len(tokenizer)), abs=0.5) for one in held
    )


def test_a_grammar_that_allows_everything_changes_no_draw():
    tokenizer = grid_tokens.build()
    lm = lm_of(tokenizer)
    kinds = np.zeros(lm.config.vocab_size, np.int32)
    everything = grammar.Grammar(np.zeros((1, 1), np.int32), kinds)
    call = {"samples": 4, "max_tokens": 16, "temperature": 1.0, "key": jax.random.key(1)}
    prompt = tokenizer("I h1 w1")["input_ids"]
    free = sampling.decode(lm, [[prompt]], **call)[0][0]
    held = sampling.decode(lm, [[prompt]], grammar=everything, **call)[0][0]
    for one, other in zip(free, held, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.ended == other.ended


def test_tokens_beyond_the_model_s_are_left_out():
    language = grammar.automaton(text("ab"))
    rules = grammar.compile(language, ["a", "b", "", "ab", "x"], [2, 9], vocab_size=3)
    assert rules.allowed(np.int32(0)).tolist() == [True, False, False]


def test_tokens_of_a_kind_are_those_that_lead_everywhere_alike():
    rng = np.random.default_rng(0)
    columns = rng.integers(-1, 4, (6, 40))
    table = columns[:, rng.integers(0, 40, 3000)].astype(np.int32)
    first, kind_v = grammar._kinds(table)
    np.testing.assert_array_equal(table[:, first][:, kind_v], table)
    assert len(first) == len(np.unique(table, axis=1).T)


def test_tokens_that_cannot_write_the_language_are_an_error():
    language = grammar.automaton(text("ab"))
    with pytest.raises(SealError, match="cannot write"):
        grammar.compile(language, ["a", "c"], [0])
    # `a` leads nowhere, `ab` does not: only the second may begin.
    rules = grammar.compile(language, ["a", "ab", ""], [2])
    assert rules.allowed(np.int32(0)).tolist() == [False, True, False]


def test_a_token_that_ends_texts_ends_none_half_way_by_what_it_says():
    rules = grammar.compile(grammar.automaton(text("ab")), ["b", "a", "b"], [2])
    after = rules.after(np.int32(0), np.int32(1))
    assert rules.allowed(after).tolist() == [True, False, False]
    assert rules.allowed(rules.after(after, np.int32(0))).tolist() == [False, False, True]


def test_special_tokens_that_a_tokenizer_does_not_name_write_nothing():
    tokenizer = tokens.train(texts=50)
    tokenizer.add_tokens([AddedToken("<|x|>", special=True), AddedToken("<y>")])
    special, plain = tokenizer.convert_tokens_to_ids(["<|x|>", "<y>"])
    assert special not in tokenizer.all_special_ids
    words = grammar.token_texts(tokenizer)
    assert (words[special], words[plain]) == ("", "<y>")
    assert words[tokenizer.convert_tokens_to_ids("a")] == "a"


@pytest.mark.parametrize("end_ids", [(), (40,)])
def test_a_grammar_without_a_token_to_end_on_is_refused(end_ids):
    with pytest.raises(SealError, match="needs a token that ends a text"):
        grammar.compile(grammar.automaton(text("ab")), ["x", "a", "b"], end_ids)
