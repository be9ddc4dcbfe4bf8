"""A saved tree comes back number for number, and lies as the one that it takes the place of."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest
import toys
from orbax.checkpoint import v1 as ocp

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


def test_arrays_of_other_shapes_are_refused(tmp_path):
    folder = tmp_path / "policy"
    state.save_tree(folder, {"a": jnp.arange(6.0)})
    for shape in (5, 7, (2, 3)):
        with pytest.raises(SealError, match="policy: holds arrays of other shapes"):
            state.load_tree(folder, {"a": jnp.zeros(shape)})


def test_what_cannot_be_saved_is_a_sentence_and_leaves_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SealError, match="policy: cannot be saved"):
        state.save_tree(tmp_path / "file" / "policy", {"a": jnp.arange(3.0)})
    assert (tmp_path / "file").read_text() == "mine"


def test_where_nothing_can_be_saved_a_process_ends_at_once_with_one_sentence(tmp_path):
    """Orbax's threads wait ten minutes for a folder that nobody makes, and print what they met."""
    (tmp_path / "file").write_text("mine")
    place = str(tmp_path / "file" / "policy")
    code = (
        "import jax.numpy as jnp\nfrom seal_jax import state\n"
        f"state.save_tree({place!r}, {{'a': jnp.ones(1)}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "seal_jax.errors.SealError" in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 2  # of ours, and of what it comes from


def test_no_changed_byte_of_an_array_goes_unnoticed(tmp_path):
    folder = tmp_path / "policy"
    tree = {"a": jax.random.normal(jax.random.key(0), (40, 50)), "b": jnp.ones(3, jnp.bfloat16)}
    state.save_tree(folder, tree)
    file = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda x: x.stat().st_size
    )
    whole = file.read_bytes()
    assert len(whole) > 7000  # the numbers, which no packing makes fewer
    for place in range(500, 7000, 500):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(SealError, match="policy: (damaged: a is not what|cannot be restored)"):
            state.load_tree(folder, tree)
    file.write_bytes(whole)
    chex.assert_trees_all_equal(state.load_tree(folder, tree), tree)


def test_trees_are_told_apart_by_their_sums(tmp_path):
    tree = {"a": jax.random.normal(jax.random.key(0), (4, 6)), "b": jnp.ones(4, jnp.bfloat16)}
    others = [{**tree, "a": -tree["a"]}, {**tree, "b": -tree["b"]}, {**tree, "a": tree["a"] * 2}]
    for i, own in enumerate((tree, tree, *others)):
        state.save_tree(tmp_path / str(i), own)
    first, again, *rest = (state.sums(tmp_path / str(i)) for i in range(5))
    assert first == again and set(first) == {"a", "b"}
    assert all(first != other for other in rest)


def test_sums_are_those_of_folders_that_were_saved_before(tmp_path):
    """With another sum every policy on disk would be damaged."""
    tree = {"a": jnp.arange(5.0), "b": jnp.arange(3.0, dtype=jnp.bfloat16), "c": jnp.uint8([1, 2])}
    assert not state.is_saved(tmp_path / "policy")
    state.save_tree(tmp_path / "policy", tree)
    assert state.is_saved(tmp_path / "policy")
    assert state.sums(tmp_path / "policy") == {
        "a": ["float32", 2357401932],
        "b": ["bfloat16", 2418092106],
        "c": ["uint8", 2185423805],
    }


def test_a_tree_that_is_there_is_not_written_over(tmp_path):
    folder, tree = tmp_path / "policy", {"a": jnp.arange(3.0)}
    state.save_tree(folder, tree)
    with pytest.raises(SealError, match="policy: cannot be saved"):
        state.save_tree(folder, {"a": jnp.zeros(3)})
    chex.assert_trees_all_equal(state.load_tree(folder, tree), tree)


def test_a_tree_may_be_read_as_another_type_and_come_without_sums(tmp_path):
    tree = {"a": jnp.arange(5.0, dtype=jnp.bfloat16)}
    state.save_tree(tmp_path / "policy", tree)
    wider = {"a": jnp.zeros(5)}
    chex.assert_trees_all_equal(state.load_tree(tmp_path / "policy", wider), {"a": jnp.arange(5.0)})
    ocp.save(tmp_path / "earlier", tree)
    assert state.sums(tmp_path / "earlier") == {}
    chex.assert_trees_all_equal(state.load_tree(tmp_path / "earlier", tree), tree)
