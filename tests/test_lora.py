"""Laws of adapters: a fresh one is nothing, and merge and concat are what the live one does."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from seal_jax import lora, model
from seal_jax.config import ALL_TARGETS, Lora
from seal_jax.errors import SealError

pytestmark = pytest.mark.usefixtures("quick_compile")

# float32: x·w + (x·a)·b against x·(w + a·b).
CLOSE = dict(rtol=3e-5, atol=3e-5)
forward = toys.forward


def test_a_fresh_adapter_changes_nothing_to_the_last_bit(family, models):
    params, tokens_bt = models[family], toys.tokens(2, 7)
    settings = Lora(rank=3, alpha=6.0, targets=ALL_TARGETS)
    fresh = lora.init(params.config, settings, jax.random.key(0))
    assert all(np.abs(a).max() > 0.1 for a in fresh.a.values())
    # Bit for bit in one program; the program without an adapter may round its sums differently.
    found = forward(params, fresh, tokens_bt)
    chex.assert_trees_all_equal(
        found, forward(params, jax.tree.map(jnp.zeros_like, fresh), tokens_bt)
    )
    chex.assert_trees_all_close(found, forward(params, None, tokens_bt), rtol=1e-5, atol=1e-5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16)), jnp.float32)
    weight, bias = params.layers["q"][0], jnp.arange(0.0, params.layers["q"].shape[-1])
    pair = (fresh.a["q"][0], fresh.b["q"][0])
    chex.assert_trees_all_equal(
        lora.project(x, weight, bias, pair, fresh.scale), lora.project(x, weight, bias)
    )


def test_a_fresh_adapter_is_peft_s_draw(params):
    config = params.config
    fresh = lora.init(config, Lora(rank=64, targets=ALL_TARGETS), jax.random.key(1))
    for target, a in fresh.a.items():
        bound = 1 / np.sqrt(a.shape[1])  # Kaiming-uniform with a=√5, as torch.nn.Linear
        assert np.abs(a).max() <= bound
        np.testing.assert_allclose(np.std(a), bound / np.sqrt(3), rtol=0.05)
        assert not np.any(fresh.b[target])
    # Targets of one shape are independent draws, and so are layers.
    assert np.abs(fresh.a["gate"] - fresh.a["up"]).max() > 0.1
    assert np.abs(fresh.a["q"][0] - fresh.a["q"][1]).max() > 0.1


def test_shapes_of_an_adapter_follow_the_architecture():
    config = toys.config("qwen2")  # d 16, n·h 24, k·h 12, f 26
    tree = lora.shapes(config, Lora(rank=3, alpha=6, targets=("down", "v", "q", "o")))
    assert list(tree.a) == ["q", "v", "o", "down"]
    assert {t: x.shape for t, x in tree.a.items()} == {
        "q": (2, 16, 3),
        "v": (2, 16, 3),
        "o": (2, 24, 3),
        "down": (2, 26, 3),
    }
    assert {t: x.shape for t, x in tree.b.items()} == {
        "q": (2, 3, 24),
        "v": (2, 3, 12),
        "o": (2, 3, 16),
        "down": (2, 3, 16),
    }
    assert tree.scale == 2.0 and tree.rank == 3
    made = lora.init(
        config, Lora(rank=3, alpha=6, targets=("down", "v", "q", "o")), jax.random.key(0)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(made, tree)


def test_merged_weights_act_as_the_live_adapter(family, models):
    params, tokens_bt = models[family], toys.tokens(2, 7)
    adapter = toys.adapter(params.config)
    live = forward(params, adapter, tokens_bt)
    assert np.abs(live - forward(params, None, tokens_bt)).max() > 0.1
    merged = lora.merge(params, adapter)
    chex.assert_trees_all_close(forward(merged, None, tokens_bt), live, **CLOSE)


def test_an_adapter_of_another_model_is_not_merged(params):
    other = dataclasses.replace(params.config, d_ff=params.config.d_ff + 2)
    for target in ("down", "up"):
        with pytest.raises(SealError, match=f"of another model: {target}"):
            lora.merge(params, toys.adapter(other, targets=(target,)))


def test_a_merged_weight_is_rounded_once(params):
    adapter = toys.adapter(params.config, targets=("down",))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    change = adapter.scale * np.matmul(*(np.float64(x["down"]) for x in (adapter.a, adapter.b)))
    whole = jnp.asarray(np.float64(half.layers["down"]) + change, jnp.bfloat16)
    found = lora.merge(half, adapter).layers["down"]
    assert found.dtype == jnp.bfloat16
    assert np.mean(found != whole) < 0.01  # float32 sums may lie on the other side of a half


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "o", "gate", "up", "down")])
def test_only_the_targets_are_changed(params, targets):
    adapter = toys.adapter(params.config, targets=targets)
    assert set(adapter.a) == set(adapter.b) == set(targets)
    merged = lora.merge(params, adapter)
    for name, weight in params.layers.items():
        assert np.array_equal(weight, merged.layers[name]) == (name not in targets)


def test_concat_is_the_sum_of_adapters_of_any_rank_and_scale(params):
    tokens_bt = toys.tokens(2, 7)
    parts = [
        toys.adapter(params.config, seed, rank, ("v", "down"), alpha)
        for seed, (rank, alpha) in enumerate([(3, 6.0), (2, 1.0), (5, 10.0)])
    ]
    assert len({x.scale for x in parts}) == 2
    joined = lora.concat(parts)
    assert joined.rank == 10
    merged = params
    for part in parts:
        merged = lora.merge(merged, part)
    live = forward(params, joined, tokens_bt)
    chex.assert_trees_all_close(live, forward(merged, None, tokens_bt), **CLOSE)


def test_concat_refuses_adapters_of_other_projections(params):
    some = toys.adapter(params.config, targets=("q", "v"))
    with pytest.raises(SealError, match="different projections"):
        lora.concat([some, toys.adapter(params.config, targets=("q",))])
    with pytest.raises(SealError, match="no adapters"):
        lora.concat([])
    with pytest.raises(SealError, match="scale is 0"):
        lora.concat([some.replace(scale=0.0), some])


def test_stacked_adapters_are_not_taken_for_one(params):
    one = toys.adapter(params.config)
    two = lora.stack([one, one])
    with pytest.raises(SealError, match="many adapters"):
        lora.merge(params, two)
    with pytest.raises(SealError, match="many adapters"):
        model.forward(params, two, jnp.ones((1, 4), jnp.int32))


def test_stacked_adapters_come_back_as_they_were(params):
    parts = [toys.adapter(params.config, seed, targets=("q", "down")) for seed in range(3)]
    stacked = lora.stack(parts)
    for i, part in enumerate(parts):
        chex.assert_trees_all_equal(lora.take(stacked, i), part)
    chex.assert_trees_all_equal(lora.take(stacked, -1), parts[2])
    chex.assert_trees_all_equal(lora.take(stacked, [2, 0]), lora.stack([parts[2], parts[0]]))


def test_project_keeps_the_type_of_its_input():
    x = jnp.ones((2, 4), jnp.bfloat16)
    weight, a, b = jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((2, 3))
    y = lora.project(x, weight, jnp.ones(3), (a, b), 0.5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 4 + 0.5 * 8 + 1)
