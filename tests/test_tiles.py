"""Which prompts are decoded together: everybody once, in few shapes that fit into memory."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from seal_jax import checkpoint, decoding, lora, params, rows, sampling, tiles
from seal_jax.config import Lora


def prompts_of(lengths):
    return [[[7] * n for n in own] for own in lengths]


def drawn(seed: int, count: int, longest: int):
    rng = np.random.default_rng(seed)
    return [list(rng.integers(1, longest, rng.integers(0, 9))) for _ in range(count)]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("longest", [50, 5000])
@pytest.mark.parametrize("most", [1, 3, 4, 64])
def test_every_prompt_is_in_one_place_that_holds_it(own, parts, longest, most):
    for seed in range(5):
        lengths = drawn(seed, 6, longest)
        prompts, t = prompts_of(lengths), 64 if longest < 64 else 5120
        made = tiles.arrange(prompts, t, lambda size: most, own, parts)
        seen = []
        for tile in made:
            assert len(tile.rows) % parts == 0 and tile.t <= t
            assert max(map(len, tile.rows)) <= tile.width
            assert len(tile.rows) * tile.width <= most + -most % parts
            for at, cb in ((at, cb) for at, mine in enumerate(tile.rows) for cb in mine):
                assert len(prompts[cb[0]][cb[1]]) <= tile.t
                if own:  # under its adapter, on the device that holds it
                    assert tile.adapters[at] == cb[0]
                    assert at // (len(tile.rows) // parts) == cb[0] // (len(prompts) // parts)
                seen.append(cb)
        assert sorted(seen) == [(c, b) for c, own_ in enumerate(lengths) for b in range(len(own_))]


@pytest.mark.parametrize("own", [True, False])
def test_a_long_prompt_s_padding_does_not_depend_on_its_company(own):
    some = [[900, 800], [1500], [3000], [8000]]
    for chosen in itertools.combinations(some, 2):
        made = tiles.arrange(prompts_of(chosen), 8192, lambda size: 8, own)
        for tile in made:
            for c, b in itertools.chain(*tile.rows):
                length = chosen[c][b]
                assert tile.t == next(x for x in (1024, 2048, 4096, 8192) if length <= x)


def test_answers_do_not_depend_on_how_many_are_made_at_once():
    lm = checkpoint.load_model("tiny-world")
    one = lora.init(lm.config, Lora(rank=4), jax.random.key(0))
    adapters = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), (3, *x.shape)) * 0.1, one
    )
    rng = np.random.default_rng(0)
    prompts = [[list(rng.integers(5, 200, n)) for n in own] for own in ((9, 4, 6), (5,), (3,) * 7)]
    made = [
        sampling.decode(lm, prompts, adapters, max_tokens=6, chunk=chunk) for chunk in (1, 2, 4, 64)
    ]
    text = lambda out: [[list(map(int, row[0].tokens)) for row in rows] for rows in out]
    assert len({str(text(out)) for out in made}) == 1


def abstract(config, t: int, count: int, room: int):
    """Returns the shapes that `decoding.run` takes, and its settings."""
    shape = jax.ShapeDtypeStruct
    draws = decoding.Draws(
        ids_cb=shape((1, count), jnp.uint32),
        key=jax.eval_shape(lambda: jax.random.key(0)),
        ends=shape((2,), jnp.int32),
        limit=shape((), jnp.int32),
        temperature=shape((), jnp.float32),
        top_p=shape((), jnp.float32),
        grammar=None,
        greedy=True,
        nucleus=False,
        scored=False,
    )
    weights = params.shapes(config, jnp.float32)
    prompts = (shape((1, count, t), jnp.int32), shape((1, count), jnp.int32))
    return (weights, None, *prompts, draws), {"samples": 2, "room": room, "own_adapters": False}


def test_no_step_copies_the_cache_of_a_model_of_many_layers():
    config = toys.config("qwen2", n_layers=6, vocab_size=64)
    arrays, static = abstract(config, 8, 4, 512)
    hlo = decoding.run.lower(*arrays, **static).compile().as_text()
    copied = [math.prod(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]\S* copy\(", hlo)]
    cache = config.n_layers * 4 * static["samples"] * config.n_kv_heads * config.d_head * 512
    assert copied and max(copied) < cache


@pytest.mark.parametrize("t", [256, 1536])
def test_what_is_reckoned_for_a_prompt_covers_what_it_adds_to_the_program(t):
    config = toys.config("qwen2", n_layers=6, d_model=128, d_ff=512, vocab_size=512)

    def needed(count: int) -> int:
        arrays, static = abstract(config, t, count, 64)
        lowered = decoding.run.lower(*arrays, **static)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    added = (needed(8) - needed(4)) / 4
    free = 1 << 34
    each = rows._SHARE * free / rows.fitting(config, free, 1 << 30, t, (64,), 2, itemsize=4)
    assert 0.9 * added < each < 4 * added


def test_what_is_reckoned_for_a_prompt_covers_a_cache_beside_the_one_it_grows_to():
    config = toys.config("qwen2", d_model=128, d_ff=512, d_head=32, vocab_size=512)
    rooms = (1024, 4096, 8192)

    def needed(count: int) -> int:
        arrays, static = abstract(config, 256, count, rooms[-2])
        state = jax.eval_shape(functools.partial(decoding.run, keep=True, **static), *arrays)
        static = {"room": rooms[-1], "own_adapters": False}
        lowered = decoding.go_on.lower(*arrays[:2], state, arrays[-1], **static)
        memory = lowered.compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    added = (needed(8) - needed(4)) / 4
    free = 1 << 36
    each = rows._SHARE * free / rows.fitting(config, free, 1 << 30, 256, rooms, 2, itemsize=4)
    assert 0.9 * added < each < 1.5 * added


def test_fewer_prompts_fit_the_longer_they_and_their_sequences_are():
    config = toys.config("qwen2")
    fit = lambda free, t, room, *rest: rows.fitting(config, free, 256, t, (room,), *rest)
    assert fit(1 << 40, 64, 64, 1) == 256 and fit(1 << 40, 64, 64, 5) == 51
    assert fit(-1, 64, 64, 1) == 1
    few = [fit(1 << 26, t, 64, 1) for t in (64, 512, 2048, 8192)]
    assert sorted(few, reverse=True) == few and few[0] > few[-1] >= 1
    assert fit(1 << 26, 64, 64, 1) > fit(1 << 26, 64, 4096, 1)
