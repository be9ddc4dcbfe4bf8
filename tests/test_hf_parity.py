"""Our models, adapters and samples are those of transformers and PEFT.

Against recorded numbers everywhere, and against the libraries themselves where torch is installed.
"""

import dataclasses
import importlib.util
import json

import chex
import jax
import numpy as np
import parity
import pytest
import safetensors.numpy
import toys

from seal_jax import checkpoint, lora, model, peft
from seal_jax.config import Config, Model
from seal_jax.errors import SealError

pytestmark = pytest.mark.usefixtures("quick_compile")
live = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "peft")),
    reason="torch and peft are not installed: pip install seal_jax[parity]",
)

# float32, sums in another order; logits reach 5. Greedy tokens must be the same.
TOLERANCE = {"logits": 1e-4, "loss": 5e-6, "gradient": 2e-5, "greedy": 0}
DRAWS = 20_000


def check(name: str, theirs: dict[str, np.ndarray]) -> None:
    ours = parity.ours(name)
    found = {kind: parity.difference(ours, theirs, kind, name) for kind in parity.KINDS}
    assert all(found[kind] <= TOLERANCE[kind] for kind in parity.KINDS), found


@pytest.mark.parametrize("name", list(parity.CASES))
def test_recorded_logits_losses_gradients_and_continuations_are_ours(name):
    recorded, _, _ = parity.goldens()
    assert {key.split()[0] for key in recorded[name]} >= {"logits", "loss", "gradient"}
    check(name, recorded[name])


def test_the_recorded_cases_cover_every_switch():
    configs = [case.config for case in parity.CASES.values()]
    for family in toys.FAMILIES:
        assert {c.tied for c in configs if c.family == family} == {True, False}
    ratios = {c.n_heads // c.n_kv_heads for c in configs}
    assert ratios == {1, 2, 4}
    assert {c.d_head * c.n_heads == c.d_model for c in configs} == {True, False}
    assert {c.rope_scaling is None for c in configs} == {True, False}
    continuations = [
        len(value)
        for entries in parity.goldens()[0].values()
        for key, value in entries.items()
        if key.startswith("greedy")
    ]
    assert max(continuations) == parity.NEW_TOKENS, "none runs to the budget"
    assert min(continuations) < parity.NEW_TOKENS, "none ends by itself"


def test_samples_follow_the_recorded_distribution():
    _, chances, _ = parity.goldens()
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-6)
    assert parity.surprise(chances, DRAWS) > 1e-3
    # Controls: so many draws tell apart what is nearly right.
    sharper = chances**1.1
    assert parity.surprise(sharper / sharper.sum(), DRAWS) < 1e-6
    independent = chances.sum(1, keepdims=True) * chances.sum(0, keepdims=True)
    assert parity.surprise(independent, DRAWS) < 1e-6


@live
@pytest.mark.parametrize("name", list(parity.CASES))
def test_logits_losses_gradients_and_continuations_are_those_of_the_libraries(name):
    import hf

    check(name, hf.theirs(name))


@live
def test_samples_follow_the_distribution_of_transformers():
    import hf

    assert parity.surprise(hf.two_token_chances(), DRAWS) > 1e-3


def given(tokens_bt: np.ndarray) -> dict:
    import torch

    return {"input_ids": torch.from_numpy(tokens_bt).long()}


@live
def test_a_model_saved_by_transformers_is_read(family, models, tmp_path):
    import hf

    params = models[family]
    hf.hf_model(params).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw  # version 5's spelling
    config = checkpoint.read_config(tmp_path)
    assert dataclasses.replace(config, eos_ids=()) == dataclasses.replace(params.config, eos_ids=())
    assert set(config.eos_ids) == set(params.config.eos_ids)
    chex.assert_trees_all_equal(
        checkpoint.read_params(tmp_path, config).replace(config=params.config), params
    )


@live
def test_transformers_loads_what_save_hf_writes(family, models, tmp_path):
    """Merged, sharded, every tensor found and none left over."""
    import torch
    import transformers

    params = models[family]
    adapter = toys.adapter(params.config)
    merged = lora.merge(params, adapter)
    folder = checkpoint.save_hf(
        checkpoint.LM(merged, None, params.config), tmp_path / "out", shard=12_000
    )
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_bt = toys.tokens(2, 14)
    with torch.no_grad():
        logits = loaded.eval()(**given(tokens_bt)).logits.numpy()
    np.testing.assert_allclose(
        logits, toys.forward(params, adapter, tokens_bt), rtol=0, atol=TOLERANCE["logits"]
    )


@live
@pytest.mark.parametrize("targets", [("q", "v"), ("k", "o", "gate", "up", "down")])
def test_peft_loads_what_save_peft_writes(params, targets, tmp_path):
    """The logits are those of the very same adapter made within PEFT, to the last bit."""
    import hf
    import peft as hf_peft
    import torch

    adapter = toys.adapter(params.config, 4, 3, targets, alpha=4.0)
    cfg = Config(model=Model(path="some/base"))
    folder = peft.save_peft(adapter, tmp_path / "adapter", cfg)
    tokens_bt = toys.tokens(2, 14)
    with torch.no_grad():
        loaded = hf_peft.PeftModel.from_pretrained(hf.hf_model(params), str(folder)).eval()
        found = loaded(**given(tokens_bt)).logits.numpy()
        made = hf.with_adapter(hf.hf_model(params), adapter)(**given(tokens_bt)).logits.numpy()
    np.testing.assert_array_equal(found, made)
    np.testing.assert_allclose(
        found,
        jax.jit(model.forward)(params, adapter, tokens_bt),
        rtol=0,
        atol=TOLERANCE["logits"],
    )


@live
def test_what_peft_writes_is_read_bit_for_bit(params, tmp_path):
    import hf

    adapter = toys.adapter(params.config, 4)
    hf.with_adapter(hf.hf_model(params), adapter).save_pretrained(str(tmp_path))
    back = peft.load_peft(tmp_path, params.config)
    assert back.scale == adapter.scale
    chex.assert_trees_all_equal(back, adapter)


@live
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"layers_to_transform": [1]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapters_of_peft_that_we_cannot_honour_are_refused(params, tmp_path, settings):
    import hf
    import peft as hf_peft

    plain = dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = hf_peft.get_peft_model(hf.hf_model(params), hf_peft.LoraConfig(**plain | settings))
    wrapped.save_pretrained(str(tmp_path))
    key = next(iter(settings))
    with pytest.raises(SealError, match="embed_tokens" if key == "target_modules" else key):
        peft.load_peft(tmp_path, params.config)


@live
def test_a_sliding_window_is_refused_and_one_that_is_off_is_not(params, tmp_path):
    import hf

    def read(**settings):
        described = hf.hf_config(params.config, **settings)
        described.architectures = ["Qwen2ForCausalLM"]
        described.save_pretrained(tmp_path)
        return checkpoint.read_config(tmp_path)

    with pytest.raises(SealError, match="use_sliding_window=True"):
        read(use_sliding_window=True, max_window_layers=1)
    assert read(use_sliding_window=False, sliding_window=4) == params.config


def test_tensors_are_stored_row_by_row(params, tmp_path):
    """safetensors 0.8 scrambles transposed views; what we write is not a view."""
    for name, tensor in checkpoint.named_tensors(params).items():
        assert tensor().flags.c_contiguous, name
    checkpoint.save_hf(checkpoint.LM(params, None, params.config), tmp_path / "m")
    stored = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in checkpoint.named_tensors(params).items():
        np.testing.assert_array_equal(stored[name], tensor())
