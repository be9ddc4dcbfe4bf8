"""Laws of model folders: written and read bit for bit; what is wrong gets a sentence."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from seal_jax import architecture, checkpoint, model
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, params) -> Path:
    """A saved model; tests that spoil it copy it first."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    return checkpoint.save_hf(LM(params, None, params.config), folder)


@pytest.fixture
def copy(qwen, tmp_path) -> Path:
    return Path(shutil.copytree(qwen, tmp_path / "copy"))


def read(folder: Path, dtype=jnp.float32):
    return checkpoint.read_params(folder, checkpoint.read_config(folder), dtype)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v != "remove"}))


def edit_tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_comes_back_as_it_was(family, models, tmp_path, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), models[family])
    folder = checkpoint.save_hf(LM(params, None, params.config), tmp_path / "new" / family)
    back = read(folder, jnp.dtype(dtype))
    assert back.config == params.config
    chex.assert_trees_all_equal(back, params)
    chex.assert_trees_all_equal_dtypes(back, params)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not params.config.tied)
    # [out, in] as in torch: the first row gives the first output.
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(stored[name], np.asarray(params.layers["down"])[1].T)


@pytest.mark.parametrize(("limit", "count"), [(10_000, 3), (22_000, 2)])
def test_a_sharded_model_comes_back_as_it_was(params, tmp_path, limit, count):
    folder = checkpoint.save_hf(LM(params, None, params.config), tmp_path / "s", shard=limit)
    files = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) == count and not (folder / "model.safetensors").exists()
    sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(f).values()) for f in files]
    assert max(sizes) <= limit and sum(sizes) == index["metadata"]["total_size"]
    assert sum(sizes) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert {file for file in index["weight_map"].values()} == {f.name for f in files}
    chex.assert_trees_all_equal(read(folder), params)


def test_files_of_the_source_are_copied_verbatim(copy, params, tmp_path):
    odd = '{ "chat": "template",\n\n"x": 1.50 }'
    (copy / "tokenizer_config.json").write_text(odd)
    (copy / "chat_template.jinja").write_text("{{ messages }}\n")
    (copy / "modeling.py").write_text("raise SystemExit")
    (copy / "model.safetensors.index.json.bak").write_text("")
    edit_config(copy, unknown_to_us=[1.0], rope_theta=10_000)
    lm = LM(params, None, checkpoint.read_config(copy), copy)
    folder = checkpoint.save_hf(lm, tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (copy / name).read_bytes()
    assert not (folder / "modeling.py").exists()


def test_config_json_names_the_type_of_the_weights_beside_it(copy, tmp_path):
    edit_config(copy, torch_dtype="bfloat16")
    params = read(copy)
    folder = checkpoint.save_hf(LM(params, None, params.config, copy), tmp_path / "new")
    before, after = (json.loads((x / "config.json").read_text()) for x in (copy, folder))
    assert after["torch_dtype"] == "float32"
    assert {**after, "torch_dtype": 0} == {**before, "torch_dtype": 0}


@pytest.mark.parametrize("name", ["tiny-grids", "tiny-world"])
def test_a_built_in_model_saved_anew_reads_texts_as_before(name, tmp_path):
    lm = checkpoint.load_model(name)
    folder = checkpoint.save_hf(lm._replace(source=None), tmp_path / "new")
    again = checkpoint.load_model(folder)
    for text in ("I h1 w1 The 12 towns, of Arlen's.\n", '{"data_generation": {"a": true}}'):
        assert again.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]


def test_a_file_in_the_way_is_named(params, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SealError, match="already there"):
        checkpoint.save_hf(LM(params, None, params.config), tmp_path / "file")


def test_a_folder_appears_complete_or_not_at_all(params, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_hf(LM(params, None, params.config), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    checkpoint.save_hf(LM(params, None, params.config), tmp_path / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["new"], "what was left over is gone"
    with pytest.raises(SealError, match="already there and not empty"):
        checkpoint.save_hf(LM(params, None, params.config), tmp_path / "new")


def test_both_spellings_of_config_json_are_read(copy):
    scaling = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    edit_config(
        copy, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}, torch_dtype="float32"
    )
    old = checkpoint.read_config(copy)
    edit_config(
        copy,
        rope_theta="remove",
        rope_scaling="remove",
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling},
    )
    assert checkpoint.read_config(copy) == old
    assert old.rope_theta == 5e5 and old.rope_scaling == model.RopeScaling(**scaling)


def test_a_fingerprint_is_of_what_a_model_is_made_of(copy, params):
    seen = [checkpoint.fingerprint(copy)]
    (copy / "README.md").write_text("x")
    assert checkpoint.fingerprint(copy) == seen[0]
    (copy / "generation_config.json").write_text("{}")
    seen.append(checkpoint.fingerprint(copy))
    file = copy / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights["model.norm.weight"][-1] += 1
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    seen.append(checkpoint.fingerprint(copy))
    assert len(set(seen)) == 3


def test_every_end_of_text_counts(copy):
    edit_config(copy, eos_token_id=[7, 9])
    (copy / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert checkpoint.read_config(copy).eos_ids == (3, 7, 9)


@pytest.mark.parametrize(("named", "ends"), [(None, (0,)), (7, (7, 0)), ([0, 7], (0, 7))])
def test_what_ends_training_texts_ends_generations(tmp_path, named, ends):
    folder = Path(shutil.copytree(checkpoint.BUILT_IN["tiny-world"], tmp_path / "copy"))
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=named)
    lm = checkpoint.load_model(folder)
    assert lm.config.eos_ids == lm.params.config.eos_ids == ends
    assert checkpoint.eos(lm) == 0


def test_half_precision_weights_are_cast_as_asked(copy, params):
    def halve(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(np.float16)

    edit_tensors(copy, halve)
    expected = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)
    chex.assert_trees_all_equal(read(copy), expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.* is not one of Qwen2"),
        ({"architectures": None}, "architecture unnamed is not one of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "no key 'low_freq_factor'"),
        ({"hidden_size": "remove"}, "no key 'hidden_size'"),
        ({"hidden_size": "wide"}, "'wide'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is no size"),
        ({"hidden_size": -16}, "hidden_size=-16 is no size"),
        ({"vocab_size": 1 << 40}, "vocab_size=1099511627776 is no size"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is no size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 is not a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan is not a number above 0"),
        ({"eos_token_id": "x"}, "eos_token_id='x' is no token"),
        ({"bos_token_id": [1]}, r"bos_token_id=\[1\] is no token"),
        ({"architectures": 5}, "is not one of"),
    ],
)
def test_a_config_we_cannot_honour_is_refused_by_name(copy, changes, sentence):
    edit_config(copy, **changes)
    with pytest.raises(SealError, match=rf"config\.json: .*{sentence}"):
        checkpoint.read_config(copy)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_config_that_is_no_config_is_refused(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(SealError, match=r"config\.json: "):
        checkpoint.read_config(copy)


def test_a_missing_tensor_is_named(copy):
    edit_tensors(copy, lambda x: x.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(SealError, match=r"'model\.layers\.1\.self_attn\.k_proj\.bias' is missing"):
        read(copy)


def test_a_misshapen_tensor_is_named_with_both_shapes(copy):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(copy, lambda x: x.update({name: np.ascontiguousarray(x[name].T)}))
    with pytest.raises(SealError, match=rf"{name}.*\(16, 26\).*\(26, 16\)"):
        read(copy)


def test_a_tensor_of_integers_is_named(copy):
    edit_tensors(copy, lambda x: x.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(SealError, match=r"model\.norm\.weight.*has type I8"):
        read(copy)


def test_a_tied_config_beside_a_head_of_its_own_is_refused_a_copy_of_the_embedding_is_not(copy):
    edit_config(copy, tie_word_embeddings=True)
    with pytest.raises(SealError, match=r"lm_head\.weight differs"):
        read(copy)
    edit_tensors(copy, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"]}))
    assert read(copy).head is None


def test_a_whole_file_counts_more_than_an_index_that_was_left(copy, params):
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    chex.assert_trees_all_equal(read(copy), params)


def test_rotary_settings_are_read_from_the_only_place_or_refused(copy):
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 32, "rope_theta": 777.0}
    edit_config(copy, rope_parameters=None, rope_theta="remove", rope_scaling=scaled)
    found = checkpoint.read_config(copy)
    assert found.rope_theta == 777 and found.rope_scaling.factor == 8
    edit_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with pytest.raises(SealError, match="rope_scaling and rope_parameters differ"):
        checkpoint.read_config(copy)
    edit_config(copy, rope_scaling=None, rope_parameters={"full_attention": {"factor": 4.0}})
    with pytest.raises(SealError, match="is not supported"):
        checkpoint.read_config(copy)


def test_a_model_without_an_end_of_text_says_none(copy, params):
    config = dataclasses.replace(params.config, eos_ids=())
    assert architecture.write_config(config, params)["eos_token_id"] is None
    edit_config(copy, eos_token_id=[-1, 3], bos_token_id=-1)
    found = checkpoint.read_config(copy)
    assert found.eos_ids == (3,) and found.bos_id is None


@pytest.mark.parametrize("damage", ["cut", "garbage", "absent"])
def test_a_corrupt_file_is_named(copy, damage):
    file = copy / "model.safetensors"
    if damage == "absent":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\xff" * 500)
    with pytest.raises(SealError, match=r"model\.safetensors"):
        read(copy)


@pytest.mark.parametrize("size", [{"vocab_size": 2**31 - 1}, {"num_hidden_layers": 2**31 - 1}])
def test_sizes_are_compared_with_the_file_before_room_is_made(copy, size):
    edit_config(copy, **size)
    with pytest.raises(SealError, match="has shape|is missing"):
        read(copy)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "null"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_tokenizer_files_of_another_kind_are_refused(copy, file, text):
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (copy / file).write_text(text)
    if not (copy / "tokenizer.json").exists():
        (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(SealError, match="tokenizer files cannot be read"):
        checkpoint.load_tokenizer(copy)


def test_code_in_a_model_folder_is_never_run(tmp_path):
    folder = Path(shutil.copytree(checkpoint.BUILT_IN["tiny-world"], tmp_path / "copy"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    asked = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(asked))
    checkpoint.load_tokenizer(folder)  # as one of transformers' own
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [5, None, "", "../x", "/x"])
def test_an_index_names_files_of_its_folder(copy, name):
    table = {"weight_map": {"model.embed_tokens.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(table))
    (copy / "model.safetensors").unlink()
    with pytest.raises(SealError, match="is not a file of this folder"):
        read(copy)


def test_a_shard_that_the_index_promises_must_be_there(params, tmp_path):
    folder = checkpoint.save_hf(LM(params, None, params.config), tmp_path / "s", shard=10_000)
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(SealError, match=victim.name):
        read(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "../../elsewhere.safetensors"}}')
    with pytest.raises(SealError, match="index"):
        read(folder)
    index.write_text("[]")
    with pytest.raises(SealError, match="not an index"):
        read(folder)


def test_a_place_without_a_model_is_told_apart(tmp_path):
    with pytest.raises(SealError, match="no config.json there"):
        checkpoint.load_model(str(tmp_path))
    with pytest.raises(SealError, match="no such folder, and not a hub id"):
        checkpoint.load_model(str(tmp_path / "nowhere"))


def test_a_model_is_loaded_with_its_tokenizer(copy, params):
    with pytest.raises(SealError, match="tokenizer"):
        checkpoint.load_model(copy)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(copy / "tokenizer.json"))
    (copy / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    lm = checkpoint.load_model(copy)
    assert lm.tokenizer("a b a")["input_ids"] == [1, 2, 1] and lm.tokenizer.eos_token_id == 0
    assert lm.config == params.config and lm.source == copy
    chex.assert_trees_all_equal(lm.params, params)
    half = checkpoint.load_model(copy, dtype="bfloat16").params
    chex.assert_trees_all_equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_weights_are_not_used_in_a_type_that_their_sums_overflow(copy):
    """In float16 a candidate of numbers far below `optim.sound`'s limit spoils its neighbours."""
    with pytest.raises(SealError, match="model.dtype='float16': expected one of"):
        checkpoint.load_model(copy, dtype="float16")
