"""One inner loop: prompts, grading and replies of the reference's server, and our errors."""

import pytest
import shared_data

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.evals import inner_loop, settings, single_passage
from seal_jax.evals.inner_loop import Reply
from seal_jax.formats import wire
from seal_jax.tasks import Grade, grading, squad


def all_right(items):
    return [True] * len(items)


def task_of(contexts, judge=all_right, **changes):
    return squad.make(contexts, config.Task(**changes), judge)


def toy(title="T", questions=1):
    asked = [{"question": f"{title}{i}?", "answer": f"{title}{i}"} for i in range(questions)]
    return squad.from_entries([{"title": title, "context": "P.", "questions": asked}], "toy")[0]


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
    return inner_loop.Request(
        inner_loop.documents(content["train_sequences"]), inner_loop.asked(task, [context])
    )


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
        assert wire.reply(reply) == expected["reply"], case["id"]
        assert wire.read_reply(expected["reply"]) == reply
        assert asked == [call["prompts"] for call in expected["generate_calls"]]
        assert graded == expected["grade_prompts_in_order"]


def test_settings_of_a_request_are_read_with_the_reference_s_defaults():
    for case in shared_data.read("ki_goldens/ttt_server_protocol.json")["cases"]:
        content, expected = case["request"], case["expected"]
        if dropout := expected["lora_config"]["lora_dropout"]:
            with pytest.raises(SealError, match=f"lora_dropout={dropout}"):
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
    nothing = inner_loop.Request(inner_loop.documents(["T\nx"]), ())
    engine = inner_loop.one_by_one(task_of([empty]), fail, fail)
    assert wire.reply(engine([nothing])[0]) == special["no_questions"]["expected_reply"]
    five = toy(questions=5)
    graded = []
    task = task_of([five], lambda items: graded.extend(items) or all_right(items))
    bare = inner_loop.Request(inner_loop.documents([]), inner_loop.asked(task, [five]))
    engine = inner_loop.one_by_one(task, lambda prompts: ["ok"] * len(prompts), fail)
    expected = special["base_only_empty_sequences"]["expected_reply"]
    assert wire.reply(engine([bare])[0]) == expected
    assert len(graded) == 5  # nothing was trained: the same answers are not graded again
    trained = bare._replace(edit=inner_loop.documents(["T\nx"]))
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


def test_a_task_may_ask_other_questions_than_its_passages_come_with():
    """Two phrasings of each, say, and grade them together."""
    context = toy(questions=2)
    task = task_of([context], lambda items: [bool(answer.strip()) for _, _, answer in items])
    both = lambda own: [q for q in task.questions(own) for _ in range(2)]
    grade = lambda own, answers: Grade(1.0, tuple(answer == "yes" for answer in answers))
    twice = task._replace(questions=both, grade=grade)
    asked = inner_loop.asked(twice, [context])
    answers = ["yes", "no", "no", "yes"]
    assert inner_loop.verdicts(twice, asked, answers) == (True, False, False, True)
    assert inner_loop.verdicts(twice, asked[3:], ["yes"]) == (True,)
    voted = twice._replace(grade=lambda own, answers: Grade(1.0, (True,)))
    with pytest.raises(SealError, match="grade returned 1 verdicts on 4 answers"):
        inner_loop.verdicts(voted, asked, answers)
    row = {"context": context.id, "answers": ["a", "b"], "verdicts": [0, 1]}
    assert settings.one_each([context], [row])
    assert not settings.one_each([context], [row | {"answers": answers}])
    assert not settings.one_each([context], [row | {"verdicts": [1]}])
