"""Settings: every file loads, and a mistake is named."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from seal_jax import config, experiment
from seal_jax.errors import SealError
from seal_jax.tasks.registry import load_task

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_file_loads_opens_with_its_command_and_survives_a_round_trip(path, tmp_path):
    cfg = config.load_config(path)
    assert cfg.name == path.stem
    head = path.read_text().splitlines()
    assert head[0].startswith(f"# python -m seal_jax run configs/{path.name}")
    assert any("Hardware:" in line for line in head[:4])
    assert any("Expected" in line for line in head[:5])
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump(cfg))
    assert config.load_config(copy) == cfg
    assert hash(cfg) == hash(config.load_config(path))


def commands():
    """Returns the runs that configurations, README and docs name: their words."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *CONFIGS]
    found = []
    for page in pages:
        text = re.sub(r" \\\n#? *", " ", page.read_text())
        named = re.findall(
            r"(?:seal-jax|seal_jax) run (configs/\S+\.yaml)((?: [a-z_.]+=\S+)*)", text
        )
        found += [(page.name, path, words.rstrip("`").split()) for path, words in named]
    return [each for each in found if not any("task.name=" in word for word in each[2])]


@pytest.mark.parametrize(("page", "path", "words"), commands(), ids=str)
def test_a_run_that_is_named_somewhere_begins(page, path, words, tmp_path, monkeypatch):
    """With files of any content, as large as the reference's."""
    monkeypatch.chdir(tmp_path)
    cfg = config.load_config(ROOT / path, words)
    for name in filter(None, (cfg.task.path, cfg.task.held_out)):
        asked = [{"question": "Who?", "answer": "Ida"}]
        content = [{"title": name, "context": f"{i}", "questions": asked} for i in range(200)]
        if cfg.task.name == "arc":
            pair = {"input": [[1]], "output": [[2]]}
            content = {f"{name}{i}": {"train": [pair] * 3, "test": [pair]} for i in range(12)}
            held_out = name == cfg.task.held_out
            solutions = cfg.task.arc.held_out_solutions if held_out else cfg.task.arc.solutions
            Path(solutions).write_text(json.dumps({key: [[[2]]] for key in content}))
        Path(name).write_text(json.dumps(content))
    experiment.check(cfg, load_task(cfg.task))


def test_the_paper_s_values_are_the_defaults():
    cfg = config.load_config(None)
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets) == (32, 64.0, ("q", "v"))
    assert (cfg.inner.learning_rate, cfg.inner.epochs, cfg.inner.batch_size) == (1e-3, 10, 1)
    assert (cfg.outer.sft.learning_rate, cfg.outer.sft.epochs, cfg.outer.sft.batch_size) == (
        3e-4,
        2,
        10,
    )
    assert (cfg.sampling.temperature, cfg.sampling.top_p) == (1.0, 0.95)


def test_overrides_change_one_value_and_scientific_notation_is_a_number():
    cfg = config.load_config(None, ["inner.learning_rate=1e-4", "lora.targets=[q, gate]"])
    assert cfg.inner.learning_rate == 1e-4
    assert cfg.lora.targets == ("q", "gate")
    assert cfg.inner.epochs == config.Inner().epochs


def test_overrides_are_a_list():
    with pytest.raises(SealError, match="'inner.epochs=5': expected a list"):
        config.load_config(None, "inner.epochs=5")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load_config(None).inner.epochs = 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inner.epoch=5", ["inner.epoch", "did you mean 'inner.epochs'"]),
        ("lora.rnak=5", ["did you mean 'lora.rank'"]),
        ("epochs=5", ["unknown key 'epochs'", "inner.epochs"]),
        ("lora.rank=sixteen", ["lora.rank", "integer"]),
        ("lora.rank=0", ["lora.rank", "greater than or equal to 1"]),
        ("lora.targets=[query]", ["lora.targets"]),
        ("lora.targets=q", ["lora.targets='q': expected a list, such as [q]"]),
        ("trackers=tensorboard", ["expected a list, such as [tensorboard]"]),
        ("lora.targets=[]", ["lora.targets", "at least 1 item"]),
        ("outer.sft.epochs=0", ["outer.sft.epochs", "greater than or equal to 1"]),
        ("inner.learning_rate=.nan", ["inner.learning_rate"]),
        ("sampling.top_p=1.5", ["sampling.top_p"]),
        ("inner=5", ["inner", "group of settings"]),
        ("inner.epochs", ["expected key=value"]),
        ("inner.epochs=true", ["inner.epochs: True", "is neither number nor text"]),
        ("inner.learning_rate=no", ["inner.learning_rate: False", "neither number"]),
        ("task.path=on", ["task.path: True (as YAML reads yes, no, on"]),
        ("name=[", ["not YAML"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named(override, words):
    with pytest.raises(SealError) as caught:
        config.load_config(None, [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora: {rnak: 3}", ["try.yaml", "lora.rnak", "did you mean 'lora.rank'"]),
        ("a: [\n", ["try.yaml", "line 2", "not valid YAML"]),
        ("- 1", ["try.yaml", "key: value"]),
        ("outer: {sft: {epochs: yes}}", ["try.yaml: outer.sft.epochs: True"]),
        ("x: !!python/object/apply:os.system [true]", ["try.yaml", "not valid YAML"]),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(text, words, tmp_path):
    path = tmp_path / "try.yaml"
    path.write_text(text)
    with pytest.raises(SealError) as caught:
        config.load_config(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SealError, match="none.yaml: no such configuration file"):
        config.load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "inner: {epochs: 3}\nname: a\ninner: {epochs: 4}",
            "line 3: .*'inner' stands",
        ),
        ("name: 2001-99-99", "not valid YAML"),
        ("name: !!int foo", "not valid YAML"),
        ("name: !!bool foo", "not valid YAML"),
        ("seed: " + "1" * 5000, "not valid YAML"),
        ("name: " + "[" * 3000, "not valid YAML"),
    ],
)
def test_odd_yaml_is_refused_with_a_sentence(tmp_path, text, message):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(SealError, match=message):
        config.load_config(file)


@pytest.mark.parametrize("change", ["seed=-1", "seed=4294967296", "sampling.max_tokens=2147483648"])
def test_numbers_beyond_what_jax_holds_are_refused_as_overrides(change):
    with pytest.raises(SealError, match=f"^override: {change}: Input should be"):
        config.load_config(None, [change])
