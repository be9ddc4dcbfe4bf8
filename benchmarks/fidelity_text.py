"""The comparisons of `fidelity.py` in which both sides must be equal: text, choices, labels, files.

`tests` must be on sys.path.
"""

import gzip
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shared_data

from seal_jax import labels
from seal_jax.formats import results, sft
from seal_jax.tasks import grading, squad
from seal_jax.tasks.arc import voting


class Row(NamedTuple):
    """One line of the table."""

    what: str
    against: str
    cases: int
    difference: str


def text_rows() -> Iterator[Row]:
    """Yields what must be equal: texts, choices, labels and files."""
    for what, source, pairs in _EQUAL:
        if shared_data.folder() is None:
            return
        found = [one == other for one, other in pairs()]
        wrong = found.count(False)
        yield Row(what, f"`{source}`", len(found), f"{wrong} differ" if wrong else "none")


def golden(name: str) -> Any:
    """Returns the cases of a golden file."""
    return shared_data.read(f"ki_goldens/{name}")


Pairs = Iterator[tuple[Any, Any]]


def _prompts() -> Pairs:
    for x in golden("make_prompt.jsonl"):
        style = "implications" if x["prompt_key"] == "openai" else x["prompt_key"]
        made = squad.prompt(x["title"], x["context"], style, x["instruct_model"])
        yield made, x["expected"]


def _texts(name: str) -> Callable[[], Pairs]:
    def pairs() -> Pairs:
        for x in golden(name):
            made = squad.training_texts(
                x["completion"], x["context"], x["title"], x["split_newlines"]
            )
            yield made, x["expected"]

    return pairs


def _answer_prompts() -> Pairs:
    for x in golden("answer_and_grade_prompts.json"):
        plain, chat = x["answer_prompts"], x["answer_prompts_instruct"]
        for item, *expected in zip(x["eval_questions"], plain, chat, strict=True):
            bare = item["question"].removeprefix(f"Topic: {item['title']}\n")
            for is_chat, text in enumerate(expected):
                yield squad.answer_prompt(item["title"], bare, chat=bool(is_chat)), text


def _grade_prompts() -> Pairs:
    for x in golden("answer_and_grade_prompts.json"):
        for item, answer, text in zip(
            x["eval_questions"], x["preds"], x["grade_prompts"], strict=True
        ):
            yield grading.prompt(item["question"], item["answer"], answer), text


def _verdicts() -> Pairs:
    for x in golden("parse_yes_no.json"):
        yield grading.parse_yes_no(x["text"]), x["expected"]


def _selection() -> Pairs:
    for x in golden("selection_seed42.json"):
        made = squad.select(range(x["N"]), x["start"], x["n"])
        yield hashlib.sha256(json.dumps(made).encode()).hexdigest(), x["sha256_of_json"]


def _sequences() -> Pairs:
    for x in golden("continual_sampling.json"):
        made = squad.sample_sequences(range(x["N"]), x["n_sequences"], x["n_datapoints"], x["seed"])
        yield made, x["indices"]


def _limits() -> Pairs:
    for x in golden("cpt_question_limit.json"):
        yield squad.limit_questions(range(x["n_questions"]), x["limit"]), x["indices"]


def _end_masks() -> Pairs:
    for x in golden("end_mask_int.json"):
        row = labels.end_mask(x["ids"], x["mask_ids"], x["max_seq_length"], x["pad_id"])
        expected = ("expected_input_ids", "expected_attention_mask", "expected_labels")
        yield list(row), [x[key] for key in expected]
    for x in golden("end_mask.jsonl"):
        length, pad = x["max_seq_length"], x["pad_id"]
        row = labels.end_mask(x["real_input_ids"], x["substring_ids"], length, pad)
        masked = x["expected_n_masked_labels"]
        padded = x["real_input_ids"] + [pad] * (length - x["n_real_tokens"])
        yield row.labels, [labels.IGNORE] * masked + padded[masked:]


def _sft_labels() -> Pairs:
    for x in golden("sft_labels.jsonl"):
        ids, masked = x["expected_input_ids"], x["expected_n_masked_labels"]
        text = ids[: x["n_prompt_completion_tokens"]]
        # A row cut before its EOS does not say which token that is.
        eos = ids[-1] if x["ends_with_eos"] else -1
        row = labels.completion_only(text[: x["n_prompt_tokens"]], text, eos, x["max_length"])
        yield (row.input_ids, row.labels), (ids, [labels.IGNORE] * masked + ids[masked:])


def _sft_files() -> Pairs:
    folder = shared_data.path("ki_goldens/sft/REPORT.json").parent
    for x in golden("sft/REPORT.json"):
        path = shared_data.path(f"ki_inputs/{x['input']}")
        tag = path.name.removeprefix("rank_").removesuffix(".gz").removesuffix(".json")
        for file in sorted(folder.glob(f"{tag}__sft_best*.gz")):
            k = int(file.name.split("sft_best")[1].split("of")[0])
            made = sft.text(sft.rows(results.read(path), k))
            yield made.encode(), gzip.decompress(file.read_bytes())
    for x in golden("sft/synthetic.json"):
        yield sft.rows(x["input"], x["k_best"]), x["expected_rows"]


def _overall() -> Pairs:
    for x in golden("stats_overall.json"):
        content = results.read(shared_data.path(f"ki_inputs/{x['file']}"))
        stated = {key: value for key, value in x["stated_overall"].items() if value is not None}
        for from_questions in {False, x["has_question_records"]}:
            made = results.recompute(content, from_questions)
            yield {key: made[key] for key in stated}, stated


_EQUAL = [
    ("prompts that ask for self-edits", "make_prompt.jsonl", _prompts),
    (
        "training texts of published self-edits",
        "build_train_sequences.jsonl",
        _texts("build_train_sequences.jsonl"),
    ),
    (
        "training texts of odd self-edits",
        "build_train_sequences_odd.jsonl",
        _texts("build_train_sequences_odd.jsonl"),
    ),
    ("prompts that ask questions", "answer_and_grade_prompts.json", _answer_prompts),
    ("prompts that ask for a verdict", "answer_and_grade_prompts.json", _grade_prompts),
    ("verdicts read from replies", "parse_yes_no.json", _verdicts),
    ("passages chosen (seed 42)", "selection_seed42.json", _selection),
    ("sequences of continual self-edits", "continual_sampling.json", _sequences),
    ("questions chosen for many passages", "cpt_question_limit.json", _limits),
    ("label rows of the inner loop", "end_mask_int.json, end_mask.jsonl", _end_masks),
    ("label rows of the outer fine-tuning", "sft_labels.jsonl", _sft_labels),
    ("ReST-EM training sets, byte for byte", "sft/", _sft_files),
    ("`overall` blocks recomputed from records", "stats_overall.json", _overall),
]


def replay_rows() -> Iterator[Row]:
    """Yields programs replayed with canned generations; the comparisons are those of the tests."""
    if shared_data.folder() is None:
        return
    import test_evals
    import test_evals_inner_loop
    import test_formats

    def generated() -> None:
        with tempfile.TemporaryDirectory() as folder:
            test_formats.test_generating_a_data_set_is_the_reference_s_run(Path(folder))

    for what, source, cases, compare in (
        (
            "writing a data set of self-edits: requests, file, settings, errors",
            "make_squad_data_main.json",
            len(golden("make_squad_data_main.json")),
            generated,
        ),
        (
            "single passages: requests and result file",
            "query_server_replay/",
            len(list(test_evals.query_server_cases())),
            test_evals.test_single_passages_replay_the_reference_s_driver,
        ),
        (
            "many passages: request and result file",
            "cpt_replay.json",
            len(golden("cpt_replay.json")),
            test_evals.test_cpt_replays_the_reference_s_driver,
        ),
        (
            "continual self-edits: requests, prompts, merges, summary",
            "continual_driver.json",
            len(golden("continual_driver.json")),
            test_evals.test_continual_self_edits_replay_the_reference_s_driver,
        ),
        (
            "one inner loop: prompts, grading, reply",
            "ttt_server_protocol.json",
            len(golden("ttt_server_protocol.json")["cases"]),
            test_evals_inner_loop.test_one_inner_loop_replays_the_reference_s_server,
        ),
    ):
        yield _passing(what, source, cases, compare)


def _passing(what: str, source: str, cases: int, compare: Callable[[], None]) -> Row:
    """Returns the row of a comparison that raises AssertionError at a difference."""
    try:
        compare()
        difference = "none"
    except AssertionError as error:
        difference = f"differs: {(str(error) or 'see its test').splitlines()[0]}"
    return Row(what, f"`{source}`", cases, difference)


def arc_rows() -> Iterator[Row]:
    """Yields the few-shot task's parts and programs; the comparisons are those of the tests."""
    if shared_data.folder() is None:
        return
    import test_arc_goldens as parts
    import test_arc_predict_goldens as programs

    count = lambda name: len(shared_data.read(f"arc_goldens/{name}"))
    for what, names, compare in (
        ("files of puzzles", ["task_reading.json"], parts.test_files_are_read_in_order_and_whole),
        (
            "order of evaluation",
            ["eval_task_order.json"],
            parts.test_evaluation_order_is_the_recorded_shuffle,
        ),
        (
            "transforms of grids, their inverses and families",
            ["augmenters_grid.json", "inverse.json", "get_augmenters.json"],
            parts.test_augmenters_and_their_names,
        ),
        (
            "random transforms",
            ["augmenters_random_task.json"],
            parts.test_random_augmenters_draw_the_recorded_numbers,
        ),
        (
            "training tasks of a self-edit",
            ["ttt_train_data.jsonl"],
            parts.test_training_tasks_at_each_stage,
        ),
        (
            "training sets after the caps on number and length",
            ["process_task.jsonl"],
            parts.test_training_set_tokens_cap_and_texts,
        ),
        (
            "chat texts and prompts",
            ["messages.jsonl", "self_edit_prompt.jsonl"],
            parts.test_chat_texts_and_their_tokens,
        ),
        (
            "grids as text and read from replies",
            ["grid_text.json", "parse_numpy_from_str.json", "decode.json"],
            parts.test_grid_texts_and_what_is_read_in_replies,
        ),
        (
            "queries of a test input",
            ["tti_preprocess.jsonl"],
            programs.test_queries_of_a_test_input,
        ),
        ("submissions and scores", ["evaluate.json"], programs.test_submissions_and_scores),
        (
            "whole evaluation with canned replies",
            ["eval_pipeline.json"],
            programs.test_whole_evaluation_with_canned_replies,
        ),
        (
            "self-edits taken or refused",
            ["config_filters.json", "config_odd.json"],
            programs.test_which_configurations_the_reference_accepts,
        ),
        (
            "label rows of the inner loop (numbers of tokens and where the loss is)",
            ["ttt_labels.json"],
            programs.test_label_masks_of_the_inner_loop,
        ),
        (
            "training pairs of the outer fine-tuning",
            ["bc_selection.json"],
            programs.test_pairs_of_the_outer_finetuning,
        ),
    ):
        yield _passing(what, ", ".join(names), sum(map(count, names)), compare)
    votes = shared_data.read("arc_goldens/vote.json")
    tied = [row for row in votes if row["tie_sensitive"]]
    agreed = sum(_vote(row) in row["acceptable"] for row in tied)
    yield _passing(
        "votes and majorities",
        "vote.json, row_majority.json",
        len(votes) - len(tied) + count("row_majority.json"),
        programs.test_votes_and_majorities,
    )
    yield Row(
        "votes that hang on how equal counts are sorted, in the reference by the machine",
        "`vote.json`",
        len(tied),
        f"{len(tied) - agreed} differ" if agreed < len(tied) else "none",
    )


def _vote(row: dict[str, Any]) -> list[Any]:
    found = [(np.array(x["output"], np.int8), x["inverter"]) for x in row["outputs"]]
    return [grid.tolist() for grid in voting.vote(found)]
