"""Laws of batching: every text is trained on as often as asked, whatever its company, unpadded."""

import itertools
import math
import re

import jax
import numpy as np
import pytest
import shared_data
import toys

from seal_jax import batching
from seal_jax import slots as slots_lib
from seal_jax.config import Inner
from seal_jax.errors import SealError
from seal_jax.tasks import Context, Edit, Example, squad

KEY = jax.random.key(5)


def visits(chunk: slots_lib.Chunk, at: int) -> list[list[list[tuple]]]:
    """Returns, for each step a candidate takes, its rows, each a list of (tokens, weights)."""
    slots, steps = chunk.slots, []
    for i in np.flatnonzero(slots.active_ci[at]):
        assert i < slots.visits
        place = (slots.bucket_i[i], at, slots.row_i[i])
        rows = []
        for parts in zip(
            *(
                getattr(slots, name)[place[0]][place[1:]]
                for name in ("tokens", "weights", "segments")
            ),
            strict=True,
        ):
            tokens, weights, segments = parts
            rows.append(
                [
                    (tuple(tokens[abs(segments) == n]), tuple(weights[abs(segments) == n]))
                    for n in range(1, abs(segments).max() + 1)
                ]
            )
        steps.append([row for row in rows if row])
    return steps


def all_visits(batch: batching.Batch, chunk: int) -> dict[int, list]:
    """Returns the steps of every candidate of a batch, by its place."""
    found = {}
    for part in slots_lib.arrange(batch, chunk, KEY):
        for at, index in enumerate(part.index):
            if index >= 0:
                found[int(index)] = visits(part, at)
            else:
                assert not part.slots.active_ci[at].any() and part.slots.total_c[at] == 0
    return found


WRITTEN = [
    ";".join(toys.text(n, (who, n)) for n in lengths) + f";epochs={epochs}"
    for who, (lengths, epochs) in enumerate(
        [((9, 30, 4), 3), ((12,), 1), ((50, 3, 8, 20, 21), 2), ((6, 6), 4), ((17, 90), 0)]
    )
]


@pytest.mark.parametrize("batch_size", [1, 2, 0])
def test_every_epoch_trains_on_every_text_once(batch_size):
    batch = toys.batch(WRITTEN, Inner(batch_size=batch_size))
    for index, steps in all_visits(batch, 0).items():
        candidate = batch.candidates[index]
        per_epoch = len(steps) // max(candidate.epochs, 1)
        assert len(steps) == per_epoch * candidate.epochs
        expected = sorted(tuple(text.tokens) for text in candidate.texts)
        for epoch in range(candidate.epochs):
            own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert batch_size == 0 or all(len(step) <= batch_size for step in own)
            texts = [text for step in own for row in step for text in row]
            assert sorted(tokens for tokens, _ in texts) == expected
            assert all(w == (0,) + (1,) * (len(t) - 1) for t, w in texts)


@pytest.mark.parametrize("batch_size", [1, 2, 0])
def test_what_a_candidate_sees_does_not_depend_on_its_company(batch_size):
    settings = Inner(batch_size=batch_size)
    together = all_visits(toys.batch(WRITTEN, settings), 0)
    assert together == all_visits(toys.batch(WRITTEN, settings), 2)
    for index, written in enumerate(WRITTEN):
        assert all_visits(toys.batch([written], settings), 0)[0] == together[index]


def test_the_order_is_drawn_anew_in_each_epoch_and_from_the_key_alone():
    written = ";".join(toys.text(10 + n, n) for n in range(6)) + ";epochs=4"
    batch = toys.batch([written])
    order = lambda key: [
        len(step[0][0][0]) for step in visits(next(slots_lib.arrange(batch, 0, key)), 0)
    ]
    assert order(KEY) == order(KEY) != order(jax.random.key(6))
    epochs = [tuple(order(KEY)[i : i + 6]) for i in range(0, 24, 6)]
    assert len(set(epochs)) == 4 and all(sorted(e) == sorted(epochs[0]) for e in epochs)


def test_chunks_of_one_call_share_one_shape_and_fill_up():
    batch = toys.batch(WRITTEN)
    chunks = list(slots_lib.arrange(batch, 2, KEY))
    shapes = {str(jax.tree.map(lambda x: (x.shape, x.dtype), chunk.slots)) for chunk in chunks}
    assert len(chunks) == 3 and len(shapes) == 1
    places = np.concatenate([chunk.index for chunk in chunks])
    assert sorted(places) == [-1, 0, 1, 2, 3, 4]
    for devices, size in ((3, 3), (4, 4)):  # that share a chunk out
        found = slots_lib.arrange(batch, 2, KEY, devices)
        assert all(len(part.index) == len(part.slots.total_c) == size for part in found)


def test_useful_and_processed_tokens_are_counted():
    batch = toys.batch(WRITTEN)
    for chunk in slots_lib.arrange(batch, 2, KEY):
        slots = chunk.slots
        seen = [step for at in range(2) for step in visits(chunk, at)]
        assert chunk.useful == sum(len(t) for step in seen for row in step for t, _ in row)
        widths = [slots.tokens[slots.bucket_i[i]].shape[2:] for i in range(slots.visits)]
        assert chunk.processed == 2 * sum(rows * t for rows, t in widths)


def test_no_step_is_run_in_which_nobody_is_active():
    written = [toys.text(5, 0) + ";epochs=9", "1 2 3;4 5 6;7 8 9;epochs=2"]
    chunk = next(slots_lib.arrange(toys.batch(written), 0, KEY))
    assert chunk.slots.visits == 3 + 3 + 7  # two epochs of three texts, then seven of one
    assert chunk.slots.active_ci.any(0).all()


def test_batch_size_0_packs_all_texts_into_one_step_per_epoch():
    written = ";".join(toys.text(100, n) for n in range(12)) + ";epochs=2"
    batch = toys.batch([written], Inner(batch_size=0))
    steps = all_visits(batch, 0)[0]
    assert len(steps) == 2
    assert [len(row) for row in steps[0]] == [5, 5, 2]  # 101 tokens each, rows of 512


def test_directives_of_the_self_edit_win_over_the_settings():
    settings = Inner(learning_rate=0.5, epochs=7)
    plain, own = toys.batch(["1 2 3", "lr=0.25;epochs=2;1 2 3"], settings).candidates
    assert (plain.learning_rate, plain.epochs) == (0.5, 7)
    assert (own.learning_rate, own.epochs) == (0.25, 2)


def test_a_self_edit_that_cannot_be_applied_trains_nothing_and_says_why():
    settings = Inner(max_steps=6)
    written = ["bad", "1 2;epochs=7", "1 2;3 4;epochs=3"]
    batch = toys.batch(written, settings)
    assert [c.error for c in batch.candidates] == [
        "this self-edit is bad",
        "asks for 7 steps, more than 6",
        None,
    ]
    found = all_visits(batch, 0)
    assert [len(found[i]) for i in range(3)] == [0, 0, 6]
    assert all_visits(toys.batch(["bad"]), 0) == {0: []}


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 9), (2, 4), (0, 3)])
def test_a_batch_counts_towards_the_limit_of_steps_as_far_as_it_is_full(batch_size, steps):
    """As in the reference: three epochs of 3 texts are 4 full batches of 2."""
    error = f"asks for {steps} steps, more than {steps - 1}"
    for most, expected in ((steps, None), (steps - 1, error)):
        settings = Inner(batch_size=batch_size, max_steps=most)
        assert toys.batch(["1 2;3 4;5 6;epochs=3"], settings).candidates[0].error == expected


def test_without_an_end_of_text_nothing_is_packed():
    tokenizer = toys.Numbers()
    tokenizer.eos_token_id = None
    with pytest.raises(SealError, match="names no end-of-text token: pass eos_id"):
        batching.pack(toys.task(), [], tokenizer, Inner())
    assert batching.pack(toys.task(), [], tokenizer, Inner(), eos_id=7).eos_id == 7


@pytest.mark.parametrize(
    ("rate", "epochs"), [(-0.1, 1), (math.inf, 1), (math.nan, 1), (0.1, -1), (0.1, 1.5)]
)
def test_what_no_optimizer_can_do_trains_nothing_and_says_so(rate, epochs):
    edit = Edit((Example("", "1 2"),), learning_rate=rate, epochs=epochs)
    found = batching.candidate(edit, 3, toys.Numbers(), 1, Inner())
    assert (found.texts, found.epochs, found.id) == ((), 0, 3)
    assert found.error == f"asks for {epochs} epochs at a learning rate of {rate}"


def test_a_candidate_is_named_by_its_context_and_number_alone():
    """Its fresh adapter is drawn by this number: another one changes what every seed gives."""
    places = [("a", 0, "1 2"), ("a", 0, "3 4;5"), ("a", 1, "1 2"), ("b", 0, "1 2"), ("b", 0, "bad")]
    edits = [batching.SelfEdit(Context(name), i, text) for name, i, text in places]
    found = batching.pack(toys.task(), edits, toys.Numbers(), Inner())
    # The first 8 digits of the SHA-256 of the two, joined by the sign 0x1f.
    expected = ["e842f55d", "e842f55d", "839e11a4", "795485dc", "795485dc"]
    assert [f"{candidate.id:08x}" for candidate in found.candidates] == expected


def test_a_document_ends_with_one_eos_and_a_prompt_is_not_trained_on():
    (text,) = toys.batch(["4 5 6"]).candidates[0].texts
    assert text.tokens.tolist() == [4, 5, 6, toys.EOS] and text.weights.tolist() == [0, 1, 1, 1]
    (text,) = toys.batch(["4 5>6 7"]).candidates[0].texts
    assert text.tokens.tolist() == [4, 5, 6, 7, toys.EOS]
    assert text.weights.tolist() == [0, 0, 1, 1, 1]
    (text,) = toys.batch(["all;4 5>6 7"]).candidates[0].texts
    assert text.weights.tolist() == [0, 1, 1, 1, 1]


def test_a_beginning_of_text_token_opens_a_text_once():
    (text,) = toys.batch(["4 5"], bos=1).candidates[0].texts
    assert text.tokens.tolist() == [1, 4, 5, toys.EOS]
    (text,) = toys.batch(["4>5"], bos=1).candidates[0].texts
    assert text.tokens.tolist() == [1, 4, 5, toys.EOS]


def test_texts_are_cut_to_max_length():
    (text,) = toys.batch(["4 5 6 7 8"], Inner(max_length=4)).candidates[0].texts
    assert text.tokens.tolist() == [4, 5, 6, 7]


def test_pad_loss_trains_on_the_padding_as_the_reference_does():
    settings = Inner(max_length=6, pad_loss=True, epochs=1)
    (text,) = toys.batch(["4 5 6"], settings).candidates[0].texts
    assert text.tokens.tolist() == [4, 5, 6] + [toys.EOS] * 3
    assert text.weights.tolist() == [1] * 6 and text.real == 3
    chunk = next(slots_lib.arrange(toys.batch(["4 5 6"], settings), 0, KEY))
    assert chunk.slots.segments[0][0, 0, 0].tolist() == [1, 1, 1, -1, -1, -1] + [0] * 10
    (text,) = toys.batch(["4 5 6 7 8 9 10"], settings).candidates[0].texts
    assert text.tokens.tolist() == [4, 5, 6, 7, 8, 9] and text.real == 6


def _padded(lengths: list[int], sizes: tuple[int, ...]) -> int:
    return sum(min(size for size in sizes if size >= length) for length in lengths)


def test_buckets_waste_the_least_that_few_lengths_can():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 300, rng.integers(1, 12)).tolist()
        for most in (1, 2, 4):
            found = slots_lib.buckets(lengths, most=most)
            grid = sorted({slots_lib.round_up(x) for x in lengths})
            best = min(
                _padded(lengths, (*some, grid[-1]))
                for k in range(min(most, len(grid)))
                for some in itertools.combinations(grid[:-1], k)
            )
            assert len(found) <= most and _padded(lengths, found) == best


@pytest.mark.parametrize("length", [1, 16, 17, 768, 769, 1024, 5000])
def test_a_bucket_holds_what_it_is_for(length):
    assert length <= slots_lib.round_up(length) <= max(24, 1.35 * length)


def test_real_self_edits_waste_few_tokens():
    """The published self-edits of 50 passages, a word or sign as a token.

    The reference pads each text to 2,048: 2 useful tokens of 100.
    """
    ranked = shared_data.read("ki_inputs/results/query_server/train/rank_iter0.json")

    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(re.findall(r"\w+|[^\w\s]", text))}

    settings, candidates = Inner(), []
    for article in ranked["articles"]:
        for completion in article["completions"]:
            texts = squad.training_texts(completion["text"], article["context"], article["title"])
            edit = Edit(tuple(Example(text) for text in texts))
            tokens = tuple(batching.tokenize(edit, tokenizer, 0, settings))
            candidates.append(batching.Candidate(tokens, 1e-3, 10, len(candidates)))
    batch = batching.Batch(tuple(candidates), settings, 0)
    share = {}
    for chunk in (1, 4, 16):
        parts = list(slots_lib.arrange(batch, chunk, KEY))
        useful, processed = (sum(getattr(x, n) for x in parts) for n in ("useful", "processed"))
        share[chunk] = useful / processed
    assert share[1] > 0.65, share  # what four buckets cost
    assert share[4] > 0.55, share  # and unequal company
    assert share[16] > 0.35, share


def test_a_bucket_must_save_more_than_it_costs_to_compile():
    lengths = [20] * 10 + [200]
    assert len(slots_lib.buckets(lengths, visits=1)) == 1
    assert len(slots_lib.buckets(lengths, visits=1000)) == 2
