"""Long sequences in several programs: the tokens of one program, whoever has ended on the way."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
import toys

import seal_jax as seal
from seal_jax import sampling
from seal_jax.checkpoint import LM
from seal_jax.grammar import Grammar

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = toys.config("qwen2", n_layers=2)
PROMPTS = [toys.tokens(n, seed=n).tolist() for n in (3, 9, 5, 7, 2, 4)]


def model(layers: int = 2, **changes) -> LM:
    config = toys.config("qwen2", n_layers=layers, **changes)
    return LM(toys.params(config, deviation=0.1), None, config)


def written(lm: LM, **changes):
    how = {"samples": 3, "max_tokens": 60, "temperature": 1.0, "top_p": 0.9}
    made = sampling.decode(lm, [PROMPTS], key=jax.random.key(3), **{**how, **changes})[0]
    return [[(one.tokens.tolist(), one.ended) for one in row] for row in made], made


@pytest.mark.parametrize("layers", [2, 5])  # apart, and stacked
@pytest.mark.parametrize("samples", [1, 3])
def test_a_cache_that_grows_and_sheds_rows_changes_no_token(monkeypatch, layers, samples):
    lm = model(layers)
    monkeypatch.setattr(sampling, "_ROOMS_ON_THE_WAY", ())
    whole, records = written(lm, samples=samples)
    lengths = [len(tokens) for row in whole for tokens, _ in row]
    assert max(lengths) > 20 > min(lengths)  # some end early, some go on
    shed = []
    take_rows = sampling.decoding.take_rows
    note = lambda state, rows, draws: (shed.append(len(rows)), take_rows(state, rows, draws))[1]
    monkeypatch.setattr(sampling.decoding, "take_rows", note)
    monkeypatch.setattr(sampling, "_ROOMS_ON_THE_WAY", (4, 8, 12, 32))
    parts, again = written(lm, samples=samples)
    assert parts == whole
    assert shed or samples == 3  # rows whose samples have all ended were left behind
    for a, b in zip(jax.tree.leaves(records), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {}])
def test_without_log_probabilities_the_tokens_are_the_same(monkeypatch, how):
    lm = model()
    monkeypatch.setattr(sampling, "_ROOMS_ON_THE_WAY", (8,))  # several programs, rows left behind
    tokens, records = written(lm, samples=1, **how)
    assert all(len(one.logprobs) == len(one.tokens) for row in records for one in row)
    again, records = written(lm, samples=1, logprobs=False, **how)
    assert again == tokens
    assert all(one.logprobs is None for row in records for one in row)


def test_the_limit_ends_a_sequence_within_any_program(monkeypatch):
    lm = model(eos_ids=())
    for rooms in ((), (8,), (8, 16)):
        monkeypatch.setattr(sampling, "_ROOMS_ON_THE_WAY", rooms)
        for most in (1, 8, 9, 17):
            made, _ = written(lm, samples=2, max_tokens=most)
            assert all(len(t) == most and not ended for row in made for t, ended in row)


def test_adapters_of_their_own_go_on_in_the_next_program(monkeypatch):
    lm = model(eos_ids=())
    adapters = jax.tree.map(
        lambda *x: np.stack(x), *(toys.adapter(CONFIG, seed) for seed in range(2))
    )
    answers = []
    for rooms in ((), (4, 8)):
        monkeypatch.setattr(sampling, "_ROOMS_ON_THE_WAY", rooms)
        made = sampling.decode(lm, [PROMPTS[:3], PROMPTS[3:]], adapters, max_tokens=12)
        answers.append([[one[0].tokens for one in rows] for rows in made])
    chex.assert_trees_all_equal(*answers)


def test_a_temperature_that_float32_cannot_divide_by_is_greedy():
    lm = model()
    greedy, _ = written(lm, samples=1, max_tokens=6, temperature=0.0)
    for cold in (1e-7, 1e-38, 1e-46):
        assert written(lm, samples=1, max_tokens=6, temperature=cold)[0] == greedy


def test_at_any_temperature_only_what_a_grammar_allows_is_drawn():
    lm = model(eos_ids=())
    kinds = np.isin(np.arange(CONFIG.vocab_size), (3, 5, 8), invert=True).astype(np.int32)
    rules = Grammar(np.array([[0, -1]], np.int32), kinds)
    for temperature in (2e-6, 1e39):
        rows, _ = written(lm, samples=2, max_tokens=6, temperature=temperature, grammar=rules)
        drawn = {token for row in rows for tokens, _ in row for token in tokens}
        assert drawn <= {3, 5, 8} and (temperature < 1 or len(drawn) == 3)


def test_prompts_longer_than_the_model_was_made_for_are_told_of_once(capsys):
    lm = seal.load_model("tiny-world")
    assert lm.config.max_positions == 1024
    short = lm._replace(config=dataclasses.replace(lm.config, max_positions=9))
    for text in ("the " * 9, "the " * 10, "the " * 11):
        assert len(sampling.encode(short, text.strip())) == len(text.split())
    assert capsys.readouterr().err.count("over 9 tokens") == 1
