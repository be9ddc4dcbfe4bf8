"""Each benchmark runs, both sides compute the same, and its file says what the page quotes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PEERS = all(importlib.util.find_spec(name) for name in ("torch", "peft"))


def quick(name: str, folder: Path) -> dict:
    """Returns the JSON that a quick run of a benchmark writes."""
    out = folder / "out.json"
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--quick", "--out", out]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    return json.loads(out.read_text())


def check_cache(runs: dict) -> None:
    """The first run finds no program in the cache, the second every one of them."""
    first, second = runs["first"], runs["second"]
    assert first["programs_from_cache"] == 0 < second["programs_asked_of_cache"]
    assert second["programs_from_cache"] == second["programs_asked_of_cache"]


def test_arc(tmp_path):
    result = quick("arc", tmp_path)
    assert result["machine"]["cores"] >= 1 and result["candidates"] == 4
    rows = {(row["way"], row["chunk"]): row for row in result["rows"]}
    assert all(0 < row["useful"] <= 1 and 0 < row["active"] <= 1 for row in rows.values())


def test_what_a_gpu_will_run_runs_here(tmp_path):
    result = quick("gpu", tmp_path)
    assert all(0 <= gap < 3e-2 for gap in result["numerics"].values())
    (found,) = result["shapes"].values()
    assert found["round"]["self_edits"] == found["projected"]["self_edits"] == 3 * 5 * 2
    assert found["round"]["seconds"] > 0 and found["projected"]["seconds"] > 0
    assert found["adapters"]["q, v"]["chunks"][-1]["share_of_floor"] > 0
    for case in found["generation"].values():
        assert case["tokens_per_s"] > 0 and case.get("agreement", 1.0) == 1.0


def test_a_second_run_finds_its_programs_in_the_cache(tmp_path):
    check_cache(quick("second_run", tmp_path)["runs"])


@pytest.mark.slow
def test_inner_loop(tmp_path):
    result = quick("inner_loop", tmp_path)
    found = result["adapters"]["q, v"]
    assert [row["chunk"] for row in found["chunks"]] == [1, 2]
    for row in found["chunks"]:
        assert row["useful_tokens_per_s"] > 0 and 0 < row["token_efficiency"] <= 1
        assert 0 < row["share_of_floor"]
    if PEERS:  # the same weights, adapter, texts and order: float32 sums differ in rounding
        assert all(row["loss_difference"] < 1e-4 for row in found["chunks"])
        assert found["peers"]["padded"]["useful_tokens_per_s"] > 0


@pytest.mark.slow
def test_generate(tmp_path):
    for case in quick("generate", tmp_path)["cases"].values():
        assert case["tokens_per_s"] > 0 and case["share_of_bandwidth"] > 0
        assert case.get("agreement", 1.0) == 1.0


@pytest.mark.slow
def test_mesh(tmp_path):
    result = quick("mesh", tmp_path)
    useful = {row["way"]: row["useful"] for row in result["planned"]}
    assert 0 < useful["lockstep"] < useful["lanes"] <= 1
    assert all(row["candidates_per_s"] > 0 for row in result["run"])


@pytest.mark.slow
def test_round(tmp_path):
    check_cache(quick("round", tmp_path)["runs"])


@pytest.mark.slow
def test_validity(tmp_path):
    rows = quick("validity", tmp_path)["rows"]
    share = {way: valid for _, way, _, valid, _ in rows}
    assert share["grammar"] == 1.0 >= share["free"] > 0
