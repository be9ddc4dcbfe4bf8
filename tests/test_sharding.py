"""One mesh: rules for every weight; the same results on 1 and on 8 devices; no silent transfers."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toys
from jax.sharding import AbstractMesh, AxisType

from seal_jax import config, sharding
from seal_jax import params as params_lib
from seal_jax.errors import SealError

WORKER = Path(__file__).parent / "workers" / "mesh.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the loops came to, by mesh and name."""
    out = tmp_path_factory.mktemp("mesh") / "out.npz"
    done = subprocess.run([sys.executable, str(WORKER), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(out))


@pytest.mark.parametrize("mesh", ["8x1", "4x2"])
def test_the_loops_come_to_the_same_on_one_device_and_on_a_mesh(found, mesh):
    names = [name.split("/")[1] for name in found if name.startswith(mesh)]
    assert {"losses", "a_q", "b_down", "greedy", "drawn"} <= set(names)
    assert any(name.startswith(("full_q", "lora_q")) for name in names)
    for name in names:
        one, many = found[f"1x1/{name}"], found[f"{mesh}/{name}"]
        if one.dtype.kind == "i":
            np.testing.assert_array_equal(many, one, err_msg=name)
        else:  # sums in another order, through several steps of Adam
            np.testing.assert_allclose(many, one, rtol=2e-4, atol=2e-5, err_msg=name)
