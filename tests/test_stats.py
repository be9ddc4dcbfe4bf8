"""Laws of the statistics behind the tables."""

import json
import math
import random

import numpy as np
import pytest

from seal_jax import stats


def test_mean_does_not_depend_on_the_order():
    values = [1e16, 1.0, -1e16, 0.1, 1 / 3] * 7
    shuffled = list(values)
    random.Random(0).shuffle(shuffled)
    assert stats.mean(values) == stats.mean(shuffled)
    assert stats.mean([0.1] * 10) == 0.1  # a running sum gives 0.09999999999999999


def test_standard_error_is_that_of_the_sample():
    rng = np.random.default_rng(1)
    values = rng.normal(size=50)
    found = stats.mean_se(values)
    assert found.n == 50
    np.testing.assert_allclose(found.mean, values.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.se, values.std(ddof=1) / math.sqrt(50), rtol=1e-12)


def test_one_value_has_no_error_and_none_has_no_mean():
    one = stats.mean_se([0.25])
    assert (one.mean, one.n) == (0.25, 1) and math.isnan(one.se)
    none = stats.mean_se([])
    assert none.n == 0 and math.isnan(none.mean) and math.isnan(none.se)


@pytest.mark.parametrize("values", [[], [0.5], [0.25, 0.5]])
def test_an_estimate_goes_through_json_whatever_it_lacks(values):
    made = stats.mean_se(values)
    record = json.loads(json.dumps(made.record(), allow_nan=False))
    assert record["n"] == len(values) and (record["se"] is None) == (len(values) < 2)
    back = stats.from_record(record)
    assert stats.text(back) == stats.text(made) and repr(back) == repr(made)


def test_paired_error_ignores_what_both_sides_share():
    rng = np.random.default_rng(2)
    base = rng.normal(scale=100, size=40)
    gain = rng.normal(loc=1, scale=0.1, size=40)
    found = stats.paired(base + gain, base)
    assert abs(found.mean - 1) < 0.1
    assert found.se < 0.05 < stats.mean_se(base).se


def test_paired_values_of_different_number_are_refused():
    with pytest.raises(ValueError, match="3 and 2"):
        stats.paired([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.4134, 0.0268, 80), ".413 (.027)"),
        ((1.0, 0.0, 80), "1.000 (.000)"),
        ((-0.0512, 0.01, 80), "-.051 (.010)"),
        ((-0.0001, 0.01, 80), ".000 (.010)"),
        ((10.25, 1.5, 4), "10.250 (1.500)"),
        ((0.5, math.nan, 1), ".500"),
        ((math.nan, math.nan, 0), "-"),
    ],
)
def test_text_of_a_table_cell(values, expected):
    assert stats.text(stats.Estimate(*values)) == expected
    assert str(stats.Estimate(*values)) == expected
