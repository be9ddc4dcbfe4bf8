"""The paper's three settings on the tiny world: trained, answered and recorded for real."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from seal_jax import batching, checkpoint, config, experiment, runs, state
from seal_jax.__main__ import main
from seal_jax.errors import SealError, SelfEditError
from seal_jax.evals import inner_loop, study
from seal_jax.formats import continual as continual_file
from seal_jax.formats import cpt as cpt_file
from seal_jax.formats import results
from seal_jax.tasks import Edit, Example
from seal_jax.tasks.registry import load_task

CONFIG = str(Path(__file__).parents[1] / "configs" / "tiny_world.yaml")
SMALL = [
    "outer.control=false",
    "outer.rounds=0",
    "sampling.max_tokens=32",
    "sampling.chunk=8",
    "inner.epochs=4",
    "inner.chunk=4",
    "evaluation.contexts=4",
]


def settings(*overrides):
    return config.load_config(CONFIG, [*SMALL, *overrides])


def rows_of(made):
    return {row.name: list(row.rewards) for row in made.rows}


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.json*")}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """An evaluation of single passages, through the command line."""
    folder = tmp_path_factory.mktemp("single") / "run"
    words = ["eval", CONFIG, *SMALL, "single", "evaluation.n=2", "--run", str(folder)]
    assert main(words) == 0
    return folder


def test_single_passages_are_the_table_of_a_run_without_rounds(tmp_path):
    report = experiment.run(settings(), tmp_path / "run")
    table = {row.name: list(row.rewards) for row in report.table}
    own = rows_of(study.run(settings(), "single", tmp_path / "own"))
    assert own == {"no self-edit": table["base"], "own self-edits": table["own self-edits"]}
    passage = settings("evaluation.self_edits=passage")
    made = rows_of(study.run(passage, "single", tmp_path / "passage"))
    assert made == {"no self-edit": table["base"], "passage self-edits": table["passage"]}


def test_the_result_file_is_the_reference_s_and_says_what_the_summary_says(single):
    content = results.read(single / "eval" / "single" / "result.json")
    assert results.recompute(content, from_questions=True) == content["overall"]
    assert [len(article["completions"]) for article in content["articles"]] == [2] * 4
    summary = json.loads((single / "eval" / "single" / "summary.json").read_text())
    assert content["overall"]["adapter_mean_accuracy"] == pytest.approx(
        summary["own self-edits"]["mean"], abs=1e-4
    )
    assert summary["own self-edits"]["trials"] == 8 and summary["own self-edits"]["se"] >= 0
    assert summary["own self-edits"]["gain"]["mean"] == pytest.approx(
        summary["own self-edits"]["mean"] - summary["no self-edit"]["mean"]
    )


def test_what_an_evaluation_came_to_is_logged_once(single):
    """Trackers show it."""
    study.run(settings("evaluation.n=2"), "single", single)
    found = runs.records(single / "metrics.jsonl")
    (logged,) = [row for row in found if "single/no self-edit" in row]
    summary = json.loads((single / "eval" / "single" / "summary.json").read_text())
    assert logged["single/own self-edits"] == summary["own self-edits"]["mean"]


def test_an_interrupted_evaluation_ends_with_the_same_files(single, tmp_path):
    whole = files_of(single)
    folder = tmp_path / "run"
    home = folder / "eval" / "single"
    home.mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        (folder / name).write_bytes((single / name).read_bytes())
    for name, keep in (("base.jsonl", 4), ("edits.jsonl", 5), ("rewards.jsonl", 3)):
        lines = (single / "eval" / "single" / name).read_text().splitlines(keepends=True)
        (home / name).write_text("".join(lines[:keep]) + '{"context": "to')
    study.run(settings("evaluation.n=2"), "single", folder)
    ended = files_of(folder)
    assert set(ended) == set(whole)
    for name in set(whole) - {Path("metrics.jsonl")}:
        assert ended[name] == whole[name], name


def test_a_policy_is_tested_and_edited_in_place_of_the_model(single, tmp_path):
    """A policy that is the model scores as the model; one whose head is turned round does not."""
    lm = checkpoint.load_model("tiny-world")
    other = lm.params.replace(norm=-lm.params.norm)
    for name, params in (("same", lm.params), ("other", other)):
        state.save_tree(tmp_path / name, params)
    before = json.loads((single / "eval" / "single" / "summary.json").read_text())
    scores = {}
    for name in ("same", "other"):
        chosen = settings("evaluation.n=2", f"evaluation.policy={tmp_path / name}")
        scores[name] = rows_of(study.run(chosen, "single", tmp_path / f"run_{name}"))
    assert scores["same"] == {name: before[name]["rewards"] for name in scores["same"]}
    assert scores["other"] != scores["same"]


def test_several_self_edits_of_an_oracle_count_by_the_best(tmp_path):
    """As in the held-out table of a run, on ARC's tiny grids."""
    few = ["evaluation.contexts=1", "inner.max_steps=20", "task.arc.max_examples=8"]
    few += ["evaluation.references=[oracle]", "sampling.n=1", "evaluation.self_edits=oracle"]
    path = str(Path(CONFIG).with_name("arc_tiny.yaml"))
    cfg = config.load_config(path, ["outer.rounds=0", "outer.control=false", *few])
    table = {row.name: row for row in experiment.run(cfg, tmp_path / "run").table}
    bare, own = study.run(cfg, "single", tmp_path / "study").rows
    assert own.rewards == table["oracle"].rewards and own.trials == 16
    assert bare.rewards == table["base"].rewards
    assert not (tmp_path / "study" / "eval" / "single" / "result.json").exists()  # no passages


def passages(tmp_path, *entries):
    """Returns settings of evaluating these passages' own self-edits."""
    file = tmp_path / "passages.json"
    asked = [{"question": "Who leads Arlen?", "answer": "Ida"}]
    whole = [{"title": "A", "context": "P.", "questions": asked, **entry} for entry in entries]
    file.write_text(json.dumps(whole))
    squad = ["task.name=squad", f"task.path={file}", "task.style=implications"]
    chosen = ["evaluation.self_edits=file", "evaluation.n=2", "evaluation.contexts=0"]
    return settings(*squad, "task.order_seed=null", *chosen)


def test_self_edits_that_came_with_the_passages_are_applied(tmp_path):
    cfg = passages(tmp_path, {"completions": ["x", "y\nz"]}, {"title": "B", "completion": "w"})
    study.run(cfg, "single", tmp_path / "run")
    content = results.read(tmp_path / "run" / "eval" / "single" / "result.json")
    texts = {a["title"]: [c["text"] for c in a["completions"]] for a in content["articles"]}
    assert texts == {"A": ["x", "y\nz"], "B": ["w"]}


def test_what_came_with_a_passage_is_a_list_of_texts_or_nothing(tmp_path):
    odd = [{"completions": "abc"}, {"completions": [3]}, {"completion": {"a": 1}}]
    odd += [{"completions": ["\ud800"]}]  # half of a surrogate pair
    for entry in odd:
        with pytest.raises(SealError, match="'A': its completions are not a list of texts"):
            study.run(passages(tmp_path, entry), "single", tmp_path / "run")
    with pytest.raises(SealError, match="evaluation.self_edits=file: none came"):
        study.run(passages(tmp_path, {"completion": None}, {}), "single", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_given_self_edits_are_applied_to_their_own_passages_one_after_the_other(
    tmp_path, monkeypatch
):
    """Equal passages keep theirs apart; a blank one is the passage, once; passages that nothing is
    asked about are left out.
    """
    texts = ["one", "two", None]
    entries = [{"completions": [text]} for text in texts]
    cfg = passages(tmp_path, *entries, {"title": "B", "questions": []})
    length = {"continual": config.Continual(sequences=2, length=3)}
    cfg = dataclasses.replace(cfg, evaluation=dataclasses.replace(cfg.evaluation, **length))
    trained = []

    def apply(lm, edit, *rest):
        trained.append(sorted(example.completion for example in edit.examples))
        return lm

    monkeypatch.setattr(study.SETTINGS["continual"].__globals__["engine"], "apply", apply)
    study.run(cfg, "continual", tmp_path / "run")
    expected = sorted([["A\nP.", "A\none"], ["A\nP.", "A\ntwo"], ["A\nP."]])
    assert sorted(trained[:3]) == sorted(trained[3:]) == expected


@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_training_on_the_self_edits_of_all_passages_teaches_all(tmp_path, method):
    """Continued pretraining on the oracle's self-edits; a second call trains nothing again."""
    chosen = settings(
        "evaluation.self_edits=oracle",
        "inner.epochs=8",
        "inner.batch_size=8",
        f"inner.learning_rate={'3e-3' if method == 'lora' else '1e-3'}",
        f"evaluation.cpt.method={method}",
    )
    folder = tmp_path / "run"
    made = study.run(chosen, "cpt", folder)
    before, after = (row.estimate.mean for row in made.rows)
    assert after > before + 0.2
    file = folder / "eval" / "cpt" / "result.json"
    content = cpt_file.read(file)
    assert content["overall"] == cpt_file.overall(content["server_reply"])
    assert content["eval_questions"] == 60 and len(content["per_article"]) == 4
    stamp = (folder / "eval" / "cpt" / "policy").stat().st_mtime_ns
    again = study.run(chosen, "cpt", folder)
    assert rows_of(again) == rows_of(made)
    assert (folder / "eval" / "cpt" / "policy").stat().st_mtime_ns == stamp


def test_a_folder_of_no_policy_or_of_another_model_s_is_refused_before_there_is_a_run(tmp_path):
    lm = checkpoint.load_model("tiny-grids")
    state.save_tree(tmp_path / "x" / "round_1" / "policy", lm.params)
    (tmp_path / "empty").mkdir()
    checkpoint.save_hf(lm, tmp_path / "hf")
    named = {"empty": "cannot be restored", "x/round_1": "another model", "hf": "name it as model"}
    for folder, words in named.items():
        with pytest.raises(SealError, match=words):
            chosen = settings(f"evaluation.policy={tmp_path / folder}")
            study.run(chosen, "single", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_continual_edits_stay_in_the_model_and_are_recorded_sequence_by_sequence(tmp_path):
    chosen = settings(
        "evaluation.self_edits=oracle",
        "inner.epochs=10",
        "evaluation.continual.sequences=3",
        "evaluation.continual.length=2",
    )
    folder = tmp_path / "run"
    made = study.run(chosen, "continual", folder)
    rows = rows_of(made)
    file = folder / "eval" / "continual" / "sequences.jsonl"
    records = runs.records(file)
    for i, record in enumerate(records):
        (a, b), (first, zero), last = record["matrix"]
        assert zero == 0.0 and len(set(record["contexts"])) == 2
        assert rows["before"][i] == pytest.approx((a + b) / 2)
        assert rows["right after its edit"][i] == pytest.approx((first + last[1]) / 2)
        assert rows["all, at the end"][i] == pytest.approx(sum(last) / 2)
    before, own, end = (sum(values) / 3 for values in rows.values())
    assert own > before + 0.3 and end > before + 0.1  # the first passage is not all forgotten
    content = continual_file.read(folder / "eval" / "continual" / "result.json")
    assert content["n_sequences"] == 3
    # One that was killed after the first sequence ends with the same records.
    whole = file.read_text()
    file.write_text(whole.splitlines(keepends=True)[0])
    assert rows_of(study.run(chosen, "continual", folder)) == rows
    assert file.read_text() == whole


def test_continual_self_edits_are_written_by_the_edited_model(tmp_path):
    """The first self-edit of a sequence is the base model's; the second that of its edited one."""
    chosen = settings(
        "inner.learning_rate=5e-2",
        "evaluation.continual.sequences=1",
        "evaluation.continual.length=2",
    )
    still = dataclasses.replace(chosen, inner=dataclasses.replace(chosen.inner, learning_rate=0.0))
    texts = []
    for name, cfg in (("edited", chosen), ("still", still)):
        study.run(cfg, "continual", tmp_path / name)
        (record,) = runs.records(tmp_path / name / "eval" / "continual" / "sequences.jsonl")
        texts.append(record["self_edits"])
    assert texts[0][0] == texts[1][0] and texts[0][1] != texts[1][1]


CARD = re.compile("(Question: .+ Answer:)( .+)")


def cards(settings):
    """The tiny world, where the answers of questions alone are trained on, after the questions."""

    def edit(context, text):
        found = [m.groups() for m in map(CARD.fullmatch, text.splitlines()) if m]
        if not found:
            raise SelfEditError("there is no card")
        return Edit(tuple(Example(answer, prompt) for prompt, answer in found))

    own = lambda c: "\n".join(f"{q.prompt} {q.gold}" for q in c.questions)
    some = lambda c: "no card" if c == world.held_out[0] else own(c)
    world = load_task(dataclasses.replace(settings, name="tiny-world"))
    return world._replace(edit=edit, references={"some": some})


@pytest.mark.parametrize("setting", ["cpt", "continual"])
def test_edits_with_prompts_are_trained_after_them_and_bad_ones_left_out(tmp_path, setting):
    chosen = settings(
        f"task.name={__name__}:cards",
        "evaluation.self_edits=some",
        "evaluation.continual.sequences=1",
        "evaluation.continual.length=4",
        "inner.epochs=10",
        "inner.batch_size=16",
        "inner.learning_rate=3e-3",
    )
    rows = rows_of(study.run(chosen, setting, tmp_path / "run"))
    home = tmp_path / "run" / "eval" / setting
    if setting == "cpt":
        assert json.loads((home / "refused.json").read_text()) == ["there is no card"]
        assert sum(rows["some self-edits"][1:]) > 3 * 0.8 and sum(rows["before training"]) < 1
    else:
        (record,) = runs.records(home / "sequences.jsonl")
        assert record["refused"] == ["there is no card"]
        assert rows["right after its edit"][0] > 0.5


def test_without_a_self_edit_that_can_be_applied_there_is_no_policy(tmp_path):
    few = "evaluation.contexts=1"
    chosen = settings(f"task.name={__name__}:cards", "evaluation.self_edits=some", few)
    with pytest.raises(SealError, match="no self-edit can be applied: there is no card"):
        study.run(chosen, "cpt", tmp_path / "run")
    assert not (tmp_path / "run" / "eval" / "cpt" / "policy").exists()


def test_on_a_mesh_the_figures_are_those_of_one_device(tmp_path):
    """Two devices share out candidates, two the heads; edits are merged into weights on all."""
    chosen = ["evaluation.self_edits=oracle", "inner.epochs=10", "inner.batch_size=4"]
    chosen += ["evaluation.continual.sequences=1", "evaluation.continual.length=2"]
    one = rows_of(study.run(settings(*chosen), "continual", tmp_path / "one"))
    words = ["eval", CONFIG, "continual", *SMALL, *chosen, "mesh.model=2"]
    command = [sys.executable, "-m", "seal_jax", *words, "--run", str(tmp_path / "mesh")]
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run(command, env={**os.environ, **devices}, check=True)
    file = tmp_path / "mesh" / "eval" / "continual" / "summary.json"
    record = json.loads(file.read_text())
    assert {name: record[name]["rewards"] for name in one} == one


@pytest.mark.parametrize(
    ("setting", "overrides", "words"),
    [
        ("single", ["evaluation.self_edits=nosuch"], "own, file, passage, oracle"),
        ("single", ["evaluation.contexts=1000"], "evaluation.contexts=1000: the task has 200"),
        ("single", ["evaluation.policy=nosuch/policy"], "evaluation.policy: nosuch/policy"),
        ("continual", ["evaluation.continual.length=5"], "evaluation.continual.length=5"),
        ("cpt", ["inner.pad_loss=true"], "inner.pad_loss"),
        ("continual", ["inner.max_steps=5"], "inner.max_steps"),
        ("cpt", ["task.name=tiny-grids"], "eval cpt: needs passages"),
        ("continual", ["outer.adapt=base", "evaluation.policy=x"], "makes no use of it"),
        (
            "single",
            ["outer.adapt=base", "evaluation.policy=x", "evaluation.self_edits=passage"],
            "single of passage self-edits makes no use of it; set outer.adapt=policy",
        ),
        ("twice", [], "'twice' is unknown"),
    ],
)
def test_settings_that_do_not_fit_leave_no_folder(tmp_path, setting, overrides, words):
    with pytest.raises(SealError, match=words):
        study.run(settings(*overrides), setting, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epochs", [1, 20])
def test_an_edit_that_diverges_is_an_error_not_a_model(epochs):
    from seal_jax.evals import engine

    lm = checkpoint.load_model("tiny-world")
    cfg = settings("inner.learning_rate=1e30", "inner.clip=0", f"inner.epochs={epochs}")
    with pytest.raises(SealError, match="diverged; lower inner.learning_rate"):
        made, name = inner_loop.documents(["a b c"]), batching.identity("x")
        engine.apply(lm, made, name, jax.random.key(0), cfg)


def test_an_evaluation_does_not_go_on_with_what_has_become_another_policy(tmp_path):
    lm = checkpoint.load_model("tiny-world")
    few = ["evaluation.contexts=1", "inner.epochs=1", "evaluation.self_edits=passage"]
    chosen = settings(*few, f"evaluation.policy={tmp_path / 'policy'}")
    state.save_tree(tmp_path / "policy", lm.params)
    made = study.run(chosen, "single", tmp_path / "run")
    assert rows_of(study.run(chosen, "single", tmp_path / "run")) == rows_of(made)
    shutil.rmtree(tmp_path / "policy")
    state.save_tree(tmp_path / "policy", lm.params.replace(norm=-lm.params.norm))
    with pytest.raises(SealError, match="single: began with another policy: .*policy"):
        study.run(chosen, "single", tmp_path / "run")
