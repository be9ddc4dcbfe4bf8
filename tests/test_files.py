"""A run's files in a bucket (one in memory stands for it) are used as those on a disk."""

import fsspec
import jax.numpy as jnp
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from seal_jax import config, files, outer, runs, state
from seal_jax.errors import SealError


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A folder of a bucket that lives in memory."""

    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs", "memory")
        store, pseudo_dirs = {}, [""]

    fsspec.register_implementation("gs", Bucket, clobber=True)
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setenv("SEAL_JAX_CACHE", str(tmp_path / "cache"))
    return "gs://bucket/run"


def test_a_run_folder_in_a_bucket_keeps_records_and_resumes(bucket):
    cfg = config.Config()
    folder = runs.open_run(cfg, bucket)
    file = folder / "round_0" / "edits.jsonl"
    runs.append(file, [{"a": 1}])
    runs.append(file, [{"a": "é"}])
    assert runs.records(file) == [{"a": 1}, {"a": "é"}]
    assert str(runs.open_run(cfg, bucket)).rstrip("/") == bucket
    assert files.entries(folder) == ["config.yaml", "environment.json", "round_0"]
    with pytest.raises(SealError, match=r"inner\.epochs"):
        runs.open_run(config.load_config(None, ["inner.epochs=4"]), bucket)


def test_a_folder_of_a_bucket_is_copied_once_without_code(bucket):
    folder = files.path("gs://bucket/model")
    for name in ("config.json", "evil.py", "model.safetensors"):
        files.write(folder / name, name.encode())
    copy = files.local_copy(folder, ("*.json", "*.safetensors"))
    assert sorted(x.name for x in copy.iterdir()) == ["config.json", "model.safetensors"]
    assert (copy / "config.json").read_text() == "config.json"
    before = (copy / "config.json").stat().st_mtime_ns
    assert files.local_copy(folder, ("*.json",)) == copy
    assert (copy / "config.json").stat().st_mtime_ns == before


def test_a_policy_that_a_kill_left_half_in_a_bucket_is_made_again(bucket, monkeypatch):
    """There its folder is there before it is whole: nothing can be renamed."""
    saved, kept = [], outer.Scored("a", 0, "prompt", "text", (1.0,))
    monkeypatch.setattr(outer, "finetune", lambda *args: ({"a": jnp.ones(1)}, [1.0, 0.5]))
    monkeypatch.setattr(state.ocp, "save", lambda *args, **options: saved.append(options))
    folder = files.path(f"{bucket}/round_0/policy")
    for last in ("d/half", "commit_success.txt"):
        files.write(folder / last, b"")
        assert state.is_saved(folder) == (last != "d/half")
        assert outer.train_policy(None, [kept], folder, None, config.Config())
    assert [options["overwrite"] for options in saved] == [True]


@pytest.mark.parametrize("put", [files.write, files.append])
def test_a_full_disk_is_told_of_with_the_file(put, tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        put(tmp_path / "edits.jsonl", b"{}")
    assert caught.value.filename == str(tmp_path / "edits.jsonl")


def test_the_machine_s_settings_change_no_run(tmp_path):
    runs.open_run(config.Config(), tmp_path / "run")
    other = config.load_config(None, ["mesh.model=2", "distributed.heartbeat_s=9"])
    assert runs.open_run(other, tmp_path / "run") == tmp_path / "run"
