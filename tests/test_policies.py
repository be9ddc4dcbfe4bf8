"""A run has one model on the devices at a time, and finds the others again on disk."""

import gc

import chex
import jax
import pytest

import seal_jax as seal
from seal_jax import checkpoint, config, outer, rewards, state, writing
from seal_jax.policies import Policies

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = [
    "outer.contexts=2",
    "sampling.n=2",
    "sampling.max_tokens=16",
    "inner.epochs=1",
    "outer.sft.epochs=1",
    "evaluation.contexts=2",
]


@pytest.mark.parametrize("adapt", ["policy", "base"])
def test_a_run_of_two_rounds_holds_one_model_at_every_stage(adapt, tmp_path, monkeypatch):
    cfg = seal.load_config("configs/tiny_world.yaml", [*SMALL, f"outer.adapt={adapt}"])
    shape = checkpoint.load_model(cfg.model).params.layers["down"].shape

    def held() -> int:
        gc.collect()
        return sum(x.shape == shape for x in jax.live_arrays())

    before, seen = held(), []
    for module, name in ((writing, "write"), (rewards, "evaluate"), (outer, "finetune")):
        stage = getattr(module, name)

        def noted(lm, *args, stage=stage, name=name, **kwargs):
            seen.append((name, held() - before))
            return stage(lm, *args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    report = seal.run(cfg, tmp_path / "run")
    assert len(report.table) > 4
    assert {name for name, _ in seen} == {"write", "evaluate", "finetune"}
    assert {count for _, count in seen} == {1}
    assert held() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_and_policy_come_back_as_they_were(dtype, tmp_path):
    base = checkpoint.load_model(config.Model(path="tiny-world", dtype=dtype))
    changed = jax.tree.map(lambda x: x + 1, base.params)
    state.save_tree(tmp_path / "policy", changed)
    models = Policies(base, "policy")
    policy = models.load(tmp_path / "policy")
    chex.assert_trees_all_equal(policy.params, changed)
    assert models.load_adapted(tmp_path / "policy") is policy
    again = models.load(None)
    chex.assert_trees_all_equal(again.params, base.params)
    assert again.tokenizer is base.tokenizer and again.config == base.config


def test_with_adapt_base_self_edits_are_applied_to_the_first_model(tmp_path):
    base = checkpoint.load_model("tiny-world")
    state.save_tree(tmp_path / "policy", jax.tree.map(lambda x: x + 1, base.params))
    models = Policies(base, "base")
    models.load(tmp_path / "policy")
    chex.assert_trees_all_equal(models.load_adapted(tmp_path / "policy").params, base.params)
