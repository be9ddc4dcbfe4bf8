"""JAX on one CPU device without a network, and the smallest models that have every part."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # `import shared_data`, `import toys`

import jax  # noqa: E402
import pytest  # noqa: E402
import toys  # noqa: E402

jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="session", params=sorted(toys.FAMILIES))
def family(request) -> str:
    """Each supported architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def models() -> dict:
    """Random weights of each family, by name; norms and biases are random too."""
    return {name: toys.params(config) for name, config in toys.FAMILIES.items()}


@pytest.fixture(scope="session")
def params(models):
    """The smallest Qwen2: biases, grouped queries, an untied head."""
    return models["qwen2"]


@pytest.fixture(scope="session")
def adapter(params):
    """A rank-3 adapter of all seven projections that changes the model."""
    return toys.adapter(params.config)


@pytest.fixture(scope="module")
def quick_compile():
    """Less optimised programs: the numbers are the same to rounding, and tests mostly compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
