"""Tasks by name; what cannot be loaded is named in a sentence."""

import sys

import pytest

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.tasks.registry import load_task

MODULE = """
import toys
from seal_jax.tasks import Context
def good(settings): return toys.task()._replace(name=settings.style)
def other(settings): return {"contexts": []}
def twins(settings):
    return toys.task()._replace(contexts=[Context("a"), Context("b")], held_out=[Context("b")])
def fails(settings): return len(3)
def none(): return None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "tasks_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "tasks_of_mine"
    sys.modules.pop("tasks_of_mine", None)


def test_a_factory_of_your_own_gets_the_settings(module):
    chosen = config.Task(name=f"{module}:good", style="rewrite")
    assert load_task(chosen).name == "rewrite"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}:other", "the factory returned dict, no Task"),
        ("{}:twins", "several contexts have the id 'b'"),
        ("{}:fails", "cannot be loaded: object of type 'int' has no len"),
        ("{}:none", "cannot be loaded: none\\(\\) takes 0 positional arguments"),
        ("{}:nosuch", "cannot be loaded: .*nosuch"),
        ("no_such_module:task", "cannot be loaded: No module named"),
        ("squid", "expected squad, arc, tiny-world, tiny-grids or package.module:factory"),
    ],
)
def test_what_cannot_be_loaded_is_named(module, name, words):
    with pytest.raises(SealError, match=words) as caught:
        load_task(config.Task(name=name.format(module)))
    assert name.format(module) in str(caught.value)


@pytest.mark.parametrize("name", ["tiny-world", "tiny-grids", "arc"])
@pytest.mark.parametrize("judge", ["openai", "model"])
def test_a_judge_that_would_not_be_asked_is_refused(name, judge):
    with pytest.raises(SealError, match=f"task.judge={judge}: answers of {name} are compared"):
        load_task(config.Task(name=name, judge=judge))


@pytest.mark.parametrize("name", ["tiny-world", "tiny-grids"])
@pytest.mark.parametrize("key", ["path", "held_out"])
def test_a_file_that_would_not_be_read_is_refused(name, key):
    with pytest.raises(SealError, match=f"task.{key}=my.json: {name} makes its own contexts"):
        load_task(config.Task(name=name, **{key: "my.json"}))
