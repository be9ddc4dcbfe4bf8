"""One mesh: rules for every weight; the same results on 1 and on 8 devices; no silent transfers."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toys
from jax.sharding import AbstractMesh, AxisType

from seal_jax import config, inner, lanes, sampling, sharding
from seal_jax import params as params_lib
from seal_jax import slots as slots_lib
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError

WORKER = Path(__file__).parent / "workers" / "mesh.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the loops came to, by mesh and name."""
    out = tmp_path_factory.mktemp("mesh") / "out.npz"
    done = subprocess.run([sys.executable, str(WORKER), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(out))


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x1"])
def test_the_loops_come_to_the_same_on_one_device_and_on_a_mesh(found, mesh):
    names = [name.split("/")[1] for name in found if name.startswith(mesh)]
    assert {"losses", "a_q", "b_down", "greedy", "drawn"} <= set(names)
    assert mesh == "2x1" or any(name.startswith(("full_q", "lora_q")) for name in names)
    for name in names:
        one, many = found[f"1x1/{name}"], found[f"{mesh}/{name}"]
        if one.dtype.kind == "i":
            np.testing.assert_array_equal(many, one, err_msg=name)
        else:  # sums in another order, through several steps of Adam
            np.testing.assert_allclose(many, one, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("layout", ["fsdp", "tensor", "replicated"])
@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("name", sorted(toys.FAMILIES))
def test_every_weight_is_split_where_its_size_divides_and_heads_stay_whole(
    name, data, model, layout
):
    architecture = toys.config(name, d_ff=32, vocab_size=40)
    mesh = AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sizes = {"data": data, "model": model}
    for weight, row in params_lib.table(architecture).items():
        spec = sharding.spec(row.dims, architecture, mesh, layout)
        assert len(spec) == len(row.dims)
        for letter, axes in zip(row.dims, spec, strict=True):
            axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
            parts = int(np.prod([sizes[axis] for axis in axes]))
            heads = {"nh": architecture.n_heads, "kh": architecture.n_kv_heads}
            size = {"d": 16, "f": 32, "v": 40, "l": 2, "h": architecture.d_head} | heads
            assert size[letter] % parts == 0, (weight, letter)
            if letter == "f" and model > 1:
                assert "model" in axes
            if letter == "d" and len(row.dims) - ("l" in row.dims) == 2:
                assert ("data" in axes) == (layout == "fsdp"), weight
            if letter == "l":
                assert not axes


def test_a_mesh_that_does_not_make_up_the_devices_is_refused_with_the_keys():
    with pytest.raises(SealError, match=r"mesh\.data=3, mesh\.model=1: do not make up 8 devices"):
        sharding.make(config.Mesh(data=3), [None] * 8)
    with pytest.raises(SealError, match="do not make up 8 devices"):
        sharding.make(config.Mesh(model=3), [None] * 8)


def test_on_one_device_there_is_no_mesh_and_nothing_is_constrained(params):
    assert sharding.of(params) is None
    assert sharding.current() is None
    q = np.ones((1, 3, 4, 2), np.float32)
    run = lambda q: sharding.constrain(
        sharding.per_device(lambda q, k, v: q + k, q, q, q), "btnh", params.config
    )
    assert "shard" not in str(jax.make_jaxpr(run)(q))


@pytest.mark.parametrize("arrange", [slots_lib.arrange, lanes.arrange])
def test_the_loops_are_sent_what_the_code_names_and_fetch_nothing_inside(params, arrange):
    settings = config.Inner(learning_rate=0.1, epochs=2)
    batch = toys.batch([toys.text(6, i) for i in range(3)], settings)
    key = jax.random.key(0)
    chunk = next(iter(arrange(batch, 3, key)))
    lora = config.Lora(rank=2, alpha=2.0, targets=("q",))
    lm = LM(params, None, params.config)
    prompts, ids = [[[5, 6, 7]]] * 3, [[1], [2], [3]]

    def loops():
        adapters, losses = inner.adapt_chunk(params, batch, chunk, key, lora)
        some = {"max_tokens": 3, "temperature": 1.0, "key": key, "ids": ids}
        return losses, sampling.decode(lm, prompts, adapters, **some)

    loops()  # compiles; constants of a program are moved while it is built
    with jax.transfer_guard("disallow"):  # only transfers that the code names
        losses, _ = loops()
    # What the guard refuses here it would have refused there.
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"),
        jax.transfer_guard("disallow"),
    ):
        losses + np.float32(1)
