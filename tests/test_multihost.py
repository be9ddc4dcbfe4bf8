"""Runs of two processes, and of one that is asked to stop: the same records, and clear ends."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from seal_jax import checkpoint, runs
from seal_jax import params as params_lib
from seal_jax.__main__ import main

ROOT = Path(__file__).parents[1]
SMALL = [
    "task.size=8",
    "outer.rounds=1",
    "outer.contexts=3",
    "outer.control=false",
    "outer.sft.epochs=1",
    "sampling.n=2",
    "sampling.max_tokens=12",
    "sampling.chunk=2",
    "answers.max_tokens=4",
    "inner.epochs=1",
    "inner.chunk=2",
    "evaluation.contexts=0",
    "distributed.start_s=120",
]
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a worker of pytest ignores
from seal_jax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
LATE = 240  # seconds after which a test gives up


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model of one layer, and the compiled programs of all runs here."""
    home = tmp_path_factory.mktemp("multihost")
    lm = checkpoint.load_model("tiny-world")
    tiny = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_head": 8, "d_ff": 32}
    config = dataclasses.replace(lm.config, **tiny)
    lm = checkpoint.LM(params_lib.init(config, 1), lm.tokenizer, config)
    checkpoint.save_hf(lm, home / "model")
    return home


def settings(home, *overrides):
    config = str(ROOT / "configs" / "tiny_world.yaml")
    return [config, *SMALL, f"model.path={home / 'model'}", *overrides]


def arguments(home, folder, *overrides):
    return ["run", *settings(home, *overrides), "--run", str(folder)]


def launch(home, words, devices=1):
    environment = {
        **os.environ,
        "SEAL_JAX_CACHE": str(home / "cache"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-c", COMMAND, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def pair():
    """Returns the settings that join two processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    join = [f"distributed.coordinator=localhost:{port}", "distributed.processes=2"]
    return [[*join, f"distributed.process_id={i}"] for i in range(2)]


def launch_two(home, folder):
    return [launch(home, arguments(home, folder, *join)) for join in pair()]


def ends(processes):
    """Returns exit status and standard error of each."""
    texts = [process.communicate(timeout=LATE)[1] for process in processes]
    return [process.returncode for process in processes], texts


def wait_for(process, reached):
    """Waits until a run has come so far."""
    start = time.monotonic()
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - start < LATE
        time.sleep(0.02)


def count(file):
    return file.read_text().count("\n") if file.exists() else 0


def check_same(ours, theirs):
    """Asserts that two runs left the same records; losses are sums in another order."""
    for name in ("edits", "rewards", "base", "kept"):
        file = Path("round_0") / f"{name}.jsonl"
        rows, expected = runs.records(ours / file), runs.records(theirs / file)
        assert len(rows) == len(expected) > 0
        for a, b in zip(rows, expected, strict=True):
            for field in ("first_loss", "last_loss", "logprob"):
                if a.get(field) is not None:
                    assert a.pop(field) == pytest.approx(b.pop(field), rel=1e-3)
            assert a == b, name
    assert (ours / "round_0" / "policy").is_dir()


@pytest.fixture(scope="module")
def alone(home):
    """The run of one process."""
    assert main(arguments(home, home / "alone")) == 0
    return home / "alone"


def test_two_processes_leave_the_records_of_one(home, alone):
    processes = launch_two(home, home / "two")
    status, texts = ends(processes)
    assert status == [0, 0], texts
    check_same(home / "two", alone)
    assert "write self-edits" in texts[0] and "write self-edits" not in texts[1]


@pytest.mark.parametrize(
    "setting", ["single", pytest.param("cpt", marks=pytest.mark.slow), "continual"]
)
def test_two_processes_evaluate_as_one_does(home, setting):
    length = ["evaluation.continual.sequences=1", "evaluation.continual.length=2"]
    words = [*settings(home, "evaluation.contexts=3", *length), setting, "--run"]
    one, two = home / f"{setting}_one", home / f"{setting}_two"
    assert main(["eval", *words, str(one)]) == 0
    status, texts = ends([launch(home, ["eval", *words, str(two), *join]) for join in pair()])
    assert status == [0, 0], texts
    for name in ("summary.json", "result.json"):
        file = Path("eval") / setting / name
        assert (two / file).read_text() == (one / file).read_text(), name


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other_with_a_sentence_and_a_restart_goes_on(home, alone, killed):
    folder = home / f"killed_{killed}"
    processes = launch_two(home, folder)
    wait_for(processes[0], lambda: count(folder / "round_0" / "rewards.jsonl") >= 2)
    processes[killed].kill()
    status, texts = ends(processes)
    assert status[1 - killed] not in (0, -signal.SIGKILL)
    assert f"process {killed} of 2 was lost" in texts[1 - killed]
    if not killed:
        return
    status, texts = ends(launch_two(home, folder))
    assert status == [0, 0], texts
    check_same(folder, alone)


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_the_next_record_and_the_same_command_goes_on(
    home, alone, number, ends_with
):
    folder = home / f"stopped_{ends_with}"
    process = launch(home, arguments(home, folder))
    wait_for(process, lambda: count(folder / "round_0" / "edits.jsonl") >= 1)
    process.send_signal(number)
    (status,), (text,) = ends([process])
    assert status == ends_with and "the same command goes on from here" in text
    assert not (folder / "round_0" / "summary.json").exists()
    assert main(arguments(home, folder)) == 0
    check_same(folder, alone)


UNDER_WAY = """
import jax
from seal_jax.__main__ import COMMANDS, main

def interrupted(words):
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x))
    endless(jax.numpy.zeros((500, 500)))
    raise KeyboardInterrupt

COMMANDS["adapt"] = interrupted
main()
"""


def test_ctrl_c_waits_for_no_program_on_the_devices():
    """Python's own end does, and then crashes under it; this one would take for ever."""
    command = [sys.executable, "-c", UNDER_WAY, "adapt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "seal-jax: interrupted\n")


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_record(home):
    folder = home / "both_stopped"
    processes = launch_two(home, folder)
    wait_for(processes[0], lambda: count(folder / "round_0" / "edits.jsonl") >= 1)
    processes[1].send_signal(signal.SIGTERM)
    status, texts = ends(processes)
    assert status == [143, 143], texts
    assert all("the same command goes on from here" in text for text in texts)
    assert not (folder / "round_0" / "summary.json").exists()


def test_the_command_on_eight_devices_leaves_the_records_of_one(home, alone):
    process = launch(home, arguments(home, home / "eight", "mesh.model=2"), devices=8)
    status, texts = ends([process])
    assert status == [0], texts
    check_same(home / "eight", alone)


def test_two_processes_teach_a_passage_as_one_does(home):
    def words(folder, *join):
        return ["adapt", *settings(home, *join), "--out", str(folder)]

    alone = launch(home, words(home / "taught"))
    status, texts = ends([alone])
    assert status == [0], texts
    processes = [launch(home, words(home / "taught_by_two", *join)) for join in pair()]
    shown = [process.communicate(timeout=LATE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    assert "<- best" in shown[0][0] and "<- best" not in shown[1][0]
    ours, theirs = (
        safetensors.numpy.load_file(home / name / "adapter_model.safetensors")
        for name in ("taught_by_two", "taught")
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=2e-3, atol=2e-5)


def test_a_model_judges_for_two_processes(home):
    """It is asked by process 0 alone: nothing in between may wait for the other."""
    entry = {"context": "Bees make honey.", "questions": [{"question": "What?", "answer": "honey"}]}
    path = home / "passages.json"
    path.write_text(json.dumps([entry | {"title": f"T{i}"} for i in range(3)]))
    judged = ["task.name=squad", f"task.path={path}", "task.judge=model", "task.size=3"]
    words = [*judged, "outer.contexts=2", "sampling.n=1"]
    folder = home / "judged"
    processes = [launch(home, arguments(home, folder, *words, *join)) for join in pair()]
    status, texts = ends(processes)
    assert status == [0, 0], texts
    assert len(runs.records(folder / "round_0" / "rewards.jsonl")) == 2
