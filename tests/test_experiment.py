"""Whole runs on the tiny world: killed and resumed, and through the command line."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest
import shared_data

from seal_jax import checkpoint, experiment, held_out, lesson, runs, state, stats
from seal_jax import config as config_lib
from seal_jax.__main__ import main
from seal_jax.batching import SelfEdit
from seal_jax.errors import SealError
from seal_jax.tasks import Context
from seal_jax.tasks.registry import load_task

ROOT = Path(__file__).parents[1]
SMALL = [
    "outer.contexts=6",
    "sampling.n=3",
    "sampling.max_tokens=40",
    "sampling.chunk=9",
    "inner.epochs=3",
    "inner.chunk=4",
    "outer.sft.epochs=1",
    "evaluation.contexts=6",
]


def command(folder, *overrides):
    config = str(ROOT / "configs" / "tiny_world.yaml")
    return [sys.executable, "-m", "seal_jax", "run", config, *overrides, "--run", str(folder)]


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def record_files(folder):
    files = {p.relative_to(folder): p for p in sorted(folder.rglob("*.jsonl"))}
    return {name: path for name, path in files.items() if name.name != "metrics.jsonl"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(command(folder, *SMALL), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_a_complete_folder_and_ends_with_the_table(whole):
    folder, printed = whole
    for name in ("base", "passage", "own self-edits", "round 1", "round 2", "control", "oracle"):
        assert f"\n{name}" in printed
    for number in range(2):
        home = folder / f"round_{number}"
        assert lines(home / "edits.jsonl") == lines(home / "rewards.jsonl") == 18
        assert lines(home / "kept.jsonl") <= 6
        assert json.loads((home / "summary.json").read_text())["self_edits"] == 18
        assert (home / "policy").is_dir()
    table = json.loads((folder / "eval" / "table.json").read_text())
    assert table["oracle"]["n"] == 6 and table["oracle"]["se"] >= 0
    last, oracle = table["round 2"], table["oracle"]
    (logged,) = [row for row in runs.records(folder / "metrics.jsonl") if "eval/base" in row]
    assert logged["eval/round_2"] == last["mean"] and logged["eval/oracle"] == oracle["mean"]
    assert last["last_minus"] is None and len(set(last["contexts"])) == 6
    difference = stats.paired(last["rewards"], oracle["rewards"])
    assert oracle["last_minus"] == difference.record()


def test_a_finished_run_comes_by_again_and_adds_nothing(whole, capsys):
    before = {path: path.read_bytes() for path in sorted(whole[0].rglob("*.jsonl"))}
    assert main(command(whole[0], *SMALL)[3:]) == 0
    assert {path: path.read_bytes() for path in sorted(whole[0].rglob("*.jsonl"))} == before
    told = capsys.readouterr().err
    assert "adapt and test (round_1/rewards): 18 of 18" in told and " 0 of " not in told


def test_a_run_does_not_go_on_where_the_model_s_files_have_changed(whole, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "fingerprint", lambda folder: "another")
    assert main(command(whole[0], *SMALL)[3:]) == 2
    assert "began with another model: model.path has other files" in capsys.readouterr().err


def test_a_run_killed_between_a_record_and_its_line_of_scalars_logs_each_once(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    rows = runs.records(folder / "metrics.jsonl")
    (folder / "eval" / "table.json").unlink()  # made after its line
    runs.write_lines(folder / "metrics.jsonl", [x for x in rows if x["stage"] != "round_1"])
    assert main(command(folder, *SMALL)[3:]) == 0
    stages = sorted(row["stage"] for row in runs.records(folder / "metrics.jsonl"))
    assert stages == sorted(row["stage"] for row in rows)


def test_a_run_in_a_bucket_never_becomes_a_folder_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    none = ["outer.rounds=0", "evaluation.contexts=0", "outer.control=false"]
    path = "nosuch://BUCKET/runs/x"  # as gs:// where nothing serves it
    assert main([*command(path, *none)[3:]]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert main(["adapt", str(ROOT / "configs" / "tiny_world.yaml"), "--out", "gs://b/a"]) == 2
    assert "must be on this machine's disk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_place_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(command(place, *SMALL)[3:]) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
    missing = ["trackers=[wandb]"] if importlib.util.find_spec("wandb") is None else []
    if missing:  # says so before there is a folder
        assert main(command(tmp_path / "run", *SMALL, *missing)[3:]) == 2
        assert "wandb is not installed" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_output_that_nobody_reads_is_no_error():
    shell = f"{sys.executable} -m seal_jax --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() in ("0", "141") and "Traceback" not in done.stderr


def test_a_policy_is_exported_as_a_model_folder(whole, tmp_path, capsys):
    run, out = str(whole[0]), tmp_path / "model"
    assert main(["export", run, "--to", "hf", str(out)]) == 0
    base = checkpoint.load_model("tiny-world")
    policy = state.load_tree(whole[0] / "round_1" / "policy", base.params)
    chex.assert_trees_all_equal(checkpoint.load_model(out).params, policy)
    text = "Who led Arlen?"
    made = checkpoint.load_model(out)
    assert made.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert main(["export", run, str(out)]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["export", run, str(tmp_path / "other"), "--policy", "control/round_0"]) == 0
    assert main(["export", run, str(tmp_path / "third"), "--policy", "round_7"]) == 2
    assert "control/round_0, control/round_1, round_0, round_1" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "third")]) == 2
    assert "no run there" in capsys.readouterr().err and not (tmp_path / "third").exists()


def test_a_run_killed_at_three_stages_ends_with_the_same_records(whole, tmp_path):
    folder = tmp_path / "run"
    stages = [
        lambda: lines(folder / "round_0" / "edits.jsonl") >= 9,
        lambda: lines(folder / "round_0" / "rewards.jsonl") >= 4,
        lambda: lines(folder / "round_1" / "rewards.jsonl") >= 8,
    ]
    for reached in stages:
        process = subprocess.Popen(command(folder, *SMALL), stderr=subprocess.DEVNULL)
        while not reached():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # What a kill in the middle of a write would leave.
    with open(folder / "round_1" / "rewards.jsonl", "a") as out:
        out.write('{"context": "torn')
    assert main(command(folder, *SMALL)[3:]) == 0
    expected = record_files(whole[0])
    assert set(record_files(folder)) == set(expected)
    for name, path in record_files(folder).items():
        assert path.read_text() == expected[name].read_text(), name


def test_another_chunk_size_gives_the_same_records(whole, tmp_path):
    folder = tmp_path / "run"
    other = [x for x in SMALL if "chunk" not in x]
    other += ["sampling.chunk=18", "inner.chunk=3", "outer.rounds=1", "outer.control=false"]
    assert main(command(folder, *other, "evaluation.contexts=0")[3:]) == 0
    for name in ("edits", "rewards"):
        key = lambda row: (row["context"], row["index"])
        ours = sorted(runs.records(folder / "round_0" / f"{name}.jsonl"), key=key)
        theirs = sorted(runs.records(whole[0] / "round_0" / f"{name}.jsonl"), key=key)
        for a, b in zip(ours, theirs, strict=True):
            for field in ("first_loss", "last_loss", "logprob"):  # sums in another order
                if a.get(field) is not None:
                    assert a.pop(field) == pytest.approx(b.pop(field), rel=1e-4)
            assert a == b


def test_real_passages_go_through_the_same_command(tmp_path):
    path = shared_data.path("ki_inputs/squad_val.json")
    folder = tmp_path / "run"
    config = str(ROOT / "configs" / "squad_tiny.yaml")
    small = ["outer.contexts=3", "task.size=3", "sampling.n=2", "sampling.max_tokens=24"]
    arguments = ["run", config, f"task.path={path}", *small, "--run", str(folder)]
    assert main([*arguments, "inner.epochs=1", "evaluation.contexts=2"]) == 0
    rows = runs.records(folder / "round_0" / "rewards.jsonl")
    assert len(rows) == 6
    assert all(row["steps"] > 0 and row["error"] is None for row in rows)
    assert all(len(row["answers"]) == len(row["verdicts"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("outer.contexts=5000", "5000"),
        ("evaluation.contexts=5000", "evaluation.contexts"),
        ("task.name=nothing", "task.name"),
        ("task.name=no.such.module:task", "no.such.module"),
        ("inner.epoch=3", "did you mean"),
    ],
)
def test_bad_settings_end_before_a_folder_is_made(override, words, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(command(folder, override)[3:]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("seal-jax: ") and error.count("\n") <= 2
    assert not folder.exists()


def test_an_unknown_model_ends_with_a_sentence(tmp_path, capsys):
    assert main(command(tmp_path / "run", "model.path=./nowhere")[3:]) == 2
    assert "./nowhere" in capsys.readouterr().err


def test_adapt_teaches_one_passage_and_saves_the_adapter(tmp_path, capsys):
    config = str(ROOT / "configs" / "tiny_world.yaml")
    out = tmp_path / "adapter"
    assert main(["adapt", config, "sampling.n=3", "inner.epochs=3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "<- best" in printed and "before:" in printed
    assert (out / "adapter_model.safetensors").is_file()
    assert main(["adapt", config, "--passage", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no such file" in capsys.readouterr().err


def test_a_lesson_without_questions_shows_no_reward(capsys):
    """Nothing was tested: a reward of 0 and a best self-edit would be made up."""
    edits = [SelfEdit(Context("c", "T", "P"), i, f"text {i}") for i in range(2)]
    losses, rewards = np.ones((2, 3)), np.zeros(2)
    taught = lesson.Lesson(edits[0].context, edits, losses, rewards, 0, [], [], [], None)
    lesson.print_lesson(taught)
    printed = capsys.readouterr().out
    assert "reward" not in printed and "best" not in printed.lower()
    assert "no question to choose by" in printed and "Self-edit 0:\ntext 0" in printed


def test_adapt_saves_no_adapter_that_diverged(tmp_path, capsys):
    config = str(ROOT / "configs" / "tiny_world.yaml")
    out = tmp_path / "adapter"
    fast = ["sampling.n=2", "inner.epochs=1", "inner.learning_rate=1e30"]
    assert main(["adapt", config, *fast, "--out", str(out)]) == 2
    assert "all inner loops diverged" in capsys.readouterr().err
    assert not out.exists()


def test_adapt_configures_a_puzzle_and_tests_what_it_did(tmp_path, capsys):
    cfg = config_lib.load_config(ROOT / "configs" / "arc_tiny.yaml", ["sampling.n=3"])
    taught = lesson.teach(cfg)
    task = load_task(cfg.task)
    asked = task.questions(taught.context)
    assert len(asked) == len(taught.questions) == len(taught.before) == len(taught.after) > 0
    assert taught.rewards.max() == task.grade(taught.context, taught.after).reward
    lesson.print_lesson(taught)
    assert "question 1\n  gold:" in capsys.readouterr().out
    passage = tmp_path / "p.txt"
    passage.write_text("Title\nA passage.")
    path = str(ROOT / "configs" / "arc_tiny.yaml")
    words = ["task.name=arc", f"task.path={tmp_path / 'any.json'}", "--passage", str(passage)]
    assert main(["adapt", path, *words]) == 2
    assert "does not learn from passages" in capsys.readouterr().err


def test_settings_may_stand_before_or_after_options(tmp_path, capsys):
    config = str(ROOT / "configs" / "tiny_world.yaml")
    for words in (
        [config, "inner.epoch=3", "--run", "x=1"],
        [config, "--run", "x=1", "inner.epoch=3"],
        ["--run", "x=1", config, "inner.epoch=3"],
    ):
        assert main(["run", *words]) == 2
        assert "did you mean 'inner.epochs'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "adapt", "pretrain", "export"])
def test_each_command_s_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"seal-jax {name} " in capsys.readouterr().out


def test_no_and_unknown_commands(capsys):
    assert main([]) == 0
    assert "run" in capsys.readouterr().out
    assert main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_pretraining_writes_a_model_that_loads_the_same_each_time(tmp_path, capsys):
    for name in ("a", "b"):
        arguments = ["pretrain", "tiny-world", "--out", str(tmp_path / name), "--tokens", "7000"]
        assert main(arguments) == 0
    files = [tmp_path / name / "model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    lm = checkpoint.load_model(str(tmp_path / "a"))
    assert lm.config.eos_ids == (lm.tokenizer.eos_token_id,)
    assert main(["pretrain", "tiny-world", "--out", str(tmp_path / "a")]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["base", "control", "round 2", "round-1", "own self-edits"])
def test_a_reference_with_the_name_of_another_row_is_refused(name):
    """Both would have one file of records."""
    cfg = config_lib.load_config(ROOT / "configs" / "tiny_world.yaml")
    task = load_task(cfg.task)._replace(references={"some": len, name: len})
    with pytest.raises(SealError, match="the name of another row"):
        experiment.check(cfg, task)


def test_a_reference_without_a_self_edit_for_a_context_is_told():
    task = load_task("tiny-world")._replace(references={"some": lambda context: []})
    with pytest.raises(SealError, match="'some' gives no self-edit for"):
        held_out.reference_edits(task, "some", task.held_out[:1])


def test_a_report_without_a_table_says_what_the_rounds_came_to():
    """Counted as in the table, and with the names of their folders."""
    one = stats.mean_se([0.25, 0.5]).record()
    summary = {"base": one, "reward": one, "kept": 2}
    made = experiment.Report(Path("run"), [summary] * 2, [])
    line = "round 2 (round_1): base .375 (.125), self-edits .375 (.125), kept 2"
    assert str(made).splitlines()[1] == line and repr(made) == str(made)
