"""A test for each quirk of the reference that we decided on, in the order of the list.

What the reference does stands in the test's name or first line; the goldens are tested elsewhere.
"""

import ast
import dataclasses
import socket
from pathlib import Path

import jax
import pytest

import seal_jax as seal
from seal_jax import (
    batching,
    config,
    experiment,
    judge,
    judge_openai,
    outer,
    rewards,
    runs,
    writing,
)
from seal_jax.errors import SealError, SelfEditError
from seal_jax.tasks import Edit, Example

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny():
    cfg = config.load_config(ROOT / "configs" / "tiny_world.yaml", ["sampling.max_tokens=24"])
    return seal.load_model("tiny-world"), seal.load_task("tiny-world"), cfg


def test_padding_is_not_trained_on_unless_asked_for(tiny):
    """The reference copies padded ids into the labels, so padding is learned."""
    lm, _, _ = tiny
    edit, end = Edit((Example("This town serves rice."),)), lm.tokenizer.eos_token_id
    (text,) = batching.tokenize(edit, lm.tokenizer, end, config.Inner(max_length=32))
    assert list(text.tokens).count(end) == 1 and text.tokens[-1] == end
    assert text.weights.tolist() == [0] + [1] * (len(text.tokens) - 1)
    fidelity = config.Inner(max_length=32, pad_loss=True)
    (padded,) = batching.tokenize(edit, lm.tokenizer, end, fidelity)
    assert len(padded.tokens) == 32 and (padded.weights == 1).all()
    assert (padded.tokens[padded.real :] == end).all() and padded.real == len(text.tokens) - 1


@pytest.mark.parametrize("name", ["squad_qwen2p5_7b", "squad_qwen2p5_0p5b"])
def test_the_adapted_projections_are_written_down(name):
    """The reference leaves them to PEFT's default for Qwen2, q_proj and v_proj."""
    assert "targets: [q, v]" in (ROOT / "configs" / f"{name}.yaml").read_text()
    assert config.load_config(ROOT / "configs" / f"{name}.yaml").lora.targets == ("q", "v")


def test_draws_depend_on_the_seed_and_the_context_not_on_clock_or_company(tiny):
    """The reference seeds with the time."""
    lm, task, cfg = tiny
    first, second = task.contexts[:2]
    key = outer.key_of(cfg, "write", 0)
    together = seal.sample_edits(lm, task, [first, second], 2, key=key, cfg=cfg)
    alone = seal.sample_edits(lm, task, [second], 2, key=outer.key_of(cfg, "write", 0), cfg=cfg)
    assert [e.text for e in together[1]] == [e.text for e in alone[0]]
    assert [e.text for e in together[0]] != [e.text for e in together[1]]


def test_the_unadapted_model_answers_once_per_context_and_policy(tiny, tmp_path, monkeypatch):
    """The reference answers and judges it again for every candidate."""
    lm, task, cfg = tiny
    calls = []
    score = rewards.score
    monkeypatch.setattr(rewards, "score", lambda *a: calls.append(1) or score(*a))
    file = tmp_path / "base.jsonl"
    made = [outer.base_rewards(lm, task, task.contexts[:2], file, cfg) for _ in range(3)]
    assert len(calls) == 1 and made[0] == made[1] == made[2]


def test_the_default_judge_needs_neither_network_nor_key(monkeypatch):
    """The reference needs GPT-4.1 even for rewards."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the judge used the network"))
    assert judge.load(config.Task())([("Who led?", "Ann", "Ann led them."), ("q", "a", "")]) == [
        True,
        False,
    ]


def test_a_failed_judge_call_is_an_error_and_never_a_verdict(monkeypatch, tmp_path):
    """The reference counts it as wrong."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with socket.socket() as nobody:  # a port on which nothing listens
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
    settings = config.OpenAI(base_url=url, retries=0, cache=str(tmp_path))
    with pytest.raises(SealError):
        judge_openai.judge_many([("q", "gold", "answer")], settings)


def test_a_self_edit_that_cannot_be_applied_is_written_again_a_few_times(tiny):
    """The reference samples again until one parses, without end."""
    lm, task, cfg = tiny

    def edit(context, text):
        if len(text) % 3:
            raise SelfEditError("is too long or too short")
        return task.edit(context, text)

    strict, key = task._replace(edit=edit), jax.random.key(3)
    contexts = task.contexts[:3]

    def write(retries, some):
        sampling = dataclasses.replace(cfg.sampling, retries=retries, max_tokens=16)
        own = dataclasses.replace(cfg, sampling=sampling)
        return [x for own in writing.write(lm, strict, some, 4, key, own) for x in own]

    first, again = write(0, contexts), write(2, contexts)
    fits = lambda one: len(one.edit.text) % 3 == 0
    assert 0 < sum(map(fits, first)) < sum(map(fits, again))
    for a, b in zip(first, again, strict=True):
        assert a.tries == 1 and (b == a if fits(a) else b.tries > 1)
        assert fits(b) or b.tries == 3
    alone = [x for context in contexts for x in write(2, [context])]
    seen = lambda written: [(x.edit.text, x.tries) for x in written]
    assert seen(again) == seen(alone)  # whatever the company


def test_a_self_edit_that_cannot_be_applied_scores_as_none_and_is_counted(tiny):
    """In the reference there is none."""
    lm, task, cfg = tiny

    def edit(context, text):
        if text == "broken":
            raise SelfEditError("is broken")
        return task.edit(context, text)

    strict = task._replace(edit=edit)
    context = task.contexts[0]
    edits = [batching.SelfEdit(context, i, t) for i, t in enumerate(["broken", "It is good."])]
    found = [
        x for part, _ in rewards.evaluate(lm, strict, edits, jax.random.key(0), cfg) for x in part
    ]
    bad, good = sorted(found, key=lambda outcome: outcome.at)
    base = seal.score(lm, None, task, [context], cfg)
    assert (bad.error, bad.steps) == ("is broken", 0)
    assert bad.answers == base.answers[0] and bad.grade.reward == base.reward[0]
    assert good.error is None and good.steps == cfg.inner.epochs
    rows = [outer._reward_record(edits[x.at], 0, x) for x in (bad, good)]
    scored = outer.gather(task, edits, rows)
    summary = experiment.summarise(scored, outer.keep_best(scored), list(base.reward), rows)
    assert summary["not_applied"] == {"is broken": 1}


def test_a_model_without_finite_losses_is_told_from_a_self_edit_that_diverges(tiny):
    lm, task, cfg = tiny
    broken = lm.params.replace(norm=lm.params.norm * float("nan"))
    fast = dataclasses.replace(cfg, inner=dataclasses.replace(cfg.inner, learning_rate=1e38))
    once = dataclasses.replace(cfg, inner=dataclasses.replace(fast.inner, epochs=1, batch_size=0))
    for own, params, error in (
        (cfg, broken, "bare model"),
        (fast, lm.params, "diverged at step 1"),
        (once, lm.params, "diverged at the last step"),
    ):
        edits = [batching.SelfEdit(task.contexts[0], 0, "It is good.")]
        model = lm._replace(params=params)
        ((outcomes, _),) = rewards.evaluate(model, task, edits, jax.random.key(0), own)
        assert error in outcomes[0].error


def test_nothing_in_the_package_evaluates_text_or_unpickles():
    """The reference passes model outputs to eval()."""
    files = sorted((ROOT / "seal_jax").rglob("*.py"))
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), file
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "marshal", "shelve"} & set(names), file


def test_split_newlines_is_one_typed_setting_recorded_with_the_run(tmp_path):
    """The reference tests "true" in one script, "1" in another, and drops it in a third."""
    for text in ("true", "1", "yes"):
        assert config.load_config(None, [f"task.split_newlines={text}"]).task.split_newlines is True
    cfg = config.load_config(None, ["task.split_newlines=false"])
    folder = runs.open_run(cfg, tmp_path / "run")
    assert config.load_config(folder / "config.yaml").task.split_newlines is False
    with pytest.raises(SealError, match="task.split_newlines"):
        config.load_config(None, ["task.split_newlines=perhaps"])


def test_a_run_never_writes_over_another(tmp_path):
    """The reference's output paths are fixed."""
    runs.open_run(config.Config(seed=1), tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(SealError, match="seed"):
        runs.open_run(config.Config(seed=2), tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == before
