"""Laws of PEFT folders: an adapter comes back bit for bit; what we cannot honour is named."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toys

from seal_jax import checkpoint, lora, peft
from seal_jax.config import Config, Model
from seal_jax.errors import SealError


@pytest.fixture(scope="module")
def cfg(tmp_path_factory, params) -> Config:
    folder = tmp_path_factory.mktemp("models") / "base"
    checkpoint.save_hf(checkpoint.LM(params, None, params.config), folder)
    return Config(model=Model(path=str(folder)))


@pytest.fixture
def saved(adapter, cfg, tmp_path) -> Path:
    return peft.save_peft(adapter, tmp_path / "adapter", cfg)


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def test_an_adapter_comes_back_bit_for_bit(saved, adapter, cfg, params):
    for base in (cfg, params.config):
        back = peft.load_peft(saved, base)
        chex.assert_trees_all_equal(back, adapter)
        assert back.scale == adapter.scale and list(back.a) == list(adapter.a)


@pytest.mark.parametrize("alpha", [6.0, 16.0, 1.0, 0.1, 2 / 7])
@pytest.mark.parametrize("rank", [3, 7])
def test_any_scale_and_any_targets_come_back(cfg, params, tmp_path, alpha, rank):
    one = toys.adapter(params.config, 1, rank, ("v", "down"), alpha)
    back = peft.load_peft(peft.save_peft(one, tmp_path / "a", cfg), cfg)
    assert back.scale == one.scale
    chex.assert_trees_all_equal(back, one)


def test_the_files_are_as_peft_writes_them(saved, adapter, cfg):
    raw = json.loads((saved / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["peft_type"]) == (3, 6, "LORA")
    assert raw["base_model_name_or_path"] == cfg.model.path
    modules = ["q", "k", "v", "o", "gate", "up", "down"]
    assert raw["target_modules"] == [f"{name}_proj" for name in modules]
    tensors = safetensors.numpy.load_file(saved / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], adapter.a["down"][1].T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], adapter.b["down"][1].T)


def test_the_base_model_is_that_of_its_revision(adapter, cfg, tmp_path, monkeypatch):
    own = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, revision="v2"))
    folder = peft.save_peft(adapter, tmp_path / "adapter", own)
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "v2"
    find, asked = checkpoint.find, []
    monkeypatch.setattr(checkpoint, "find", lambda *args: asked.append(args) or find(*args))
    peft.load_peft(folder, own)
    assert asked == [(cfg.model.path, "v2")]


def test_harmless_settings_and_patterns_are_accepted(saved, adapter, params):
    """What PEFT 0.21 writes for a plain adapter, and a target given as a pattern."""
    plain = dict(
        auto_mapping=None, bias="none", eva_config=None, exclude_modules=None,
        layer_replication=None, fan_in_fan_out=False, init_lora_weights=True, layers_pattern=None,
        loftq_config={}, lora_bias=False, lora_dropout=0.05, megatron_core="megatron.core",
        modules_to_save=None, peft_version="0.21.2", qalora_group_size=16, rank_pattern={},
        alpha_pattern={}, target_parameters=None, trainable_token_indices=None, use_dora=False,
        use_rslora=False, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj",
    )  # fmt: skip
    edit(saved, **plain)
    chex.assert_trees_all_equal(peft.load_peft(saved, params.config), adapter)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_pattern": "layers"},
        {"layer_replication": [[0, 2]]},
        {"exclude_modules": ["v_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["experts"]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"a_setting_of_the_future": 1},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_we_cannot_honour_is_refused_by_name(saved, params, setting):
    edit(saved, **setting)
    (key, value), *_ = setting.items()
    with pytest.raises(SealError, match="is not supported") as caught:
        peft.load_peft(saved, params.config)
    assert f"adapter_config.json: {key}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "target module 'lm_head' is not supported"),
        ({"target_modules": ["q"]}, "target module 'q' is not supported"),
        ({"r": 4}, r"lora_A.weight' has shape \(3, 16\), not \(4, 16\)"),
        ({"r": 0}, "r=0 is no rank"),
        ({"r": None}, "r=None is no rank"),
        ({"lora_alpha": "8"}, "lora_alpha='8' is no number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is no number"),
    ],
)
def test_a_broken_setting_is_named(saved, params, setting, sentence):
    edit(saved, **setting)
    with pytest.raises(SealError, match=sentence):
        peft.load_peft(saved, params.config)


_Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.pop(f"{_Q0}.lora_B.weight"), rf"{_Q0}\.lora_B\.weight' is missing"),
        (
            lambda x: x.update({f"{_Q0}.lora_magnitude_vector": np.ones(24, np.float32)}),
            "lora_magnitude_vector' is not supported",
        ),
        (
            lambda x: x.update({f"{_Q0}.lora_B.weight": np.ones((3, 24), np.float32)}),
            r"has shape \(3, 24\), not \(24, 3\)",
        ),
        (lambda x: x.update({f"{_Q0}.lora_A.weight": np.ones((3, 16), np.int32)}), "type int32"),
        (lambda x: x.clear(), "is missing"),
    ],
)
def test_a_missing_misshapen_or_strange_tensor_is_named(saved, params, change, sentence):
    edit_tensors(saved, change)
    with pytest.raises(SealError, match=sentence):
        peft.load_peft(saved, params.config)


def test_an_adapter_of_another_model_is_refused(saved, params):
    deeper = dataclasses.replace(params.config, n_layers=3)
    with pytest.raises(SealError, match=r"layers\.2\..* is missing"):
        peft.load_peft(saved, deeper)
    shallower = dataclasses.replace(params.config, n_layers=1)
    with pytest.raises(SealError, match=r"layers\.1\..* is not supported"):
        peft.load_peft(saved, shallower)


def test_files_that_are_not_there_or_not_readable_are_named(saved, params, tmp_path):
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SealError, match=r"adapter_model\.safetensors: not readable"):
        peft.load_peft(saved, params.config)
    weights.rename(saved / "adapter_model.bin")
    with pytest.raises(SealError, match=r"adapter_model\.bin: only safetensors"):
        peft.load_peft(saved, params.config)
    with pytest.raises(SealError, match=r"adapter_config\.json"):
        peft.load_peft(tmp_path, params.config)
    (saved / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(SealError, match="not readable as JSON"):
        peft.load_peft(saved, params.config)
    (saved / "adapter_config.json").write_text("[]")
    with pytest.raises(SealError, match="holds no settings"):
        peft.load_peft(saved, params.config)


def test_a_folder_appears_complete_or_not_at_all(adapter, cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peft.save_peft(adapter, tmp_path / "new", cfg)
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    peft.save_peft(adapter, tmp_path / "new", cfg)
    assert [f.name for f in tmp_path.iterdir()] == ["new"]
    with pytest.raises(SealError, match="already there and not empty"):
        peft.save_peft(adapter, tmp_path / "new", cfg)


def test_one_adapter_is_saved_at_a_time(adapter, cfg, tmp_path):
    with pytest.raises(SealError, match="many adapters"):
        peft.save_peft(lora.stack([adapter] * 2), tmp_path / "many", cfg)


def test_half_precision_adapters_are_read_as_float32(saved, adapter, params):
    def halve(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(jnp.bfloat16)

    edit_tensors(saved, halve)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapter)
    found = peft.load_peft(saved, params.config)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_dtypes(found, expected)
