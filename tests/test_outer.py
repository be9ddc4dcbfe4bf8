"""Choosing self-edits, finetuning on them, and keys that depend on their purpose alone."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import seal_jax as seal
from seal_jax import config, experiment, outer, rewards, runs, stats, writing
from seal_jax import rows as rows_lib
from seal_jax.batching import Candidate, SelfEdit
from seal_jax.errors import SealError
from seal_jax.outer import Scored
from seal_jax.tasks import Context, Grade


def scored(context, index, *rewards, text="text"):
    return Scored(context, index, "prompt", text, rewards)


def test_the_best_of_each_context_is_kept_in_order_of_appearance():
    kept = outer.keep_best(
        [scored("b", 0, 0.1), scored("b", 1, 0.9), scored("a", 0, 0.5), scored("a", 1, 0.2)]
    )
    assert [(x.context, x.index) for x in kept] == [("b", 1), ("a", 0)]


def test_of_equal_ones_the_first_wins_even_when_sums_round_differently():
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ as floats; their exact means do not.
    assert (0.1 + 0.2) + 0.3 != (0.3 + 0.2) + 0.1
    for first, second in [((0.3, 0.2, 0.1), (0.1, 0.2, 0.3)), ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1))]:
        (kept,) = outer.keep_best([scored("a", 0, *first), scored("a", 1, *second)])
        assert kept.index == 0


def test_as_many_right_answers_tie_however_the_seeds_share_them():
    shared = [(0.0, 0.0, 0.6), (0.0, 0.2, 0.4), (0.2, 0.2, 0.2)]
    assert len({scored("a", 0, *x).reward for x in shared}) > 1
    for own in itertools.permutations(shared):
        candidates = [scored("a", i, *x) for i, x in enumerate(own)]
        assert [x.index for x in outer.keep_best(candidates)] == [0]
        assert len(outer.keep_best(candidates, 0, min_reward=0.2)) == 3


def test_a_blank_self_edit_is_never_replayed():
    made = [scored("a", 0, 1.0), scored("a", 1, 0.0), scored("a", 2, 0.0, text=" \n")]
    rows = [{"context": "a", "index": i, "steps": 3} for i in range(3)]
    assert [x.index for x in outer.applied(made, rows, made[:1])] == [1]


def test_all_zero_keeps_the_first_and_a_threshold_keeps_none():
    zeros = [scored("a", 0, 0.0), scored("a", 1, 0.0)]
    assert [x.index for x in outer.keep_best(zeros)] == [0]
    assert outer.keep_best(zeros, 1, min_reward=0.5) == []


def test_k_of_zero_keeps_all_that_reach_the_threshold():
    rows = [scored("a", i, r) for i, r in enumerate([1.0, 0.0, 1.0])]
    assert [x.index for x in outer.keep_best(rows, 0, min_reward=1.0)] == [0, 2]


def test_a_blank_best_self_edit_is_dropped_not_replaced():
    rows = [scored("a", 0, 0.9, text=" \n"), scored("a", 1, 0.5)]
    assert outer.keep_best(rows) == []
    assert [x.index for x in outer.keep_best(rows, 2)] == [1]


def test_the_control_takes_one_of_each_context_whatever_its_reward():
    rows = [scored(c, i, float(i == 0)) for c in "abcdefgh" for i in range(5)]
    chosen = outer.keep_random(rows, np.random.default_rng(0))
    assert [x.context for x in chosen] == list("abcdefgh")
    assert len({x.index for x in chosen}) > 1


def test_keys_differ_by_purpose_and_seed_and_are_otherwise_equal():
    cfg, other = config.Config(seed=1), config.Config(seed=2)
    data = lambda *a: tuple(jax.random.key_data(outer.key_of(*a)).tolist())
    assert data(cfg, "write", 0) == data(config.Config(seed=1), "write", 0)
    assert len({data(cfg, "write", 0), data(cfg, "write", 1), data(cfg, "sft", 0)}) == 3
    assert data(cfg, "write", 0) != data(other, "write", 0)


@pytest.fixture(scope="module")
def tiny():
    return seal.load_model("tiny-world"), seal.load_task("tiny-world")


ROWS = 4


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetuning_makes_the_kept_self_edits_likelier_and_leaves_the_policy_alone(tiny, method):
    lm, task = tiny
    contexts = task.contexts[:ROWS]
    rows = [(task.prompt(c), task.references["oracle"](c)) for c in contexts]
    before = [np.asarray(x) for x in jax.tree.leaves(lm.params)]
    own = config.Lora(rank=64, alpha=128.0, targets=("q", "v", "up", "down"))
    settings = config.Sft(method, own, learning_rate=2e-3, epochs=6, batch_size=ROWS)
    params, losses = outer.finetune(lm, rows, settings, jax.random.key(0))
    assert losses.shape == (6,)
    assert losses[-1] < 0.8 * losses[0]
    for a, b in zip(before, jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(params) == jax.tree.structure(lm.params)
    layers = lm.params.layers.items()
    same = {name for name, x in layers if np.array_equal(x, params.layers[name])}
    assert same == (lm.params.layers.keys() - own.targets if method == "lora" else set())
    again, _ = outer.finetune(lm, rows, settings, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    if method == "lora":  # its adapter is drawn
        other, _ = outer.finetune(lm, rows, settings, jax.random.key(1))
        assert not np.array_equal(other.layers["q"], params.layers["q"])


@pytest.mark.usefixtures("quick_compile")
def test_weights_of_bfloat16_are_trained_in_float32():
    """Steps that are too small for them one by one add up."""
    architecture = toys.config("qwen2", n_layers=1)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toys.params(architecture))
    lm = seal.LM(params, toys.Numbers(), architecture)
    settings = config.Sft("full", learning_rate=1e-4, epochs=20, schedule="constant")
    found, losses = outer.finetune(lm, [("5 6", "7 8 9")], settings, jax.random.key(0))
    before, after = params.layers["down"], found.layers["down"]
    assert after.dtype == jnp.bfloat16 and np.mean(before != after) > 0.5
    # The loss is on the self-edit and the end of it, given the prompt.
    log_p = jax.nn.log_softmax(toys.forward(params, None, np.array([5, 6, 7, 8, 9])))
    expected = -np.mean([log_p[0, i, token] for i, token in enumerate((7, 8, 9, toys.EOS), 1)])
    np.testing.assert_allclose(losses[0], expected, rtol=0.02)


def test_a_rate_of_zero_changes_nothing(tiny):
    lm, task = tiny
    rows = [(task.prompt(c), task.references["oracle"](c)) for c in task.contexts[:ROWS]]
    settings = config.Sft(method="full", learning_rate=0.0, epochs=1, batch_size=ROWS - 1)
    params, losses = outer.finetune(lm, rows, settings, jax.random.key(0))
    assert losses.shape == (2,)  # the second step is of one row
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_self_edit_that_is_cut_is_told_of(tiny, capsys):
    lm, task = tiny
    rows = [(task.prompt(c), task.references["oracle"](c)) for c in task.contexts[:ROWS]]
    size = 1 + max(len(lm.tokenizer(a + b)["input_ids"]) for a, b in rows)
    for length, told in ((size, ""), (size - 1, "of 4 texts are longer than")):
        settings = config.Sft(learning_rate=1e-4, epochs=1, max_length=length)
        outer.finetune(lm, rows, settings, jax.random.key(0))
        err = capsys.readouterr().err
        assert told in err and bool(told) == bool(err)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_policy_that_its_only_step_breaks_is_an_error(tiny, method):
    """The loss before the step was finite."""
    settings = config.Sft(method=method, epochs=1, learning_rate=1e38, weight_decay=100.0)
    with pytest.raises(SealError, match="a weight is not finite after the last step"):
        outer.finetune(tiny[0], [("a", "b c")], settings, jax.random.key(0))


def test_nothing_kept_is_an_error_for_finetune(tiny):
    with pytest.raises(SealError, match="no self-edit was kept"):
        outer.finetune(tiny[0], [], config.Sft(), jax.random.key(0))


def test_self_edits_of_a_broken_model_are_recorded_as_json(tiny, tmp_path):
    """Log-probabilities that are no numbers become null: a run can be read again."""
    lm, task = tiny
    broken = lm._replace(params=lm.params.replace(norm=np.nan * lm.params.norm))
    cfg = config.Config(sampling=config.Sampling(max_tokens=4))
    file = tmp_path / "edits.jsonl"
    outer.write_edits(broken, task, task.contexts[:1], 2, file, jax.random.key(0), cfg)
    assert "NaN" not in file.read_text()
    assert [row["logprob"] for row in runs.records(file)] == [None, None]


def test_as_many_self_edits_are_written_together_as_pay_on_the_device(tiny, tmp_path, monkeypatch):
    lm, task = tiny
    monkeypatch.setitem(rows_lib.MOST, "cpu", 6)
    groups, write = [], writing.write
    made = lambda lm, task, some, *rest, **kwargs: (
        groups.append(len(some)) or write(lm, task, some, *rest, **kwargs)
    )
    monkeypatch.setattr(outer.writing, "write", made)
    for chunk, expected in ((0, [3, 1]), (4, [2, 2])):
        cfg = config.Config(sampling=config.Sampling(max_tokens=4, chunk=chunk))
        groups.clear()
        file = tmp_path / f"{chunk}.jsonl"
        outer.write_edits(lm, task, task.contexts[:4], 2, file, jax.random.key(0), cfg)
        assert groups == expected


@pytest.mark.parametrize("stage", ["write", "test"])
def test_a_folder_that_is_deleted_meanwhile_is_an_error_not_a_reward_of_fewer_seeds(
    stage, tmp_path, monkeypatch
):
    cfg, file = config.Config(sampling=config.Sampling(n=1, chunk=1)), tmp_path / "x" / "x.jsonl"
    contexts = [Context(name) for name in "ab"]
    edits = [SelfEdit(context, 0, "text") for context in contexts]

    def write(lm, task, some, *args, **kwargs):
        shutil.rmtree(file.parent, ignore_errors=True)
        return [[writing.Written(edits[contexts.index(context)], 1, 0.0, True)] for context in some]

    def evaluate(*args, **kwargs):
        for at in range(2):
            shutil.rmtree(file.parent, ignore_errors=True)
            yield [rewards.Outcome(at, Grade(1.0, ()), [], 1, 1.0, 0.5, None)], rewards.Efficiency()

    monkeypatch.setattr(outer.readers, "ready", lambda lm, mesh: lm)
    monkeypatch.setattr(outer.sampling, "encode", lambda lm, prompt: [1])
    monkeypatch.setattr(outer.writing, "write", write)
    monkeypatch.setattr(outer.rewards, "evaluate", evaluate)
    task, key = toys.task(), jax.random.key(0)
    with pytest.raises(SealError, match="1 records have gone since they were written"):
        if stage == "write":
            outer.write_edits(None, task, contexts, 1, file, key, cfg)
        else:
            metrics = runs.Metrics(tmp_path)
            outer.test_edits(None, task, edits, 1, file, key, cfg, metrics)


@pytest.mark.parametrize(
    ("losses", "sound", "own", "expected"),
    [
        ([3.0, 2.0, 1.0], True, {}, (3, 3.0, 1.0, None, 1.0)),
        ([3.0, np.nan, np.nan], True, {}, (3, 3.0, None, "diverged at step 1", 1.0)),
        ([np.inf, np.nan], True, {}, (2, None, None, "the bare model's loss is not finite", 1.0)),
        ([3.0, 2.0], False, {}, (2, 3.0, 2.0, "diverged at the last step", 1.0)),
        ([], True, {"error": "line 1: not JSON"}, (0, None, None, "line 1: not JSON", 0.0)),
        ([3.0, 3.0], True, {"learning_rate": 0.0}, (0, 3.0, 3.0, None, 0.0)),
        ([3.0], True, {}, (1, 3.0, 3.0, None, 1.0)),
        ([3.0], True, {"warmup": 1}, (0, 3.0, 3.0, None, 0.0)),  # its only step is at a rate of 0
    ],
)
def test_a_record_says_what_became_of_an_inner_loop(losses, sound, own, expected):
    cfg = config.Config(
        inner=config.Inner(warmup_steps=own.pop("warmup", 0)),
        outer=config.Outer(reward_untrained=False),
    )
    candidate = Candidate((), 0.1, 1, 0)._replace(**own)
    found = rewards._outcome(7, Grade(1.0, ()), [], np.array(losses), sound, candidate, cfg)
    reward = found.grade.reward
    assert (found.steps, found.first_loss, found.last_loss, found.error, reward) == expected
    assert found.at == 7


def test_each_self_edit_is_answered_graded_and_recorded_as_itself(monkeypatch):
    """Chunks take those with most steps first: none of these is where it was."""
    epochs = [2, 1, 3, 5, 4]
    contexts = [Context(name) for name in "abcde"]
    edits = [SelfEdit(c, 0, f"epochs={n};1 2") for c, n in zip(contexts, epochs, strict=True)]
    own = lambda context, answers: Grade(float(answers == [context.id]), ())
    task, lm = toys.task()._replace(grade=own), seal.LM(None, toys.Numbers(), toys.config())
    # Of each: losses of 10, 11, ... times its place, and whether that is even.
    losses = lambda index: 10.0 * index[:, None] + np.arange(9.0)
    adapt = lambda params, batch, chunk, key, settings: (chunk.index, losses(chunk.index))
    monkeypatch.setattr(rewards.chunks, "choose", lambda params, batch, cfg: batch.settings)
    monkeypatch.setattr(rewards.readers, "readable", lambda lm: toys.params(lm.config))
    monkeypatch.setattr(rewards.inner, "adapt_chunk", adapt)
    monkeypatch.setattr(rewards.inner, "sound", lambda index: index % 2 == 0)
    monkeypatch.setattr(
        rewards, "answer", lambda lm, task, some, *_, **__: [[c and c.id] for c in some]
    )
    cfg = config.Config(inner=config.Inner(chunk=2))
    found = [x for x, _ in rewards.evaluate(lm, task, edits, jax.random.key(0), cfg)]
    assert [[x.at for x in part] for part in found] == [[3, 4], [2, 0], [1]]
    for one in itertools.chain(*found):
        n, first = epochs[one.at], 10.0 * one.at
        assert (one.grade.reward, one.steps) == (1.0, n)
        assert (one.first_loss, one.last_loss) == (first, first + n - 1)
        assert one.error == (None if one.at % 2 == 0 else "diverged at the last step")


def test_what_is_on_file_is_neither_written_nor_tested_again(tmp_path, monkeypatch):
    cfg = config.Config(sampling=config.Sampling(n=1, chunk=1))
    contexts = [Context(name) for name in "abc"]
    edits = [SelfEdit(context, 0, "text") for context in contexts]
    written, tested = [], []

    def write(lm, task, some, *args, **kwargs):
        written.extend(context.id for context in some)
        return [[writing.Written(edits[contexts.index(context)], 1, 0.0, True)] for context in some]

    def evaluate(*args, done, **kwargs):
        for at in range(3):
            if not done([at]):
                tested.append(at)
                outcome = rewards.Outcome(at, Grade(1.0, ()), [], 1, 1.0, 0.5, None)
                yield [outcome], rewards.Efficiency()

    monkeypatch.setattr(outer.readers, "ready", lambda lm, mesh: lm)
    monkeypatch.setattr(outer.sampling, "encode", lambda lm, prompt: [1])
    monkeypatch.setattr(outer.writing, "write", write)
    monkeypatch.setattr(outer.rewards, "evaluate", evaluate)
    task, key, metrics = toys.task(), jax.random.key(0), runs.Metrics(tmp_path)
    for again in (False, True):
        outer.write_edits(None, task, contexts, 1, tmp_path / "edits.jsonl", key, cfg)
        outer.test_edits(None, task, edits, 2, tmp_path / "rewards.jsonl", key, cfg, metrics)
        assert (written, tested) == ((["b"], [1]) if again else (["a", "b", "c"], [0, 1, 2] * 2))
        written.clear(), tested.clear()
        for name in ("edits", "rewards"):  # as after a kill
            rows = runs.records(tmp_path / f"{name}.jsonl")
            kept = [x for x in rows if x["context"] != "b" or x.get("seed") == 0]
            runs.write_lines(tmp_path / f"{name}.jsonl", kept)


def test_a_round_s_figures_are_of_self_edits_and_errors_over_contexts():
    """However many seeds: of three inner loops each, one self-edit fails and one diverges."""
    row = lambda index, **own: {"context": "a", "index": index, "error": None, "steps": 4} | own
    seeds = range(3)
    rows = [row(0) for _ in seeds]
    rows += [row(1, error="line 1: not JSON", steps=0) for _ in seeds]
    rows += [row(2, error=f"diverged at step {seed}") for seed in seeds]
    made = [scored("a", 0, 1.0), scored("a", 1, 0.5), scored("a", 2, 0.0), scored("b", 0, 0.5)]
    kept = [made[0], made[1], made[3]]
    found = experiment.summarise(made, kept, [0.0, 0.0], rows)
    assert found["not_applied"] == {"line N: not JSON": 1} and found["diverged"] == 1
    assert found["kept"] == 3
    assert found["reward_kept"] == stats.mean_se([0.75, 0.5]).record()


def test_self_edits_are_gathered_without_the_blanks_around_them(tiny):
    """As the reference's completions are, which it finetunes on."""
    _, task = tiny
    edits = [SelfEdit(task.contexts[0], 0, "\n One.\nTwo.\n\n")]
    assert [x.text for x in outer.gather(task, edits, [])] == ["One.\nTwo."]


def test_a_record_of_no_self_edit_here_is_named(tiny, tmp_path):
    lm, task = tiny
    context = task.contexts[0].id
    row = {"context": context, "index": 0, "seed": 0, "reward": 1.0}
    for own in ({"context": "other"}, {"index": 7}):
        runs.write_lines(tmp_path / "rewards.jsonl", [row, row | own])
        with pytest.raises(SealError, match="rewards.jsonl, line 2: self-edit . of context"):
            edits = [SelfEdit(task.contexts[0], 0, "text")]
            outer.test_edits(
                lm, task, edits, 1, tmp_path / "rewards.jsonl", None, config.Config(), None
            )
