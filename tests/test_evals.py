"""The three evaluations over canned inner loops: the reference's requests, records, summaries."""

import json

import pytest
import shared_data

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.evals import continual, cpt, inner_loop, single_passage
from seal_jax.evals.inner_loop import Reply
from seal_jax.formats import continual as continual_file
from seal_jax.formats import cpt as cpt_file
from seal_jax.formats import results, wire
from seal_jax.tasks import grading, squad


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


# One inner loop


def model_judge(replies, seen):
    """A judge that asks a model, here one that looks replies up by the grading prompt."""

    def judge(items):
        prompts = [grading.prompt(*item) for item in items]
        seen.extend(prompts)
        return [grading.parse_yes_no(replies[prompt]) for prompt in prompts]

    return judge


def request_of(task, content):
    """Returns a request of the reference as ours; its questions bear their topic already."""
    (context,) = task.contexts
    return inner_loop.Request(tuple(content["train_sequences"]), inner_loop.asked(task, [context]))


def context_of(content):
    questions = [
        {
            "question": q["question"].removeprefix(f"Topic: {q['title']}\n"),
            "answer": q["answer"],
        }
        for q in content["eval_questions"]
    ]
    first = content["eval_questions"][0]
    entry = {"title": first["title"], "context": first["context"], "questions": questions}
    return squad.from_entries([entry], "request")[0]


def test_one_inner_loop_replays_the_reference_s_server():
    """Goldens of `ttt_server_protocol`: prompts, grading prompts in order, and the reply."""
    for case in shared_data.read("ki_goldens/ttt_server_protocol.json")["cases"]:
        content, expected = case["request"], case["expected"]
        graded, asked = [], []
        judge = model_judge(case["verdict_text_by_grade_prompt"], graded)
        task = squad.make([context_of(content)], config.Task(judge="openai"), judge)
        request = request_of(task, content)
        assert wire.request(request) == {
            key: content[key] for key in ("train_sequences", "eval_questions")
        }

        def answering(texts, asked=asked):
            return lambda prompts: asked.append(prompts) or texts

        engine = inner_loop.one_by_one(
            task,
            answering(case["baseline_generated"]),
            lambda request, case=case: answering(case["adapter_generated"]),
        )
        (reply,) = engine([request])
        assert_close(wire.reply(reply), expected["reply"], case["id"])
        assert wire.read_reply(expected["reply"]) == reply
        assert asked == [call["prompts"] for call in expected["generate_calls"]]
        assert graded == expected["grade_prompts_in_order"]


def test_settings_of_a_request_are_read_with_the_reference_s_defaults():
    for case in shared_data.read("ki_goldens/ttt_server_protocol.json")["cases"]:
        content, expected = case["request"], case["expected"]
        if expected["lora_config"]["lora_dropout"]:
            with pytest.raises(SealError, match="lora_dropout=0.1"):
                wire.read_settings(content)
            content = content | {"lora_dropout": 0}
        lora, inner = wire.read_settings(content)
        assert lora.rank == expected["lora_config"]["r"]
        assert lora.alpha == expected["lora_config"]["lora_alpha"]
        trainer = expected["trainer_arguments"]
        assert inner.epochs == trainer["num_train_epochs"]
        assert inner.learning_rate == trainer["learning_rate"]
        accumulated = trainer["gradient_accumulation_steps"]
        assert inner.batch_size == trainer["per_device_train_batch_size"] * accumulated


def test_special_requests_end_as_in_the_reference_or_as_errors():
    """Failures: the reference counts them as wrong answers; a failed call is an error here."""
    special = {
        case["id"].split(" ")[0]: case
        for case in shared_data.read("ki_goldens/ttt_server_protocol.json").get("special", [])
    }
    if not special:
        pytest.skip("this copy of the reference data has no special requests")
    empty = toy(questions=0)
    nothing = inner_loop.Request(("T\nx",), ())
    engine = inner_loop.one_by_one(task_of([empty]), fail, fail)
    assert wire.reply(engine([nothing])[0]) == special["no_questions"]["expected_reply"]
    five = toy(questions=5)
    graded = []
    task = task_of([five], lambda items: graded.extend(items) or all_right(items))
    bare = inner_loop.Request((), inner_loop.asked(task, [five]))
    engine = inner_loop.one_by_one(task, lambda prompts: ["ok"] * len(prompts), fail)
    expected = special["base_only_empty_sequences"]["expected_reply"]
    assert wire.reply(engine([bare])[0]) == expected
    assert len(graded) == 5  # nothing was trained: the same answers are not graded again
    trained = bare._replace(texts=("T\nx",))
    with pytest.raises(RuntimeError, match="boom"):
        engine([trained])
    with pytest.raises(SealError, match="RuntimeError: boom"):
        wire.read_reply(special["training_raises"]["expected_reply"])
    failing = task_of([five], lambda items: fail())
    engine = inner_loop.one_by_one(failing, lambda prompts: ["ok"] * len(prompts), fail)
    with pytest.raises(RuntimeError, match="boom"):
        engine([bare])


def fail(*_):
    raise RuntimeError("boom")


def test_the_un_adapted_model_answers_once_for_all_self_edits_of_a_passage():
    context = toy(questions=2)
    task = task_of([context])
    asked = []

    def base(prompts):
        asked.append(prompts)
        return ["b"] * len(prompts)

    engine = inner_loop.one_by_one(
        task, base, lambda request: lambda p: [request.texts[0]] * len(p)
    )
    requests = single_passage.requests(task, context, ["x", "y"], seeds=3)
    replies = engine(requests)
    assert len(asked) == 1 and len(replies) == 6
    assert [reply.adapter_texts[0] for reply in replies] == ["T\nx"] * 3 + ["T\ny"] * 3


def test_a_reply_with_too_few_verdicts_is_refused():
    content = wire.reply(Reply(("a",), ("b",), (True,), (False,)))
    assert wire.read_reply(content).adapter_correct == (False,)
    with pytest.raises(SealError, match="differ in number"):
        wire.read_reply(content | {"adapter_correct": []})
    with pytest.raises(SealError, match="no 'baseline_texts'"):
        wire.read_reply({})
