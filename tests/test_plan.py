"""Laws of plans: what the TPU compiler says of the real programs, and what is made of it."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
import toys

from seal_jax import __main__ as main
from seal_jax import (
    architecture,
    checkpoint,
    config,
    costs,
    hardware,
    lora,
    plan,
    plan_search,
    plan_text,
    readers,
    sharding,
)
from seal_jax import params as params_lib
from seal_jax.errors import SealError
from seal_jax.hardware import GIB
from seal_jax.plan_search import Fit

ROOT = Path(__file__).parents[1]
SEVEN = ROOT / "configs" / "squad_qwen2p5_7b.yaml"
HEAD_ROOM = 0.9


@pytest.fixture(scope="module")
def facts() -> dict:
    """What the compiler says of Qwen2.5-7B, rank 32 on all seven projections, for a v5e-8."""
    pytest.importorskip("libtpu")
    env = os.environ | plan.ENVIRONMENT | {"JAX_OPTIMIZATION_LEVEL": "O1", "SEAL_JAX_CACHE": ""}
    command = [sys.executable, str(ROOT / "tests" / "workers" / "aot.py"), str(SEVEN)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def shapes_moved(line: str) -> list[list[int]]:
    """Returns the shapes a collective moves between devices; none if each is alone in its group."""
    if re.search(r"replica_groups=\{(\{\d+\},?)+\}", line):
        return []
    result = re.split(r" (?:all|collective|reduce)-[a-z-]+\(", line.split("= ", 1)[1])[0]
    return [
        [int(x) for x in dims.split(",")] for dims in re.findall(r"[a-z]\w*\[([\d,]+)\]", result)
    ]


def test_a_7b_model_on_a_v5e_8(facts):
    """One test, since the programs compile for minutes: test runners split a module's tests."""
    allowed = HEAD_ROOM * facts["allowed"]
    # 24 candidates fit with head-room; states were donated, so nothing else comes out.
    fit = facts["inner 24"]
    assert fit["fits"] and fit["bytes"] < allowed
    assert fit["kinds"]["outputs"] < GIB / 100
    # 32 are refused for want of head-room, 80 by the compiler, which says what they need.
    assert facts["inner 32"]["fits"] is False and facts["inner 32"]["bytes"] > allowed
    assert "does NOT fit (inner loops)" in facts["verdict 32"]
    assert facts["inner 80"]["kinds"] is None and facts["inner 80"]["bytes"] > facts["allowed"]
    # The kernel is in the program (forward, and gradients of q and of k and v), no float64, and
    # nothing goes to the host.
    assert facts["kernels"] >= 3 and not facts["float64"] and not facts["transfers"]
    # Collectives gather frozen weights, and none moves an adapter.
    moved = [shape for line in facts["collectives"] for shape in shapes_moved(line)]
    assert any(3584 in shape or 448 in shape for shape in moved)
    assert not [shape for shape in moved if facts["rank"] in shape]
    # Generation fits beside the weights that training keeps.
    resident = 2 * costs.matrix_numbers(architecture.find("Qwen/Qwen2.5-7B")) / facts["devices"]
    assert facts["layout"] == "tensor"
    assert facts["answer 32"]["peak"] + resident < allowed
    # While it runs no weight moves: the head of 152,064 words was gathered for every token.
    moved = [shape for line in facts["answer collectives"] for shape in shapes_moved(line)]
    assert moved and not [shape for shape in moved if {3584, 152064} <= set(shape)]


def test_one_chip_is_planned_by_the_calls_that_it_runs():
    """Packed calls: their states are arguments changed in place, and not copied beside."""
    pytest.importorskip("libtpu")
    small = config.load_config(ROOT / "configs" / "squad_qwen2p5_0p5b_v5e1.yaml")
    made = plan.make(plan.Request(small, "v5e-1", candidates=64, stages=("inner", "write")))
    fit, held = made["stages"]["inner"], made["held"]
    states = 64 * 3 * held["one adapter"]
    done = 250 * held["one adapter"]  # of all self-edits: fewer than four chunks' worth
    assert fit["fits"] and fit["count"] == 64
    assert fit["kinds"]["arguments"] == pytest.approx(held["weights"] + states + done, rel=0.05)
    assert fit["kinds"]["outputs"] < GIB / 100
    assert fit["kinds"]["temporaries"] < 2 * GIB + states
    # The cache of 250 self-edits is there once: it was three times, as it is written and as read.
    write = made["stages"]["write"]
    cache = costs.cache_bytes(architecture.find("Qwen/Qwen2.5-0.5B")) * 250 * 1024
    assert write["count"] == 250 and write["kinds"]["temporaries"] < 2 * cache


def test_an_adapter_that_moves_would_be_seen():
    line = (
        "%all-gather.1 = f32[40,28,3584,32]{3,2,1,0} all-gather(%x), channel_id=1, "
        "replica_groups=[1,8]<=[8], dimensions={0}"
    )
    assert shapes_moved(line) == [[40, 28, 3584, 32]]
    pair = "%c = (f32[5,3584,32], u32[]{:S(2)}) collective-permute-start(%x), channel_id=1"
    assert [5, 3584, 32] in shapes_moved(pair)
    alone = line.replace("replica_groups=[1,8]<=[8]", "replica_groups={{0},{1},{2}}")
    assert shapes_moved(alone) == []


@pytest.mark.parametrize(("fixed", "each", "most"), [(3.0, 0.2, 250), (9.9, 0.31, 64), (1, 1, 8)])
def test_the_search_finds_the_largest_that_fits_in_few_tries(fixed, each, most):
    limit, tried = 14 * GIB, []

    def at(count: int) -> Fit:
        tried.append(count)
        needed = (fixed + each * count) * GIB * (1 + 0.02 * (count % 3))  # nearly affine
        refused = needed > 1.1 * limit
        return Fit(count, None if refused else int(needed), None, needed <= limit)

    units = range(8, most + 1, 8)
    best = max((c for c in units if at(c).fits), default=0)
    for first in (0, 8, 64, 10_000):
        tried.clear()
        assert plan_search.search(at, limit, 8, most, first).count == best
        assert len(tried) <= 7 and all(c % 8 == 0 and 0 < c <= most for c in tried)


def test_where_nothing_fits_the_search_says_what_one_would_need():
    at = lambda count: Fit(count, 99 * GIB, None, False)
    found = plan_search.search(at, 14 * GIB, 8, 64, 64)
    assert (found.count, found.bytes, found.fits) == (0, 99 * GIB, False)


def test_the_public_architectures_have_as_many_weights_as_their_names_say():
    # Published parameter counts, in thousands.
    published = {
        "Qwen/Qwen2.5-0.5B": 494_033,
        "Qwen/Qwen2.5-1.5B": 1_543_714,
        "Qwen/Qwen2.5-3B": 3_085_939,
        "Qwen/Qwen2.5-7B": 7_615_617,
        "meta-llama/Llama-3.2-1B": 1_235_814,
        "meta-llama/Llama-3.2-3B": 3_212_750,
    }
    assert set(published) == set(architecture.PUBLIC)
    for name, count in published.items():
        shapes = params_lib.shapes(architecture.find(f"{name}-Instruct"))
        sizes = [shapes.embed.size, shapes.norm.size, *(x.size for x in shapes.layers.values())]
        sizes.append(0 if shapes.head is None else shapes.head.size)
        assert round(sum(sizes) / 1000) == count, name


def test_training_costs_six_operations_a_weight_and_token_and_little_more():
    model = architecture.PUBLIC["Qwen/Qwen2.5-7B"]
    settings = config.Lora()
    numbers = costs.matrix_numbers(model)
    assert costs.adapter_numbers(model, settings) == sum(
        x.size
        for part in (lora.shapes(model, settings).a, lora.shapes(model, settings).b)
        for x in part.values()
    )
    per_token = costs.train_flops(model, settings, 100) / 100
    assert 6 * numbers < per_token < 6.2 * numbers
    # Attention grows with the square of the length.
    extra = lambda t: costs.train_flops(model, settings, t) - t * (6 * numbers)
    assert extra(4000) > 4 * extra(1000)


def test_the_floors_of_a_round_are_those_worked_out_by_hand():
    """Of the toy model: 5,392 numbers in matrices, 160 in an adapter, 96 bytes of cache a token."""
    model, adapter = toys.config("qwen2"), config.Lora(rank=2, targets=("q",))
    cfg = config.Config(
        lora=adapter,
        inner=config.Inner(epochs=2, batch_size=3),
        sampling=config.Sampling(n=3),
        outer=config.Outer(
            contexts=2, seeds=2, keep=1, sft=config.Sft(lora=adapter, epochs=2, batch_size=10)
        ),
    )
    chip = hardware.Chip(flops=1e9, memory=1e6, links=1e5)
    work = costs.Workload(lines=3, line=10, passage=20, prompt=30, written=12)
    work = work._replace(questions=2, question=8, answer=4)
    train = lambda *lengths: sum(costs.train_flops(model, adapter, t) for t in lengths)
    attention = lambda t: 2 * t * t * 2 * 4 * 6
    # Two passes forward and one back, and an adapter's own gradient.
    assert train(10) == 10 * (3 * 2 * 5392 + 4 * 2 * 160) + 4 * attention(10)
    split = types.SimpleNamespace(size=4, shape={sharding.DATA: 2, sharding.MODEL: 2})
    # 12 loops, 5 at a time: 3 times 2 epochs of 2 steps. Weights are read three times a step, half
    # of them from the other half of the devices; of each state seven numbers.
    flops = 12 * 2 * train(20, 10, 10, 10)
    found = costs.inner_loops(model, cfg, chip, split, 5, work)
    read, state = 3 * 2 * 5392 / 2, 7 * 4 * 160 * 5 / 2
    expected = (flops, flops / 4e9, 12 * (read + state) / 1e6, 12 * read / 2 / 1e5)
    assert found == pytest.approx(expected) and found.seconds == found.links
    # Two self-edits of 42 tokens with their prompts, twice, in one batch.
    flops = 2 * 2 * train(42)
    found = costs.finetuning(model, cfg, chip, split, work)
    assert found == pytest.approx((flops, flops / 4e9, 2 * read / 1e6, 2 * read / 2 / 1e5))
    # 6 self-edits, 4 at once, and 24 answers, 10 at once: a token of all reads weights and caches.
    mesh = sharding.make(config.Mesh(), jax.devices()[:1])
    made = costs.round_of(model, cfg, chip, mesh, "tensor", chunk=5, writers=4, work=work)
    assert list(made) == ["write self-edits", "inner loops", "answer", "finetune"]
    weights = 2 * sum(x.size for x in jax.tree.leaves(params_lib.shapes(model)))
    flops = 2 * 5392 * (2 * 30 + 6 * 12) + 2 * attention(30)
    seconds = 2 * 12 * (weights + 96 * (30 + 6) * 4) / 1e6
    assert made["write self-edits"] == pytest.approx((flops, flops / 1e9, seconds, 0.0))
    flops = 2 * 5392 * 24 * (8 + 4) + 24 * attention(8)
    seconds = 3 * 4 * (weights + 96 * (8 + 2) * 10) / 1e6
    assert made["answer"] == pytest.approx((flops, flops / 1e9, seconds, 0.0))


def test_no_more_is_assumed_than_the_settings_allow():
    short = config.load_config(None, ["sampling.max_tokens=128", "answers.max_tokens=8"])
    usual, work = costs.workload(config.load_config(SEVEN)), costs.workload(short)
    assert usual == costs.Workload()
    assert (work.written, work.answer) == (128, 8)


def test_weights_are_planned_of_the_type_that_the_settings_name():
    for dtype, size in (("auto", 4), ("float32", 4), ("bfloat16", 2)):
        cfg = config.load_config(None, [f"model.dtype={dtype}"])
        made = plan.compile_all(plan.Request(cfg, stages=()), print)
        lm = checkpoint.load_model(cfg.model)
        assert made["held"]["weights"] == sum(x.nbytes for x in jax.tree.leaves(lm.params))
        assert lm.params.embed.dtype.itemsize == size
        # And beside them what is read of few layers.
        reader = readers.ready(lm, cfg.mesh).reader
        copy = sum(x.nbytes for x in jax.tree.leaves(reader))
        assert made["held"]["weights laid out for generation"] == copy > 0


def test_a_gpu_takes_a_copy_of_many_layers_where_two_leave_half_free():
    """7B on 80 GB: what is planned for candidates is not what that copy takes."""
    seven = architecture.find("Qwen/Qwen2.5-7B")
    gpu, tpu = (types.SimpleNamespace(platform=name) for name in ("gpu", "tpu"))
    assert readers.takes_a_copy(seven, 15 * GIB, gpu, 80 * GIB)
    assert not readers.takes_a_copy(seven, 15 * GIB, gpu, 48 * GIB)
    assert not readers.takes_a_copy(seven, 15 * GIB, gpu, None)
    assert not readers.takes_a_copy(seven, 15 * GIB, tpu, 80 * GIB)


def test_the_architecture_is_that_of_the_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "find", lambda *args, **kwargs: asked.append(args) or None)
    monkeypatch.setattr(architecture, "read_config", lambda folder: 1 / 0)
    cfg = config.load_config(None, ["model.path=some/model", "model.revision=v2"])
    with pytest.raises(ZeroDivisionError):
        plan.compile_all(plan.Request(cfg, stages=()), print)
    assert asked == [("some/model", "v2")]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v9:2x2", "not known; --topology list"),
        ("v5litepod-8", "not known; --topology list"),
        ("v5e:2xa", "not known; --topology list"),
        ("v5p:2x2", "laid out in 3 dimensions, such as v5p:2x2x1"),
    ],
)
def test_an_unknown_topology_is_one_sentence(name, sentence, capsys):
    assert main.main(["plan", str(SEVEN), "--topology", name]) == 2
    said = capsys.readouterr().err
    assert sentence in said and name in said and said.count("\n") == 1


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SealError, match=r"libtpu: pip install 'seal_jax\[tpu\]'"):
        plan.make(plan.Request(config.Config(), "v5e-8"))


def test_every_named_slice_is_listed_and_known(capsys):
    assert main.main(["plan", "--topology", "list"]) == 0
    said = capsys.readouterr().out
    for name in hardware.NAMES:
        assert name in said
        kind = hardware.slice_of(name).kind
        assert kind in hardware.MEMORY and kind in said
    assert {hardware.slice_of(name).kind for name in hardware.NAMES} == set(hardware.CHIPS)


def test_a_gpu_is_known_by_a_whole_word_of_its_name():
    for kind, name in {
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA L4": "L4",
        "Tesla T4": "T4",
    }.items():
        assert hardware.gpu(kind) == hardware.GPUS[name]
    for kind in ("NVIDIA L40S", "NVIDIA T400", "NVIDIA GH200 480GB", "cpu"):
        assert hardware.gpu(kind) is None


def test_a_plan_for_this_machine_reads_as_text(tmp_path, capsys):
    file = tmp_path / "plans" / "tiny.json"
    overrides = ["sampling.max_tokens=16", "inner.chunk=2", "sampling.chunk=5"]
    command = ["plan", str(ROOT / "configs" / "tiny_world.yaml"), *overrides]
    status = main.main([*command, "--tokens", "32", "--json", str(file)])
    made = json.loads(file.read_text())
    assert status == 0 and made["fits"] and made["stages"]["inner"]["count"] == 2
    assert all(fit["bytes"] > 0 for fit in made["stages"].values())
    said = capsys.readouterr().out
    assert "fits" in said and "inner loops" in said and "hours" not in made
    made["fits"] = made["stages"]["inner"]["fits"] = False
    assert "does NOT fit (inner loops)" in plan_text.verdict(made)
