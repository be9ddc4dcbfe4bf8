"""Our inner loop is the reference's trainer: same losses, gradients, rates and adapters."""

import chex
import numpy as np
import pytest
import shared_data
import toys
import trainer_goldens

from seal_jax.config import Inner

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_there_are_recorded_runs():
    shared_data.path("ki_goldens/trainer_numeric")
    assert trainer_goldens.names()


@pytest.fixture(scope="module", params=trainer_goldens.names())
def run(request, tmp_path_factory) -> trainer_goldens.Replay:
    return trainer_goldens.replay(request.param, tmp_path_factory.mktemp(request.param))


def test_every_step_has_the_recorded_loss(run):
    ours, theirs = run.loss
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_every_step_divides_by_the_recorded_number_of_tokens(run):
    ours, theirs = run.divisors
    assert ours == theirs or not theirs


def test_every_step_has_the_recorded_gradient_norm(run):
    ours, theirs = run.grad_norm
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_every_step_has_the_recorded_learning_rate(run):
    ours, theirs = run.learning_rate
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def test_the_adapter_ends_where_the_recorded_one_does(run):
    ours, theirs = run.final
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_adapted_model_gives_the_recorded_logits(run):
    ours, theirs = run.logits
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_pad_loss_makes_the_recorded_rows():
    """Documents become the reference's rows: padded with EOS, the padding trained on."""
    rows = shared_data.read("ki_goldens/trainer_numeric/ki_bs1_ga1.json")["rows"]
    for row in rows:
        size = sum(row["attention_mask"])
        assert row["labels"] == row["input_ids"]
        settings = Inner(pad_loss=True, max_length=len(row["input_ids"]))
        written = " ".join(str(x) for x in row["input_ids"][:size])
        (text,) = toys.batch([written], settings).candidates[0].texts
        assert text.tokens.tolist() == row["input_ids"] and text.weights.all()
        assert text.real == size
