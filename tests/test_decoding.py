"""The nucleus, against a sort of the vocabulary; the most likely token, against numpy's."""

import jax
import numpy as np
import pytest

from seal_jax import decoding


def by_sort(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Returns which of the logits [v] are in the nucleus."""
    chances = np.exp(logits.astype(np.float64) - logits.max())
    chances /= chances.sum()
    ordered = np.sort(chances)[::-1]
    last = ordered[np.searchsorted(np.cumsum(ordered), top_p)]
    return chances >= last * (1 - 1e-9)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_the_nucleus_is_the_smallest_set_of_likely_tokens_with_the_mass(top_p, spread):
    draw = np.random.default_rng(0)
    logits = (draw.normal(size=(6, 3000)) * spread).astype(np.float32)
    logits[1, 100:] = -np.inf  # a grammar's mask
    logits[2] = np.round(logits[2])  # many tokens as likely as each other
    logits[3] += 1e4
    kept = jax.jit(decoding.keep_top_p)(logits, top_p)
    np.testing.assert_array_equal(np.isfinite(kept), [by_sort(row, top_p) for row in logits])
    np.testing.assert_array_equal(
        np.where(np.isfinite(kept), kept, 0), np.where(kept > -np.inf, logits, 0)
    )


def test_all_tokens_of_equal_chance_stay():
    assert np.all(np.isfinite(decoding.keep_top_p(np.zeros((2, 7), np.float32), 0.3)))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_most_likely_token_is_the_first_of_the_largest_in_any_part(parts):
    values = np.random.default_rng(0).integers(0, 9, (50, 7)).astype(np.float32)  # many ties
    found = decoding.first_largest(values, parts)
    np.testing.assert_array_equal(found, np.argmax(values, axis=-1))
