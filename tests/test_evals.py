"""The three evaluations over canned inner loops: the reference's requests, records, summaries."""

import json

import pytest
import shared_data

from seal_jax import config
from seal_jax.evals import continual, cpt, inner_loop, single_passage
from seal_jax.evals.inner_loop import Reply
from seal_jax.formats import continual as continual_file
from seal_jax.formats import cpt as cpt_file
from seal_jax.formats import results, wire
from seal_jax.tasks import squad


def all_right(items):
    return [True] * len(items)


def task_of(contexts, judge=all_right, **changes):
    return squad.make(contexts, config.Task(**changes), judge)


def toy(title="T", questions=1):
    asked = [{"question": f"{title}{i}?", "answer": f"{title}{i}"} for i in range(questions)]
    return squad.from_entries([{"title": title, "context": "P.", "questions": asked}], "toy")[0]


def canned(requests, replies, seen):
    """An engine's answer from a recording; what was asked is kept in `seen`."""
    seen.extend(requests)
    return [wire.read_reply(reply) for reply in replies]


def assert_close(made, expected, where=""):
    """Equal structure and texts; floats to 12 digits, for both sides sum in their own order."""
    if isinstance(expected, dict):
        assert list(made) == list(expected), where
        for key in expected:
            assert_close(made[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(made) == len(expected), where
        for i, (a, b) in enumerate(zip(made, expected, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert made == pytest.approx(expected, abs=1e-12), where
    else:
        assert made == expected, where


def lora_of(options, epochs=10):
    lora = config.Lora(rank=options.get("lora_rank", 32))
    inner = config.Inner(learning_rate=options.get("finetune_lr", 1e-3), epochs=epochs)
    return results.lora_params(lora, inner)


# One passage at a time


def query_server_cases():
    folder = shared_data.path("ki_goldens/query_server_replay")
    for path in sorted(folder.glob("*.json*")):
        name = f"ki_goldens/query_server_replay/{path.name.removesuffix('.gz')}"
        content = shared_data.read(name)
        yield from content if isinstance(content, list) else [content]


def test_single_passages_replay_the_reference_s_driver():
    """Goldens of `query_server_replay`: every request, then the whole result file."""
    for case in query_server_cases():
        options, expected = case["options"], case["expected_output"]
        contexts = squad.from_entries(case["dataset"], case["id"])
        contexts = contexts[: options["n_articles"] or None]
        task = task_of(contexts, split_newlines=options["split_newlines"])
        self_edits = [inner_loop.candidates(c, options["k_completions"]) for c in contexts]
        seen = []
        articles = single_passage.run(
            task,
            contexts,
            self_edits,
            lambda requests, case=case, seen=seen: canned(requests, case["replies"], seen),
            seeds=options["eval_times"],
            prompts=[context.data.get("prompt", "") for context in contexts],
        )
        lora = lora_of(options)
        rest = wire.settings(lora, options.get("end_mask_substring", ""))
        asked = [wire.request(request) | rest for request in seen]
        assert asked == case["expected_requests"], case["id"]
        made = results.result(
            articles,
            name=options["exp_name"],
            dataset="<path>",
            split_newlines=options["split_newlines"],
            k=options["k_completions"],
            seeds=options["eval_times"],
            lora=lora,
        )
        assert_close(made, expected, case["id"])
        assert json.dumps(made["overall"]) == json.dumps(expected["overall"])


def test_candidates_are_the_first_that_are_not_blank():
    entry = {"title": "T", "context": "C", "questions": []}
    texts = ["", "a", " \n", " b ", "c"]
    full, blank, none, old = squad.from_entries(
        [
            entry | {"completions": texts},
            entry | {"completions": ["", " "]},
            entry,
            entry | {"completion": "x"},
        ],
        "here",
    )
    assert inner_loop.candidates(old, 5) == ["x"]
    assert inner_loop.candidates(full, 2) == ["a", " b "]
    assert inner_loop.candidates(blank, 5) == inner_loop.candidates(none, 5) == [""]
    assert inner_loop.candidates(full, 0) == [""]  # train on the passage alone


def test_requests_name_their_candidate_and_seed():
    context = toy()
    made = single_passage.requests(task_of([context]), context, ["a", "b"], seeds=2)
    assert [(r.candidate, r.seed) for r in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert made[2].texts == ("T\nb", "T\nP.")


def test_replies_that_do_not_match_the_requests_are_refused():
    context = toy()
    nothing = Reply((), (), (), ())
    with pytest.raises(ValueError):
        single_passage.run(task_of([context]), [context], [["a"]], lambda requests: [])
    with pytest.raises(ValueError, match="2 replies to 1 requests"):
        single_passage.run(
            task_of([toy(questions=0)]), [toy(questions=0)], [["a"]], lambda r: [nothing] * 2
        )


# Many passages at once


def test_cpt_replays_the_reference_s_driver():
    for case in shared_data.read("ki_goldens/cpt_replay.json"):
        options, expected = case["options"], case["expected_output"]
        contexts = squad.from_entries(case["dataset"], "cpt")
        contexts = contexts[: options.get("n_articles") or None]
        split = options.get("split_newlines", False)
        seen = []
        request, reply = cpt.run(
            task_of(contexts, split_newlines=split),
            contexts,
            [inner_loop.candidates(c, options["k_completions"]) for c in contexts],
            lambda requests, case=case, seen=seen: canned(requests, [case["reply"]], seen),
            question_limit=options.get("eval_question_limit", 0),
        )
        assert seen == [request]
        lora = lora_of(options, epochs=5)
        asked = wire.request(request) | wire.settings(lora, skip_training=False)
        assert asked == case["expected_request"]
        made = cpt_file.result(
            request,
            reply,
            dataset="<path>",
            n_articles=len(contexts),
            k=options["k_completions"],
            split_newlines=split,
            lora=lora,
        )
        if "eval_question_limit" in options:  # the reference's slices miss the shuffle
            made, expected = dict(made), dict(expected)
            correct, wrong = made.pop("per_article"), expected.pop("per_article")
            assert correct != wrong
        assert_close(made, expected)


def test_sampled_questions_keep_their_own_verdicts():
    contexts = [toy("A", questions=3), toy("B", questions=3)]
    task = task_of(contexts, lambda items: [gold == text for _, gold, text in items])
    made = cpt.request(task, contexts, [["x"], ["y"]], question_limit=4)
    answers = [f"{a.context.title}{a.index}" if a.index else "wrong" for a in made.asked]
    assert inner_loop.verdicts(task, made.asked, answers) == tuple(a.index > 0 for a in made.asked)
    reply = inner_loop.reply(task, made, ["wrong"] * 4, answers)
    content = cpt_file.result(
        made, reply, dataset="d", n_articles=2, k=1, split_newlines=True, lora={}
    )
    for title, verdicts in content["per_article"].items():
        mine = [a.index > 0 for a in made.asked if a.context.title == title]
        assert verdicts["adapter_correct"] == mine


# Continual self-edits


def continual_engine(case, log):
    """Plays a recording of one sequence after the other; `log` keeps what was asked of it."""
    texts = iter(case["self_edit_generations"])
    verdicts = iter(case["requests_in_order"])

    def serve(request):
        golden = next(verdicts)
        right = golden["canned_adapter_correct"]
        log["requests"].append((wire.request(request), golden))
        return right

    def write(models, prompts):
        made = []
        for model, prompt in zip(models, prompts, strict=True):
            golden = next(texts)
            log["writers"].append(model)
            log["prompts"].append((prompt, golden))
            made.append(golden["canned_text"])
        return made

    def answer(models, requests):
        log["answerers"] += models
        return [serve(request) for request in requests]

    def edit(models, requests):
        edited = []
        for model, request in zip(models, requests, strict=True):
            edited.append(f"merged_seq{log['sequence']}_step{request.candidate}")
            log["merges"].append([model, edited[-1]])
        return edited, [serve(request) for request in requests]

    return continual.Engine(write, answer, edit)


def test_continual_self_edits_replay_the_reference_s_driver():
    for case in shared_data.read("ki_goldens/continual_driver.json"):
        contexts = squad.from_entries(case["dataset"], "continual")
        n = case["n_datapoints"]
        sequences = squad.sample_sequences(contexts, case["n_sequences"], n, case["seed"])
        log = {"requests": [], "writers": [], "prompts": [], "answerers": [], "merges": []}
        engine = continual_engine(case, log)
        matrices = []
        for i, sequence in enumerate(sequences):  # the recording has one after the other
            log["sequence"] = i
            (outcome,) = continual.run(task_of(contexts), [sequence], engine, "BASE")
            matrices.append(outcome.matrix)
            assert outcome.model == f"merged_seq{i}_step{n - 1}"
        for made, golden in log["requests"]:
            assert made["train_sequences"] == golden["train_sequences"]
            # The recording shows the list as it had grown by the end of the sequence.
            count = len(golden["canned_adapter_correct"])
            assert made["eval_questions"] == golden["eval_questions"][:count]
        assert len(log["requests"]) == len(case["requests_in_order"])
        for prompt, golden in log["prompts"]:
            assert [prompt] == golden["prompt"]
        assert log["merges"] == case["merges"]
        spawned = [spawn["model"] for spawn in case["vllm_spawns"]]
        bases = [m for m, s in zip(spawned, case["vllm_spawns"], strict=True) if "base" in s["tag"]]
        writers = [
            m for m, s in zip(spawned, case["vllm_spawns"], strict=True) if "step" in s["tag"]
        ]
        assert log["writers"] == writers
        assert log["answerers"] == [base for base in bases for _ in range(n)]
        made = continual_file.summary(matrices, "ds.json", "BASE")
        assert_close(made, case["expected_summary"])


def test_sequences_in_step_give_what_they_give_alone():
    contexts = [toy(name) for name in "ABCD"]
    task = task_of(contexts)

    def serve(request):
        return [len(item.context.title + text) % 2 == 0 for item in request.asked for text in "x"]

    engine = continual.Engine(
        write=lambda models, prompts: [
            f"{m} {p[-20:]}" for m, p in zip(models, prompts, strict=True)
        ],
        answer=lambda models, requests: [serve(r) for r in requests],
        edit=lambda models, requests: (
            [(m, r.texts) for m, r in zip(models, requests, strict=True)],
            [serve(r) for r in requests],
        ),
    )
    sequences = [contexts[:2], contexts[2:]]
    together = continual.run(task, sequences, engine, "BASE")
    assert together == [continual.run(task, [s], engine, "BASE")[0] for s in sequences]
    with pytest.raises(ValueError, match="differ in length"):
        continual.run(task, [contexts[:1], contexts[:2]], engine, "BASE")
