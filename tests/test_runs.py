"""The run folder: records survive torn lines, folders of other runs are refused."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from seal_jax import config, runs
from seal_jax.errors import SealError
from seal_jax.tasks import Context, Question
from seal_jax.tasks.arc.tasks import ArcTask, Pair


def test_records_come_back_as_written_in_order(tmp_path):
    file = tmp_path / "deep" / "rows.jsonl"
    runs.append(file, [{"a": 1}, {"a": "é\n"}])
    runs.append(file, [{"a": None}])
    assert runs.records(file) == [{"a": 1}, {"a": "é\n"}, {"a": None}]


def test_a_torn_last_line_is_dropped_and_the_next_record_starts_clean(tmp_path):
    file = tmp_path / "rows.jsonl"
    runs.append(file, [{"a": 1}])
    with open(file, "a") as out:
        out.write('{"a": 2, "te')
    assert runs.records(file) == [{"a": 1}]
    runs.append(file, [{"a": 3}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"a": 3}]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\nnonsense\n{"a": 3}\n')
    with pytest.raises(SealError, match="rows.jsonl, line 2"):
        runs.records(file)


def test_records_hold_no_nan(tmp_path):
    with pytest.raises(ValueError):
        runs.append(tmp_path / "rows.jsonl", [{"a": float("nan")}])
    assert runs.records(tmp_path / "rows.jsonl") == []


def test_a_folder_resumes_its_own_run_and_refuses_another_by_key(tmp_path):
    cfg = config.load_config(None, ["inner.epochs=3"])
    folder = runs.open_run(cfg, tmp_path / "run")
    assert runs.open_run(cfg, folder) == folder
    with pytest.raises(SealError, match=r"inner\.epochs"):
        runs.open_run(config.load_config(None, ["inner.epochs=4"]), folder)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["jax"]


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(SealError, match="no run of ours"):
        runs.open_run(config.Config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_scalars_go_to_a_file_and_to_tensorboard(tmp_path):
    metrics = runs.Metrics(tmp_path, ["tensorboard"])
    metrics.log(stage="x", reward=0.5)
    (row,) = runs.records(tmp_path / "metrics.jsonl")
    assert (row["stage"], row["reward"]) == ("x", 0.5)
    assert list((tmp_path / "tensorboard").iterdir())


def test_scalars_of_no_stage_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "x"}\n{"stage": [null]}\n')
    with pytest.raises(SealError, match="metrics.jsonl, line 2: 'stage'"):
        runs.Metrics(tmp_path)


def test_a_folder_that_was_not_begun_is_begun(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / ".config.yaml.partial").write_text("half")
    cfg = config.load_config(None)
    assert runs.open_run(cfg, tmp_path) == tmp_path
    assert (tmp_path / "config.yaml").exists()


def test_a_run_may_go_on_with_other_chunks_and_trackers(tmp_path):
    runs.open_run(config.load_config(None), tmp_path / "run")
    changes = ["inner.chunk=3", "sampling.chunk=8", "answers.chunk=8", "trackers=[wandb]"]
    changes += ["task.openai.max_calls=9", "task.openai.concurrency=2"]  # a budget was spent
    for change in changes:
        runs.open_run(config.load_config(None, [change]), tmp_path / "run")
    for change in ("inner.epochs=3", "task.openai.model=other"):
        with pytest.raises(SealError, match=change.partition("=")[0]):
            runs.open_run(config.load_config(None, [change]), tmp_path / "run")


def test_two_runs_are_not_at_work_in_one_folder(tmp_path):
    with runs.alone(tmp_path):
        with pytest.raises(SealError, match="another run is at work there"):
            with runs.alone(tmp_path):
                pass
    with runs.alone(tmp_path):
        pass


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n3\n')
    with pytest.raises(SealError, match="line 2: not a record"):
        runs.records(tmp_path / "x.jsonl")


def test_of_two_runs_in_a_new_folder_the_second_changes_nothing(tmp_path):
    first, second = (config.load_config(None, [f"seed={i}"]) for i in range(2))
    with runs.opened(first, tmp_path / "run", ()) as folder:
        (folder / "config.yaml").unlink()  # as if it had not come so far
        with pytest.raises(SealError, match="another run is at work there"):
            with runs.opened(second, tmp_path / "run", ()):
                pass
        assert not (folder / "config.yaml").exists()
    with runs.opened(second, tmp_path / "run", ()) as folder:
        assert config.load_config(folder / "config.yaml") == second


def test_a_run_does_not_go_on_with_other_contexts(tmp_path):
    cfg = config.load_config(None)
    context = Context("a", "T", "P", (Question("", "gold", "Q?"),))
    other = dataclasses.replace(context, questions=(Question("", "other", "Q?"),))
    for _ in range(2):
        with runs.opened(cfg, tmp_path / "run", [context]):
            pass
    with pytest.raises(SealError, match="began with other contexts"):
        with runs.opened(cfg, tmp_path / "run", [other]):
            pass


def test_a_run_does_not_go_on_with_another_model(tmp_path):
    cfg = config.load_config(None)
    for model in ("a", "a", None):  # None: as an earlier version called it
        runs.open_run(cfg, tmp_path / "run", model=model)
    with pytest.raises(SealError, match="began with another model"):
        runs.open_run(cfg, tmp_path / "run", model="b")


@pytest.mark.parametrize(
    "data", [{"completions": ["a"]}, (ArcTask((), Pair(np.zeros((2, 2), int), None), "p"),)]
)
def test_a_run_does_not_go_on_where_only_the_data_of_its_contexts_changed(tmp_path, data):
    """An ARC puzzle says and asks nothing by itself; nor do self-edits that came with a passage."""
    cfg, odd = config.load_config(None), Context("b", data=object())
    for _ in range(2):
        with runs.opened(cfg, tmp_path / "run", [Context("a", data=data), odd]):
            pass
    other = copy.deepcopy(data)
    if isinstance(other, dict):
        other["completions"] = ["b"]
    else:
        other[0].test.input[1, 1] = 3
    with pytest.raises(SealError, match="began with other contexts"):
        with runs.opened(cfg, tmp_path / "run", [Context("a", data=other), odd]):
            pass
    before = runs.read_json(tmp_path / "run" / "environment.json")
    del before["context_data"]  # as an earlier version wrote it
    runs.write_json(tmp_path / "run" / "environment.json", before)
    with runs.opened(cfg, tmp_path / "run", [Context("a", data=other), odd]):
        pass


def test_data_that_json_has_no_form_for_keeps_no_run_from_beginning(tmp_path):
    loop = []
    loop.append(loop)
    for odd in (loop, object(), {(1, 2): {3}}):
        for _ in range(2):
            folder = tmp_path / type(odd).__name__
            with runs.opened(config.load_config(None), folder, [Context("a", data=odd)]):
                pass


@pytest.mark.parametrize("line", ['{"context": "a"}', '{"context": "a", "reward": null}'])
def test_a_record_that_lacks_something_is_named(tmp_path, line):
    file = tmp_path / "rewards.jsonl"
    file.write_text('{"context": "a", "reward": 1}\n' + line + "\n")
    with pytest.raises(SealError, match="rewards.jsonl, line 2: 'reward' is not as a run writes"):
        runs.records(file, context=str, reward=float)


@pytest.mark.parametrize("line", ['{"a": NaN}', "[" * 100_000])
def test_a_record_that_json_has_not_is_refused(tmp_path, line):
    file = tmp_path / "rewards.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(SealError, match="line 1: not valid JSON"):
        runs.records(file)


def test_half_a_surrogate_pair_is_recorded_as_any_text(tmp_path):
    """A model's JSON may hold it, and an error quote it."""
    row = {"error": "unknown key '\ud800'", "text": "\\\ude00 é"}
    runs.append(tmp_path / "rows.jsonl", [row])
    runs.write_lines(tmp_path / "kept.jsonl", [row])
    runs.write_json(tmp_path / "summary.json", row)
    assert runs.records(tmp_path / "rows.jsonl") == runs.records(tmp_path / "kept.jsonl") == [row]
    assert runs.read_json(tmp_path / "summary.json") == row
