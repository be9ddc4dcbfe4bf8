"""A saved tree comes back number for number, and lies as the one that it takes the place of."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest
import toys

from seal_jax import model, state
from seal_jax.errors import SealError

CONFIG = toys.config("qwen2", n_layers=2)


def test_restored_weights_run_the_programs_of_those_they_replace(tmp_path):
    base = toys.params(CONFIG)
    changed = jax.tree.map(lambda x: (x + 1).astype(jnp.bfloat16), base)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    state.save_tree(tmp_path / "policy", changed)
    restored = state.load_tree(tmp_path / "policy", base)
    chex.assert_trees_all_equal(restored, changed)
    forward = jax.jit(lambda params, tokens: model.forward(params, None, tokens))
    tokens = jnp.ones((1, 4), jnp.int32)
    for params in (base, changed, restored):
        forward(params, tokens)
    assert forward._cache_size() == 1


def test_a_tree_bound_to_a_device_is_restored_there(tmp_path):
    device = jax.devices()[0]
    tree = jax.device_put({"a": jnp.arange(3.0)}, device)
    state.save_tree(tmp_path / "tree", tree)
    restored = state.load_tree(tmp_path / "tree", tree)
    chex.assert_trees_all_equal(restored, tree)
    assert restored["a"].committed and restored["a"].devices() == {device}


def test_what_cannot_be_saved_is_a_sentence_and_leaves_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SealError, match="policy: cannot be saved"):
        state.save_tree(tmp_path / "file" / "policy", {"a": jnp.arange(3.0)})
    assert (tmp_path / "file").read_text() == "mine"


def test_where_nothing_can_be_saved_a_process_ends_at_once_with_one_sentence(tmp_path):
    """Orbax's threads wait ten minutes for a folder that nobody makes, and print what they met."""
    (tmp_path / "file").write_text("mine")
    place = str(tmp_path / "file" / "policy")
    code = f"from seal_jax import state; state.save_tree({place!r}, {{'a': 1.0}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "seal_jax.errors.SealError" in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 2  # of ours, and of what it comes from
