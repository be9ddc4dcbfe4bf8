"""ARC against the reference's recorded behaviour: queries, votes, scores, filters, labels."""

import json

import numpy as np
import pytest
import shared_data
from arc_goldens import SETS, golden, key_of, puzzle_set, sha

from seal_jax.errors import SelfEditError
from seal_jax.tasks.arc import generate, grids, predict, prompts, replies, tasks, voting
from seal_jax.tasks.arc import submission as submissions


def test_queries_of_a_test_input():
    for row in golden("tti_preprocess.jsonl"):
        one, made = tasks.decode(row["task"]), []
        index = {tasks.pair_code(pair): i for i, pair in enumerate(one.train)}
        for trace in row["trace"]:
            rng = np.random.RandomState(0)
            kept = predict.subsets(one, trace["n"], reference_quirks=True)
            indices = [[index[tasks.pair_code(pair)] for pair in each.train] for each in kept]
            assert indices == trace["kept_train_indices"]
            shown = kept + predict.permuted(kept, rng, row["permute_n"])
            order = trace["unique_in_order_used"]
            assert {tasks.code(each) for each in shown} == set(order)
            made += predict.transformed([tasks.decode(code) for code in order], rng)
        wanted = {(query["task"], query["inverter"]): query for query in row["queries"]}
        made = [query for query in made if prompts.count_tokens(query.task) < row["max_tokens"]]
        assert {(tasks.code(query.task), query.inverter) for query in made} == wanted.keys()
        assert len(made) == row["n_queries"]
        for query in made:
            want = wanted[tasks.code(query.task), query.inverter]
            assert sha(prompts.render(query.task, row["formatter"])[0]) == want["text_sha256"]
            assert prompts.count_tokens(query.task) == want["total_tokens"]
        own = predict.queries(
            one,
            np.random.RandomState(0),
            leave=row["include_n"],
            permute=row["permute_n"],
            max_tokens=row["max_tokens"],
            reference_quirks=True,
        )
        assert len(own) == row["n_queries"]


def test_votes_and_majorities():
    for row in golden("row_majority.json"):
        shown = [np.array(grid) for grid in row["outputs"]]
        assert voting.majority(shown, row["transpose"]).tolist() == row["expected"]
    for row in golden("vote.json"):
        found = [(np.array(each["output"], np.int8), each["inverter"]) for each in row["outputs"]]
        attempts = [grid.tolist() for grid in voting.vote(found)]
        if not row["tie_sensitive"]:
            assert attempts == row["expected"]


def test_votes_that_hang_on_unstable_sorting():
    """Where the reference's own answer depends on the machine, ours is one that it may give."""
    rows = [row for row in golden("vote.json") if row["tie_sensitive"]]
    assert rows
    for row in rows:
        found = [(np.array(each["output"], np.int8), each["inverter"]) for each in row["outputs"]]
        attempts = [grid.tolist() for grid in voting.vote(found)]
        assert attempts in row["acceptable"]


def test_submissions_and_scores():
    for row in golden("evaluate.json"):
        asked = puzzle_set(row["set"])
        attempts = {each["name"]: each["attempts"] for each in row["predictions"]}
        made = submissions.build(asked, attempts)
        assert made == row["expected_submission"]
        scores, want = submissions.score(asked, made, **row["kwargs"]), row["expected"]
        assert submissions.task_info(scores["correct"]) == want["task_info"]
        assert scores["per_prediction"] == want["per_prediction"]
        assert scores["competition"] == want["competition"]


def test_whole_evaluation_with_canned_replies():
    for row in golden("eval_pipeline.json"):
        asked = puzzle_set(row["set"])
        for edit in range(row["n_self_edits"]):
            sent = {r["key"]: r for r in row["engine_requests_and_outputs"] if r["edit"] == edit}
            attempts, grids_by_key = {}, {}
            for name, entry in row["queries"].items():
                keys = [each["key"] for each in entry["queries"]]
                queries = [
                    predict.Query(tasks.decode(each["task"]), each["inverter"])
                    for each in entry["queries"]
                ]
                for key, query in zip(keys, queries, strict=True):
                    prompt = prompts.render(query.task)[0]
                    assert sha(prompt) == sent[key]["prompt_sha256"]
                    assert predict.token_budget(prompt) == sent[key]["max_new_tokens"]
                outputs = [sent[key]["model_output"] for key in keys]
                found = predict.predictions(queries, outputs, grids.decode_as_reference)
                for key, one in zip(keys, found, strict=True):
                    if one is not None:
                        grids_by_key[key] = [one.grid.tolist()]
                attempts[name] = voting.vote([one for one in found if one is not None])
            made = submissions.build(asked, attempts)
            correct = submissions.score(asked, made)["correct"]
            assert submissions.task_info(correct) == row["expected_final_results"][str(edit)]
        assert grids_by_key == key_of(row, "expected_last_predictions")
        assert made == row["expected_last_submission"]


def _run_filter(row):
    """Returns the trainer's calls, the saved configurations and how many replies were used."""
    kind, rest = SETS[row["set"]]
    found = tasks.load(shared_data.path(f"arc_inputs/arc-agi_{kind}_challenges{rest}.json"))
    stream, calls, saved, chosen = iter(row["responses"]), [], {}, {}
    for one in found[: row["n_tasks"]]:
        if one.index == 1:  # a third test input counts as a puzzle of its own
            continue
        kept = replies.chosen(stream, row["n_self_edits_per_task"], row["skip_repeated_configs"])
        chosen[one.name if one.index else one.id] = one, kept
    for key, (one, kept) in chosen.items():
        saved[key] = {}
        for _, reading in kept:
            rng = np.random.RandomState(0)
            texts = generate.augmented_tasks(one, reading.edit, rng, reference_quirks=True)
            if not texts:
                continue
            reading = reading.limited(len(texts))
            calls.append(
                {
                    "learning_rate": reading.learning_rate,
                    "num_train_epochs": reading.epochs,
                    "loss_on_all_tokens": reading.loss_on_all,
                    "n_texts": len(texts),
                }
            )
            saved[key][str(len(saved[key]))] = reading.config
    return calls, saved, len(row["responses"]) - len(list(stream))


def test_which_configurations_the_reference_accepts():
    text = lambda tree: json.dumps(tree, sort_keys=True)  # NaN is not equal to itself
    for row in (*golden("config_filters.json"), *golden("config_odd.json")):
        want = row["expected"]
        if want.get("error"):
            with pytest.raises(SelfEditError, match=want["error"]):
                _run_filter(row)
            continue
        calls, saved, used = _run_filter(row)
        trained = [call for call in want["ttt_calls"] if "n_texts" in call]
        assert text(calls) == text([{key: call[key] for key in calls[0]} for call in trained])
        assert used == len(want["generate_calls"])
        final = want["final_configs_and_indices"]
        configs = {
            key: {index: each["config"] for index, each in entry.items()}
            for key, entry in final.items()
        }
        assert text(saved) == text(configs)


class Words:
    """A tokenizer of whole pieces, with Llama 3's ids of the assistant header."""

    HEADER = [128006, 78191, 128007, 271]
    PAD = 128009

    def __init__(self):
        self.ids = {"<|begin_of_text|>": 128000, prompts.EOT: self.PAD}
        self.ids |= {"<|start_header_id|>": 128006, "assistant": 78191}
        self.ids |= {"<|end_header_id|>": 128007, "\n\n": 271}

    def __call__(self, text):
        pieces = []
        for part in prompts._SPECIAL.split(text.replace("]]#", "]]\0#").replace("-out", "-\0out")):
            plain = [] if prompts._SPECIAL.fullmatch(part) else part.split("\0")
            pieces += [p for each in plain for p in prompts._PIECE.findall(each)] or [part] * bool(
                part
            )
        return [128000] + [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]


def test_label_masks_of_the_inner_loop():
    words = Words()
    for row in golden("ttt_labels.json"):
        ids = [words(text) for text in row["texts"]]
        made = replies.rows(ids, words.HEADER, words.PAD, row["loss_on_all_tokens"])
        for one, want in zip(made, key_of(row, "expected_rows"), strict=True):
            assert sum(one.attention_mask) == want["n_real_tokens"]
            assert len(one.input_ids) == want["padded_length"]
            assert one.labels.count(-100) == want["n_masked_labels"]
            assert one.input_ids[:2] == want["input_ids_first5"][:2]
            assert one.labels[want["n_masked_labels"] :] == one.input_ids[want["n_masked_labels"] :]
            end = want["n_real_tokens"]
            assert one.input_ids[end - 5 : end] == want["last_real_ids5"]


def test_pairs_of_the_outer_finetuning():
    words = Words()
    for row in golden("bc_selection.json"):
        pairs = replies.rewarded(row["results"], row["configs_and_indices"])
        texts = [replies.outer_text(*pair) for pair in pairs]
        assert texts == row["expected_training_texts"]
        made = replies.rows([words(text) for text in texts], words.HEADER, words.PAD)
        for one, want, pair in zip(made, key_of(row, "expected_rows"), pairs, strict=True):
            # English is more tokens for Llama than pieces here, but the mask ends where it does:
            # after the prompt, so that JSON and end of turn carry loss
            masked = len(words(pair[0]))
            assert one.labels == [-100] * masked + one.input_ids[masked:]
            assert one.input_ids[:4] == want["first_ids"][:3] + one.input_ids[3:4]
            assert want["n_masked_labels"] < want["n_real_tokens"]
