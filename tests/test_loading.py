"""The law of loading: memory never holds much more than the model, and only weights are fetched."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from seal_jax import checkpoint, sharding
from seal_jax import config as config_lib
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError

_FILE = Path(__file__).parents[1] / "benchmarks" / "loading.py"
_NOISE = 24 << 20  # blocks in flight, the allocator's arenas


@pytest.fixture(scope="module")
def loading():
    spec = importlib.util.spec_from_file_location("loading", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peak_memory_is_the_model_and_its_largest_weight(loading):
    # A sixth of a gigabyte, cut over eight devices; the same law as the benchmark's at 8.
    small = dict(vocab_size=16384, d_model=1024, n_layers=6, n_heads=8, n_kv_heads=2, d_ff=4096)
    found = loading.measure(dataclasses.replace(loading.WIDE, **small))
    assert found["model"] > 150 << 20 and found["largest"] < found["model"] / 3
    assert found["model"] <= found["peak"] + _NOISE
    assert found["peak"] <= found["model"] + found["largest"] + _NOISE


def test_weights_read_to_a_mesh_are_those_read_whole(params, tmp_path):
    folder = checkpoint.save_hf(LM(params, None, params.config), tmp_path / "model")
    mesh = sharding.make(config_lib.Mesh(), jax.devices()[:1])
    places = sharding.weights(params.config, mesh)
    back = checkpoint.read_params(folder, params.config, jnp.float32, places)
    chex.assert_trees_all_equal(back, params)
    assert jax.tree.map(lambda x: x.sharding, back) == places


def test_a_model_is_loaded_to_the_devices_of_its_mesh(monkeypatch):
    """Runs leave the same records wherever weights lie: only memory would tell."""
    asked = []
    monkeypatch.setattr(checkpoint, "read_params", lambda *args: asked.append(args[3]))
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for own in (None, mesh):
        config = checkpoint.load_model("tiny-world", mesh=own).config
    assert asked == [None, sharding.weights(config, mesh)]


def test_weights_are_read_a_few_rows_at_a_time_without_a_change(params, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_READ_AT_ONCE", 40)  # fewer than two rows of most
    folder = checkpoint.save_hf(LM(params, None, params.config), tmp_path / "model")
    chex.assert_trees_all_equal(checkpoint.read_params(folder, params.config), params)


def test_from_the_hub_come_weights_and_settings_never_pickles_or_code(tmp_path, monkeypatch):
    there = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "pytorch_model.bin",
        "modeling_x.py",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/model.safetensors",
        "README.md",
    ]
    taken = {}

    def snapshot(name, revision=None, allow_patterns=None, ignore_patterns=None):
        keep = huggingface_hub.utils.filter_repo_objects(
            there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        taken[name, revision] = set(keep)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert checkpoint.find("some/model", "v2") == tmp_path
    assert taken["some/model", "v2"] == set(there[:6])
    checkpoint.find("some/model", weights=False)
    assert taken["some/model", None] == set(there[:6]) - {there[1]}


def test_other_kinds_of_numbers_are_refused_by_name(params, tmp_path):
    folder = checkpoint.save_hf(LM(params, None, params.config), tmp_path / "model")
    file = folder / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    data = file.read_bytes()[8:]
    # Eight-bit floats: each tensor is told to have four times as many in a row.
    header = json.loads(data[:size])
    for name, tensor in header.items():
        if name != "__metadata__":
            tensor["dtype"] = "F8_E4M3"
            tensor["data_offsets"] = [x // 4 for x in tensor["data_offsets"]]
    text = json.dumps(header).encode()
    total = max(x["data_offsets"][1] for n, x in header.items() if n != "__metadata__")
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[size : size + total])
    with pytest.raises(SealError, match="has type F8_E4M3"):
        checkpoint.read_params(folder, params.config)
