"""ARC against the reference's recorded behaviour: reading, augmenting, texts.

Orders that depended on Python's hash seed are recorded in the goldens and fed back in.
"""

import numpy as np
import shared_data
from arc_goldens import edit_of, golden, key_of, puzzle_set, sha

from seal_jax.tasks.arc import augment, generate, grids, prompts, tasks


def test_files_are_read_in_order_and_whole():
    for row in golden("task_reading.json"):
        files = [shared_data.path(f"arc_inputs/{file}") for file in row["files"]]
        found = tasks.load(*files[: 1 + row["with_solutions"]])
        assert len(found) == row["n_tasks"]
        for one, want in zip(found, row["tasks"], strict=True):
            got = (one.name, len(one.train), *tasks.sizes(one), sha(tasks.code(one)))
            assert list(got) == list(want.values())


def test_evaluation_order_is_the_recorded_shuffle():
    for row in golden("eval_task_order.json"):
        found = tasks.shuffled(puzzle_set(row["set"]), row["seed"], row["num_examples"])
        assert [one.name for one in found] == row["names"]


def test_augmenters_and_their_names():
    known = (*augment.BASIC, *augment.SIZE, *augment.CHAIN, *augment.REPEAT, *augment.CONCAT)
    more = (augment.IDENTITY, augment.resolution(3), augment.repeat(0, 3))
    parts = {part.name: part for part in (*known, *more)}
    for row in golden("augmenters_grid.json"):
        made = parts[row["augmenter"]].grid(grids.decode(row["input"]))
        assert grids.code(made) == row["expected"]
    for row in golden("inverse.json"):
        undo = augment.inverse(row["augmenter"])
        assert (undo and undo.name) == row["inverse"]
    for row in golden("get_augmenters.json"):
        flags = {key[8:]: value for key, value in row.items() if key.startswith("include_")}
        assert [part.name for part in augment.families(**flags)] == row["expected"]


def test_random_augmenters_draw_the_recorded_numbers():
    changes = {
        "RandomTranslateXY()": augment.translated_as_reference,
        "PermuteColors()": augment.recoloured,
        "PermuteExamples()": augment.reordered,
    }
    for row in golden("augmenters_random_task.json"):
        rng = np.random.RandomState(row["seed"])
        made = changes[row["augmenter"]](tasks.decode(row["input"]), rng)
        assert tasks.code(made) == row["expected"]
        assert rng.randint(1_000_000) == row["next_randint_1000000_after"]


def test_training_tasks_at_each_stage():
    for row in golden("ttt_train_data.jsonl"):
        one, edit = tasks.decode(row["task"]), edit_of(row["flags"])
        found = generate.initial_tasks(one, row["leave_n"], reference_quirks=True)
        index = {tasks.pair_code(pair): i for i, pair in enumerate(one.train)}
        assert [
            {
                "test_index": index[tasks.pair_code(each.test)],
                "train_indices": [index[tasks.pair_code(pair)] for pair in each.train],
            }
            for each in found
        ] == row["initial"]
        rng = np.random.RandomState(row["seed"])
        geometric = generate.geometric_tasks(one, edit, row["leave_n"], rng, True)
        unique = key_of(row, "unique_geometric")
        assert [tasks.code(each) for each in geometric] == unique
        order = [tasks.decode(unique[i]) for i in key_of(row, "order_used")]
        seed, permute = row["seed"], row["permute_n"]
        stage2 = generate.permuted(order, edit, np.random.RandomState(seed), permute)
        assert [tasks.code(each) for each in stage2] == key_of(row, "stage2")
        final = generate.with_permuted(order, edit, np.random.RandomState(seed), permute)
        assert len(final) == row["n_final"]
        assert sha("\n".join(sorted(map(tasks.code, final)))) == row["final_sorted_sha256"]


def test_training_set_tokens_cap_and_texts():
    for row in golden("process_task.jsonl"):
        made = [[tasks.decode(code) for code in each] for each in key_of(row, "generated_per_n")]
        counts = [[prompts.count_tokens(one) for one in each] for each in made]
        assert counts == row["total_tokens_per_n"]
        flat = [one for each in made for one in each]
        rng = np.random.RandomState(row["seed"])
        kept = generate.capped(flat, rng, row["Nmax"], 8192, prompts.count_tokens)
        texts = [prompts.training_text(one) for one in kept]
        assert [sha(text)[:16] for text in texts] == row["full_text_sha256_16"]
        own = generate.augmented_tasks(
            tasks.decode(row["task"]),
            edit_of(row["flags"]),
            np.random.RandomState(row["seed"]),
            leave=row["leave_n"],
            permute=row["permute_n"],
            max_examples=1 << 30,
            reference_quirks=True,
        )
        assert len(own) == row["n_before_cap"]  # the reference's number for every hash seed


def test_chat_texts_and_their_tokens():
    for row in golden("messages.jsonl"):
        one, form = tasks.decode(row["task"]), row["formatter"]
        chat = prompts.chat(one, form)
        if row["messages"] is None:
            assert chat is None
            continue
        assert [turn._asdict() for turn in chat.question] == row["messages"]
        assert chat.answer._asdict() == row["answer"]
        assert prompts.render(one, form) == (row["chat_text_query"], row["answer"]["content"])
        whole = prompts.training_text(one, form)
        assert whole == row["chat_text_with_answer"]
        if form in ("new_format", "default"):
            tokens = row["n_tokens_with_answer_hf_double_bos"]
            assert prompts.llama_tokens(whole) + 1 == tokens
    for row in golden("self_edit_prompt.jsonl"):
        assert prompts.self_edit_prompt(tasks.decode(row["task"])) == row["expected_prompt"]


def test_grid_texts_and_what_is_read_in_replies():
    for row in golden("grid_text.json"):
        assert grids.TEXTS[row["representer"]](grids.decode(row["grid"])) == row["expected"]
    for row in golden("parse_numpy_from_str.json"):
        grid, want = grids.parse_as_reference(row["text"]), row["expected"]
        assert (grid is None) == (want is None)
        if want is not None:
            assert (list(grid.shape), grid.tolist()) == (want["shape"], want["values"])
            assert grid.dtype == want["dtype"]
    for row in golden("decode.json"):
        want = row["expected"].get("grid")
        as_reference = grids.decode_as_reference(row["output_text"])
        assert (None if as_reference is None else as_reference.tolist()) == want
        strict = grids.parse_grid(row["output_text"])  # the same, or refused
        assert strict is None or strict.tolist() == want
