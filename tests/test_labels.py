"""Label rows: where the loss of the reference's trainers falls, token by token."""

import shared_data

from seal_jax import labels


def test_end_mask_is_the_reference_s_on_plain_integers():
    for case in shared_data.read("ki_goldens/end_mask_int.json"):
        row = labels.end_mask(case["ids"], case["mask_ids"], case["max_seq_length"], case["pad_id"])
        assert row.input_ids == case["expected_input_ids"]
        assert row.attention_mask == case["expected_attention_mask"]
        assert row.labels == case["expected_labels"]


def test_end_mask_is_the_reference_s_on_real_texts():
    for case in shared_data.read("ki_goldens/end_mask.jsonl"):
        length = case["max_seq_length"]
        row = labels.end_mask(case["real_input_ids"], case["substring_ids"], length, case["pad_id"])
        masked = case["expected_n_masked_labels"]
        padded = case["real_input_ids"] + [case["pad_id"]] * (length - case["n_real_tokens"])
        assert row.labels == [labels.IGNORE] * masked + padded[masked:], case["id"]
        trained = sum(label != labels.IGNORE for label in row.labels)
        assert trained == case["expected_n_label_tokens_incl_pad"], case["id"]
        assert sum(row.attention_mask) == case["n_real_tokens"]


def test_sft_labels_are_the_reference_s():
    for case in shared_data.read("ki_goldens/sft_labels.jsonl"):
        ids, masked = case["expected_input_ids"], case["expected_n_masked_labels"]
        # The longest text of a batch of files is cut before its EOS, which is then unknown.
        eos = ids[-1] if case["ends_with_eos"] else 151643
        text = ids[: case["n_prompt_completion_tokens"]]
        prompt = text[: case["n_prompt_tokens"]]
        row = labels.completion_only(prompt, text, eos, case["max_length"])
        assert row.input_ids == ids, case["id"]
        assert row.labels == [labels.IGNORE] * masked + ids[masked:], case["id"]


def test_only_the_longest_text_loses_its_eos():
    short = labels.completion_only([1, 2], [1, 2, 3], 9, max_length=4)
    long = labels.completion_only([1, 2], [1, 2, 3, 4], 9, max_length=4)
    assert short.labels == [labels.IGNORE] * 2 + [3, 9]
    assert long.labels == [labels.IGNORE] * 2 + [3, 4]
    all_prompt = labels.completion_only([1, 2, 3], [1, 2, 3, 4], 9, max_length=2)
    assert all_prompt.labels == [labels.IGNORE] * 2


def test_pads_between_rows_carry_no_loss():
    short = labels.completion_only([1], [1, 2], 9, max_length=8)
    long = labels.completion_only([1], [1, 2, 3, 4], 9, max_length=8)
    padded, kept = labels.pad([short, long], pad_id=9)
    assert kept == long
    assert padded.input_ids == [1, 2, 9, 9, 9] and padded.attention_mask == [1, 1, 1, 0, 0]
    assert padded.labels == [labels.IGNORE, 2, 9, labels.IGNORE, labels.IGNORE]
