"""The chunk is the largest that fits: given what counts need, and by the compiler's own word."""

import types

import jax
import toys
from jax.sharding import AbstractMesh, AxisType

from seal_jax import chunks, config, inner, lanes, programs, sharding
from seal_jax.batching import Batch

CONFIG = toys.config("qwen2", n_layers=2)
LORA = config.Lora(rank=8, alpha=8.0, targets=config.ALL_TARGETS)
CFG = config.Config(lora=LORA)


def batch(candidates=40, **settings):
    written = [";".join(toys.text(9, (i, j)) for j in range(1 + i % 3)) for i in range(candidates)]
    return toys.batch(written, config.Inner(epochs=1, **settings))


def counts_of(bytes_of, limit):
    tried = []

    def seen(count):
        tried.append(count)
        return bytes_of(count)

    return chunks.largest(seen, limit, (1, 2, 4, 8, 16, 32, 64)), tried


def test_memory_that_grows_evenly_takes_three_programs():
    assert counts_of(lambda n: 100 + 10 * n, 500) == (32, [2, 4, 32])
    assert counts_of(lambda n: 100 + 10 * n, 10_000) == (64, [2, 4, 64])


def test_a_count_that_does_not_fit_after_all_gives_way_to_a_smaller_one():
    assert counts_of(lambda n: None if n > 8 else 10 * n, 500)[0] == 8
    assert counts_of(lambda n: 10 * n + (1000 if n > 16 else 0), 500)[0] == 16
    assert counts_of(lambda n: 100 + 10 * n, 125)[0] == 2
    assert counts_of(lambda n: None, 500)[0] == 1  # nothing smaller to try
    assert chunks.largest(lambda n: 10, 500, (1,)) == 1


def test_of_calls_that_grow_until_they_are_full_the_largest_that_fits_is_found():
    counts = chunks._COUNTS

    def needed(count):  # as of 0.5B: 285 a candidate until the call is full, then 130
        return 5000 + 285 * min(count, 48) + 130 * max(count - 48, 0)

    for limit in (*range(4000, 50_000, 700), 5285):
        tried = []
        own = lambda count: tried.append(count) or needed(count)  # noqa: B023
        best = max((x for x in counts if needed(x) <= limit), default=0)
        for each in (1, 130, 1000):
            tried.clear()
            assert chunks.most(own, each, limit, counts) == best
            assert len(tried) == len(set(tried)) <= 7
    assert chunks.most(lambda count: None if count > 6 else 1, 1, 10, counts) == 6
    assert chunks.most(lambda count: 10, 1, 10, (4,)) == 4


def test_more_memory_takes_larger_chunks_up_to_all_candidates():
    weights = toys.params(CONFIG)
    made = batch()

    def chosen(limit):
        return chunks.choose(weights, made, CFG, limit).chunk

    most = chosen(1 << 40)
    assert most == 48  # all 40, in one of the few counts
    small = chosen(1)
    assert small == 1
    found = [chosen(x) for x in (10**6, 2 * 10**6, 4 * 10**6, 8 * 10**6)]
    assert found == sorted(found) and len(set(found)) > 2


def test_room_is_what_others_leave_of_a_device_but_for_a_tenth():
    def room(**stats):
        device = types.SimpleNamespace(memory_stats=lambda: stats)
        shard = types.SimpleNamespace(device=device, data=types.SimpleNamespace(nbytes=100))
        embed = types.SimpleNamespace(addressable_shards=[shard])
        return chunks.room(types.SimpleNamespace(embed=embed, addressable_shards=[shard]))

    assert room() is None
    assert room(bytes_limit=1000) == room(bytes_limit=1000, bytes_in_use=100) == 900  # weights
    assert room(bytes_limit=1000, bytes_in_use=350) == 650


def test_in_lockstep_a_call_has_room_for_every_step(monkeypatch):
    monkeypatch.setattr(sharding, "splits_adapters", lambda mesh: True)
    mesh = sharding.make(config.Mesh(), jax.devices()[:1])
    written = [toys.text(5, 0), ";".join([toys.text(9, 1), toys.text(30, 2), toys.text(4, 3)])]
    for batch_size, rows, t in ((1, 1, 31), (2, 2, 31), (0, 1, 46)):  # 0: all in one row
        own = chunks._call(toys.batch(written, config.Inner(batch_size=batch_size)), mesh, 4)
        assert (own.residents, own.width, own.size.rows) == (4, 1, rows)
        assert t <= own.size.t < 1.5 * t


def test_on_a_mesh_every_device_has_as_many_candidates(monkeypatch):
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weights, made = toys.params(CONFIG), batch()
    needed = lambda weights, lora, own, call: 100 + 10 * call.residents
    monkeypatch.setattr(sharding, "of", lambda params: mesh)
    monkeypatch.setattr(chunks, "_bytes", needed)
    for limit, chunk in ((10_000, 48), (579, 32), (300, 16), (299, 16), (1, 4)):
        assert chunks.choose(weights, made, CFG, limit).chunk == chunk
    assert chunks.choose(weights, batch(chunk=7), CFG, 10_000).chunk == 7


def test_on_a_mesh_the_compiler_is_asked_about_weights_of_their_own_type(monkeypatch):
    mesh = sharding.make(config.Mesh(), jax.devices()[:1])
    asked = []

    def compiled(params, *rest, **static):
        asked.append(params.embed.dtype)
        raise programs.TooBig(None)

    monkeypatch.setattr(programs, "lanes_memory", compiled)
    for dtype in ("float32", "bfloat16"):
        own = chunks._Weights(CONFIG, dtype, mesh, False)
        chunks._bytes(own, LORA, config.Inner(), lanes.largest_call(batch(4), 2))
    assert asked == ["float32", "bfloat16"]


def test_activations_are_kept_where_they_leave_room_for_half_as_many(monkeypatch):
    monkeypatch.setattr(inner, "recompute", lambda settings: settings.remat in ("auto", "layers"))
    weights, made = toys.params(CONFIG), batch()
    base = {"auto": 100, "layers": 100, "none": 400}
    needed = lambda weights, lora, own, call: base[own.remat] + 10 * call.residents
    monkeypatch.setattr(chunks, "_bytes", needed)

    def chosen(limit, made=made):
        found = chunks.choose(weights, made, CFG, limit)
        return found.chunk, found.remat

    assert chosen(2000) == (48, "none")  # both fit
    assert chosen(600) == (48, "auto")  # kept, they would leave room for 16 of 48
    assert chosen(640) == (24, "none")
    assert chosen(2000, batch(remat="layers")) == (48, "layers")  # the user's word


def test_beside_the_users_chunk_activations_are_kept_where_they_fit(monkeypatch):
    monkeypatch.setattr(inner, "recompute", lambda settings: settings.remat in ("auto", "layers"))
    weights = toys.params(CONFIG)

    def chosen(limit, **settings):
        found = chunks.choose(weights, batch(chunk=3, **settings), CFG, limit)
        return found.chunk, found.remat

    assert chosen(1 << 40) == (3, "none")
    assert chosen(1) == (3, "auto")
    assert chosen(1 << 40, remat="layers") == (3, "layers")


def test_the_users_chunk_stays_and_a_cpu_takes_few():
    weights = toys.params(CONFIG)
    assert chunks.choose(weights, batch(chunk=7), CFG, 1 << 40).chunk == 7
    assert chunks.room(weights) is None  # a CPU does not say
    assert chunks.choose(weights, batch(), CFG).chunk == 0
    nothing = Batch((), batch().settings, 0)
    assert chunks.choose(weights, nothing, CFG, 1 << 40).chunk == 0
