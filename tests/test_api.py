"""Public functions as a notebook calls them: what was meant, or a sentence that says why not."""

import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import toys

import seal_jax as seal
from seal_jax import batching, config, inner, outer, rewards
from seal_jax.errors import SealError
from seal_jax.tasks import Context, Edit, Example, Grade

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[1]
SMALL = ["inner.epochs=2", "sampling.max_tokens=16", "answers.max_tokens=2"]


@pytest.fixture(scope="module")
def tiny():
    """A model, its task, settings, and two adapters."""
    cfg = seal.load_config(ROOT / "configs" / "tiny_world.yaml", SMALL)
    lm, task = seal.load_model(cfg.model), seal.load_task(cfg.task)
    edits = [batching.SelfEdit(task.contexts[0], i, text) for i, text in enumerate(["a.", "b."])]
    batch = seal.pack(task, edits, lm.tokenizer, cfg.inner)
    adapters, _ = seal.adapt_many(lm.params, batch, jax.random.key(0), cfg)
    return lm, task, cfg, adapters


def test_a_single_adapter_is_scored_on_every_context(tiny):
    """As `load_peft` and `lora.take` return it; its layers are not candidates."""
    lm, task, cfg, adapters = tiny
    contexts = task.contexts[:3]  # as many as the model has layers
    one = seal.score(lm, seal.lora.take(adapters, 1), task, contexts, cfg)
    each = seal.score(lm, seal.lora.take(adapters, [1, 1, 1]), task, contexts, cfg)
    assert one.answers == each.answers and one.reward.shape == (3,)
    tokens = [len(lm.tokenizer(answer)["input_ids"]) for own in one.answers for answer in own]
    assert max(tokens) == cfg.answers.max_tokens  # where some answers are cut
    alone = seal.score(lm, seal.lora.take(adapters, 1), task, contexts[:1], cfg)
    assert alone.answers == one.answers[:1]


def test_one_self_edit_is_packed_as_a_list_of_one(tiny):
    lm, task, cfg, _ = tiny
    edit = batching.SelfEdit(task.contexts[0], 0, "text")
    packed = [seal.pack(task, x, lm.tokenizer, cfg.inner) for x in (edit, [edit], [[edit]])]
    chex.assert_trees_all_equal(*(x.candidates for x in packed))


def test_what_cannot_be_done_is_said(tiny):
    lm, task, cfg, adapters = tiny
    key = jax.random.key(0)
    single = seal.lora.take(adapters, 0)
    edit, nothing = batching.SelfEdit(task.contexts[0], 0, "text"), Grade(np.nan, ())
    calls = {
        "no self-edits were given": lambda: seal.adapt_many(
            lm.params, seal.pack(task, [], lm.tokenizer, cfg.inner), key, cfg
        ),
        "not one text": lambda: seal.generate(lm, "Hello"),
        r"begins with <\|im_start\|>, a token that this model does not have": lambda: seal.generate(
            lm, [seal.tasks.squad.answer_prompt("T", "Q?", chat=True)]
        ),
        "temperature=nan": lambda: seal.generate(lm, ["a"], temperature=np.nan, key=key),
        "top_p=1.5": lambda: seal.generate(lm, ["a"], temperature=1.0, top_p=1.5, key=key),
        "samples=0": lambda: seal.sample_edits(lm, task, task.contexts[:1], 0, key=key, cfg=cfg),
        "edit returned list, no Edit": lambda: seal.pack(
            task._replace(edit=lambda context, text: [text]), edit, lm.tokenizer, cfg.inner
        ),
        r"grade returned 0.5 for .*: expected a Grade": lambda: seal.score(
            lm, None, task._replace(grade=lambda context, answers: 0.5), task.contexts[:1], cfg
        ),
        r"grade returned Grade\(reward=nan": lambda: seal.score(
            lm, None, task._replace(grade=lambda *_: nothing), task.contexts[:1], cfg
        ),
        "some adapters are stacked": lambda: seal.concat([adapters, single]),
        "there are 2 adapters, not one at 2": lambda: seal.lora.take(adapters, 2),
        "no such folder": lambda: seal.load_peft("nosuch", cfg),
    }
    for words, call in calls.items():
        with pytest.raises(SealError, match=words):
            call()


@pytest.mark.parametrize("reward", [-0.1, 1.1, np.nan])
def test_a_reward_is_from_0_to_1(reward):
    task = toys.task()._replace(grade=lambda *_: Grade(reward, ()))
    with pytest.raises(SealError, match="a Grade whose reward is from 0 to 1"):
        rewards.grade(task, [(Context("a"), [])], config.Config())


def test_each_context_is_scored_by_adapters_of_its_own(monkeypatch):
    """As `adapt_many` returns them: all of a context's adapters, then the next one's."""
    monkeypatch.setattr(rewards, "answer", lambda *_: [["a"], ["a"], ["b"], ["b"], ["c"], ["c"]])
    own = lambda context, answers: Grade(float(answers == [context.id]), ())
    many = seal.lora.stack([toys.adapter(toys.config("qwen2"))] * 6)
    contexts = [Context(name) for name in "abc"]
    found = seal.score(None, many, toys.task()._replace(grade=own), contexts, config.Config())
    assert found.reward.tolist() == [1.0] * 6


def test_token_ids_that_the_model_does_not_know_are_refused():
    """JAX would take the last row of the embedding in their place."""
    settings = toys.config("qwen2")
    params = toys.params(settings)
    lm = seal.LM(params, toys.Numbers(), settings)
    with pytest.raises(SealError, match="makes token 37, the model knows 37"):
        seal.generate(lm, ["5 37 6"])
    batch = toys.batch(["5 6", "7 40"])
    with pytest.raises(SealError, match="makes token 40, the model knows 37"):
        inner.adapt_many(params, batch, jax.random.key(0), config.Config())
    with pytest.raises(SealError, match="makes token 41, the model knows 37"):
        outer.finetune(lm, [("5 6", "7 41")], config.Sft(), jax.random.key(0))


@pytest.mark.parametrize(
    ("epochs", "rate", "error"),
    [
        (2.0, None, None),  # as JSON gives it
        (2.5, None, "asks for 2.5 epochs"),
        (-1, None, "asks for -1 epochs"),
        (1, float("nan"), "at a learning rate of nan"),
        (1, -0.1, "at a learning rate of -0.1"),
    ],
)
def test_directives_of_a_task_of_your_own_are_checked(epochs, rate, error):
    edit = Edit((Example("5 6"),), learning_rate=rate, epochs=epochs)
    made = batching.candidate(edit, 0, toys.Numbers(), toys.EOS, config.Inner())
    assert (error or "") in (made.error or "") and bool(made.texts) == (error is None)
    assert isinstance(made.epochs, int)


def test_folders_here_and_at_home_are_written_and_found(tiny, tmp_path, monkeypatch):
    lm, _, cfg, adapters = tiny
    monkeypatch.setenv("HOME", str(tmp_path))
    one = seal.lora.take(adapters, 0)
    seal.save_peft(one, "~/adapter", cfg)
    chex.assert_trees_all_equal(seal.load_peft("~/adapter", lm.config), one)
    seal.save_hf(lm, "~/model")
    chex.assert_trees_all_equal(seal.load_model("~/model").params, lm.params)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    seal.save_peft(one, ".", lm.config)  # the architecture will do
    chex.assert_trees_all_equal(seal.load_peft(here, cfg), one)


def test_adapters_stay_float32_where_the_user_has_64_bits():
    code = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import toys; from seal_jax import config, inner\n"
        "params = toys.params(toys.config('qwen2'))\n"
        "cfg = config.Config(lora=config.Lora(rank=2), inner=config.Inner(epochs=1))\n"
        "adapters, _ = inner.adapt_many(params, toys.batch(['5 6']), jax.random.key(0), cfg)\n"
        "print({str(x.dtype) for x in jax.tree.leaves(adapters)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{'float32'}", done.stderr


def test_what_a_cell_of_a_notebook_ends_with_is_a_line(tiny):
    """Weights, or all tokens of a batch, would fill the page."""
    lm, task, cfg, _ = tiny
    edits = [batching.SelfEdit(task.contexts[0], i, text) for i, text in enumerate(["a.", "b."])]
    batch = seal.pack(task, edits, lm.tokenizer, cfg.inner)
    tokens = sum(len(text.tokens) for candidate in batch.candidates for text in candidate.texts)
    count = sum(x.size for x in jax.tree.leaves(lm.params))
    assert repr(lm) == f"LM({lm.source}: {count:,} parameters, float32)"
    assert repr(lm._replace(params=None)) == f"LM({lm.source}: 0 parameters, no weights)"
    assert repr(batch) == f"Batch(2 candidates: 4 texts of {tokens} tokens)"
