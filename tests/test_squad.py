"""Knowledge incorporation as text: prompts, training texts and selection equal the goldens."""

import gzip
import hashlib
import json

import pytest
import shared_data

from seal_jax import config, files
from seal_jax.errors import SealError
from seal_jax.tasks import Example, arc, grading, squad

ENTRY = {"title": "T", "context": "C", "questions": [{"question": "Q?", "answer": "A"}]}


def right_if_equal(items):
    return [gold == answer for _, gold, answer in items]


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


# Prompts


def test_prompts_are_the_reference_s():
    for case in shared_data.read("ki_goldens/make_prompt.jsonl"):
        style = "implications" if case["prompt_key"] == "openai" else case["prompt_key"]
        made = squad.prompt(case["title"], case["context"], style, case["instruct_model"])
        assert made == case["expected"], case["id"]


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("eval/base_val", "implications"),
        ("eval/alternate_prompts/base/base_val_prompt-long", "implications-long"),
        ("train/alternate_prompts/iter0_train_prompt-very-long", "implications-very-long"),
        ("train/alternate_prompts/iter0_train_prompt-rewrite", "rewrite"),
        ("train/alternate_prompts/iter0_train_prompt-self-qa", "self-qa"),
    ],
)
def test_prompts_are_those_that_published_self_edits_answered(name, style):
    for entry in shared_data.read(f"ki_inputs/synthetic_data/{name}.json"):
        assert squad.prompt(entry["title"], entry["context"], style) == entry["prompt"]


def test_every_style_shows_the_passage_in_its_own_prompt():
    made = {style: squad.prompt("Title", "Passage.", style) for style in squad.STYLES}
    assert len(set(made.values())) == len(squad.STYLES)
    assert all("Passage." in text for text in made.values())
    assert set(squad.STYLES) == set(config.Task.__annotations__["style"].__args__)


def test_an_unknown_style_is_refused_by_name():
    with pytest.raises(SealError, match="'haiku'.*implications"):
        squad.prompt("T", "P", "haiku")
    with pytest.raises(SealError, match="compact.*chat"):
        squad.prompt("T", "P", "compact", chat=True)
    with pytest.raises(SealError, match="compact.*chat"):
        squad.answer_prompt("T", "Q?", chat=True, style="compact")


def test_answer_prompts_are_the_reference_s():
    for case in shared_data.read("ki_goldens/answer_and_grade_prompts.json"):
        for i, item in enumerate(case["eval_questions"]):
            bare = item["question"].removeprefix(f"Topic: {item['title']}\n")
            assert grading.topic(item["title"], bare) == item["question"]
            assert squad.answer_prompt(item["title"], bare) == case["answer_prompts"][i]
            chat = squad.answer_prompt(item["title"], bare, chat=True)
            assert chat == case["answer_prompts_instruct"][i]


# Training texts


@pytest.mark.parametrize("name", ["build_train_sequences", "build_train_sequences_odd"])
def test_training_texts_are_the_reference_s(name):
    for case in shared_data.read(f"ki_goldens/{name}.jsonl"):
        texts = squad.training_texts(
            case["completion"], case["context"], case["title"], case["split_newlines"]
        )
        assert texts == case["expected"], case["id"]


def test_odd_questions_lines_and_thoughts_are_split_as_the_reference_does():
    """By the reference's public code; a self-edit of Qwen2.5-7B begins as the first does."""
    split = lambda text, **style: [x[2:] for x in squad.training_texts(text, "P.", "T", **style)]
    asked = "Question: Who?\n\nAnswer: I\n\nQuestion 2:  Question: Why?\nAnswer: So"
    first, second = asked.split("\nQ")
    assert split(asked) == [first, f"Q{second}", "P."]
    assert split("Questions\nQuestion 1: Who?\nAnswer: I")[0] == "Questions"
    assert split("Who?\nAnswer: I\nQuestion 2: Why?\nAnswer: So")[0].startswith("Question 1: Who?")
    assert split("One.\u2028Two.\x0cThree.\x85Four.") == ["One.", "Two.", "Three.", "Four.", "P."]
    thought = "It says so.\nHence.\nImplications:\n 1. One.\n2. Two.\nImplications:\nThree."
    style = "implications-chain-of-thought"
    assert split(thought, style=style) == ["1. One.", "2. Two.", "Implications:", "Three.", "P."]
    assert split("No list.\nAt all.", style=style) == ["No list.", "At all.", "P."]
    assert split(thought)[0] == "It says so."


def test_numbers_of_training_texts_add_up():
    """Where this copy holds a whole data set; a slice of it stays below every total."""
    totals = shared_data.read("ki_goldens/build_train_sequences_totals.json")
    for name, expected in totals.items():
        file, mode = name.split("|")
        counts = [
            len(squad.training_texts(text, entry["context"], entry["title"], mode == "split"))
            for entry in shared_data.read(f"ki_inputs/synthetic_data/{file}")
            for text in entry["completions"]
        ]
        made = {
            "n_completions": len(counts),
            "total_sequences_incl_context": sum(counts),
            "max_sequences": max(counts),
        }
        if len(counts) == expected["n_completions"]:
            assert made == expected, name
        else:
            assert all(made[key] <= expected[key] for key in expected), name


def test_compact_texts_are_the_lines_and_the_passage_without_title():
    texts = squad.training_texts("Sure:\n1. One.\n\n Two. \n", "P.", "T", style="compact")
    assert texts == ["Sure:", "1. One.", "Two.", "P."]
    assert squad.answer_prompt("T", "Who?", style="compact") == "Question: Who? Answer:"
    assert squad.prompt("T", "P.", style="compact") == "Passage: P.\nImplications:\n"


# Selection


def test_selection_is_the_reference_s():
    for case in shared_data.read("ki_goldens/selection_seed42.json"):
        indices = squad.select(range(case["N"]), case["start"], case["n"])
        assert len(indices) == case["count"]
        digest = hashlib.sha256(json.dumps(indices).encode()).hexdigest()
        assert digest == case["sha256_of_json"]
        assert indices[: len(case.get("indices", []))] == case.get("indices", [])


def test_sampled_sequences_are_the_reference_s():
    for case in shared_data.read("ki_goldens/continual_sampling.json"):
        made = squad.sample_sequences(
            range(case["N"]), case["n_sequences"], case["n_datapoints"], case["seed"]
        )
        assert made == case["indices"]


def test_question_limit_is_the_reference_s():
    for case in shared_data.read("ki_goldens/cpt_question_limit.json"):
        assert squad.limit_questions(range(case["n_questions"]), case["limit"]) == case["indices"]


# Files


def test_contexts_keep_what_a_file_with_completions_says():
    path = shared_data.path("ki_inputs/synthetic_data/eval/base_val.json")
    entries = shared_data.read("ki_inputs/synthetic_data/eval/base_val.json")
    contexts = squad.load(path)
    assert [c.title for c in contexts] == [e["title"] for e in entries]
    assert [c.data["completions"] for c in contexts] == [e["completions"] for e in entries]
    assert len({c.id for c in contexts}) == len(contexts)


def test_squad_s_own_file_reads_as_seal_s(tmp_path):
    """SEAL's file is SQuAD's dev set: undo its flattening, and both read alike."""
    entries = shared_data.read("ki_inputs/squad_val.json")[:30]
    articles = {}
    for entry in entries:
        qas = [
            {"question": q["question"], "answers": [{"text": q["answer"]}, {"text": "other"}]}
            for q in entry["questions"]
        ]
        title = entry["title"].replace(" ", "_")
        article = articles.setdefault(title, {"title": title, "paragraphs": []})
        article["paragraphs"].append({"context": entry["context"], "qas": qas})
    own = write(tmp_path / "dev.json", {"version": "1.1", "data": list(articles.values())})
    assert squad.load(own) == squad.load(write(tmp_path / "seal.json", entries))


def test_rows_of_a_data_set_read_as_seal_s(tmp_path):
    """The hub's rows hold one question each; a local file of them needs no network."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"title": "A_b", "context": "C1", "question": f"Q{i}", "answers": {"text": [f"G{i}", "x"]}}
        for i in range(2)
    ]
    rows.append({"title": "A_b", "context": "C2", "question": "Q", "answers": {"text": ["G"]}})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = squad.load(path)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert squad.load(tmp_path / "rows.parquet") == [first, second]
    assert (first.title, first.passage, second.passage) == ("A b", "C1", "C2")
    assert [(q.text, q.gold) for q in first.questions] == [("Q0", "G0"), ("Q1", "G1")]


def test_lines_of_passages_are_text_whatever_it_says(tmp_path):
    """A reader that infers types makes times of titles and answers that are all dates."""
    asked = [{"question": "When?", "answer": "2016-02-07"}]
    rows = [{"title": "1999-01-01", "context": "One.\u2028Two.", "questions": asked}, ENTRY]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    expected = squad.from_entries(rows, "here")
    assert squad.load(tmp_path / "rows.jsonl") == expected
    assert squad.load(tmp_path / "rows.jsonl.gz") == expected
    (tmp_path / "bad.jsonl").write_text(json.dumps(ENTRY) + "\n{\n")
    with pytest.raises(SealError, match="bad.jsonl, line 2: not valid JSON"):
        squad.load(tmp_path / "bad.jsonl")
    packed = bytearray(gzip.compress(json.dumps([ENTRY] * 99).encode()))
    packed[20] ^= 255
    (tmp_path / "torn.json.gz").write_bytes(packed)
    with pytest.raises(SealError, match="torn.json.gz: not a readable"):
        squad.load(tmp_path / "torn.json.gz")


def test_ids_are_stable_and_unique_even_for_equal_passages(tmp_path):
    other = ENTRY | {"title": "U"}
    one = squad.load(write(tmp_path / "one.json", [ENTRY, other, ENTRY]))
    two = squad.load(write(tmp_path / "two.json", [other, ENTRY]))
    assert len({c.id for c in one}) == 3
    assert [one[0].id, one[1].id] == [two[1].id, two[0].id]
    packed = tmp_path / "three.json.gz"
    packed.write_bytes(gzip.compress(json.dumps([other, ENTRY]).encode()))
    assert squad.load(packed) == two


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "line 1: not valid JSON"),
        ('{"passages": []}', "list of passages"),
        ("[]", "no passage"),
        ('["text"]', "entry 0: expected an object"),
        (json.dumps([ENTRY, {"title": "T", "context": "C"}]), "entry 1: no 'questions'"),
        (json.dumps([ENTRY | {"context": None}]), "entry 0: 'context' is not text"),
        (json.dumps([ENTRY | {"context": " "}]), "entry 0: the context is blank"),
        (json.dumps([ENTRY | {"title": "\ud800"}]), "entry 0: 'title' is not text: half of a"),
        ("[" * 100_000, "not valid JSON"),
        ("[" + "1" * 5000 + "]", "not valid JSON"),
        (
            json.dumps([ENTRY | {"questions": [{"question": "Q"}]}]),
            "entry 0, question 0: no 'answer'",
        ),
        (
            json.dumps([{"title": "T", "context": "C", "question": "Q", "answers": {"text": "A"}}]),
            "row 0: expected answers with a list of texts",
        ),
        (
            json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "C"}]}]}),
            "article 0, paragraph 0: no 'qas'",
        ),
        (
            json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "C", "qas": ["Q?"]}]}]}),
            "article 0, paragraph 0, question 0: expected an object",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_entry(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(SealError, match=message) as caught:
        squad.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    """No shell expands it in `task.path=~/data.json`, nor in a configuration file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data.json", [ENTRY])
    assert squad.load("~/data.json") == squad.load(tmp_path / "data.json")
    assert files.path("~/runs") == tmp_path / "runs"
    puzzle = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1]]}]}
    (tmp_path / "arc.json").write_text("\ufeff" + json.dumps({"a": puzzle}), encoding="utf-8")
    assert len(arc.load("~/arc.json")) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SealError, match="no such file"):
        squad.load("")
    with pytest.raises(SealError, match="none.json: no such file"):
        squad.load(tmp_path / "none.json")


# The task


def settings(tmp_path, n=4, **changes):
    entries = [ENTRY | {"title": f"T{i}"} for i in range(n)]
    return config.Task(path=write(tmp_path / "data.json", entries), **changes)


def test_the_task_asks_splits_and_questions_in_its_style(tmp_path):
    task = squad.task(settings(tmp_path, order_seed=None), right_if_equal)
    context = task.contexts[0]
    assert task.prompt(context) == squad.prompt("T0", "C")
    assert task.edit(context, "a\nb").examples == (
        Example("T0\na"),
        Example("T0\nb"),
        Example("T0\nC"),
    )
    assert [tuple(q) for q in task.questions(context)] == [
        (squad.answer_prompt("T0", "Q?"), "A", "Q?")
    ]
    whole = squad.task(settings(tmp_path, order_seed=None, split_newlines=False), right_if_equal)
    assert whole.edit(context, "a\nb").examples[0] == Example("T0\na\nb")


def test_blank_answers_are_wrong_without_asking_the_judge(tmp_path):
    task = squad.task(settings(tmp_path), lambda items: [True] * len(items))
    assert task.grade(task.contexts[0], [" \n"]).reward == 0.0
    assert task.grade(task.contexts[0], ["x"]) == (1.0, (True,))


def test_only_judges_that_are_models_see_the_topic(tmp_path):
    for judge, seen in (("offline", "Q?"), ("openai", "Topic: T0\nQ?")):
        asked = []

        def spy(items, asked=asked):
            asked.extend(items)
            return [True] * len(items)

        task = squad.task(settings(tmp_path, order_seed=None, judge=judge), spy)
        task.grade(task.contexts[0], ["x"])
        assert asked == [(seen, "A", "x")]


def test_held_out_passages_are_never_trained_on(tmp_path):
    task = squad.task(settings(tmp_path, n=9, size=3), right_if_equal)
    assert (len(task.contexts), len(task.held_out)) == (3, 6)
    both = settings(tmp_path, n=9, size=3)
    with_file = squad.task(
        config.Task(path=both.path, size=3, held_out=both.path, order_seed=7), right_if_equal
    )
    for made in (task, with_file):
        assert not {c.id for c in made.contexts} & {c.id for c in made.held_out}
    with pytest.raises(SealError, match="also trained on"):
        squad.task(config.Task(path=both.path, held_out=both.path), right_if_equal)


def test_equal_passages_are_on_one_side(tmp_path):
    entry = lambda i: {"title": f"T{i}", "context": f"Passage {i}.", "questions": []}
    path = tmp_path / "passages.json"
    path.write_text(json.dumps([entry(i % 5) for i in range(10)]))
    for size in (1, 4, 9):
        made = squad.task(config.Task(name="squad", path=str(path), size=size))
        said = lambda contexts: {(x.title, x.passage) for x in contexts}
        assert said(made.contexts) and not said(made.contexts) & said(made.held_out)
        other = config.Task(name="squad", path=str(path), size=size, held_out=str(path))
        if size < 9:
            made = squad.task(other)
            assert not said(made.contexts) & said(made.held_out)


def test_equal_paragraphs_of_squad_s_own_file_are_one_passage(tmp_path):
    asked = lambda text: {"question": text, "answers": [{"text": "a"}]}
    paragraphs = [{"context": "P.", "qas": [asked("1?")]}, {"context": "P.", "qas": [asked("2?")]}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    (only,) = squad.load(str(path))
    assert [q.text for q in only.questions] == ["1?", "2?"]


def test_rows_of_questions_may_stand_in_a_json_file(tmp_path):
    row = lambda q: {"title": "T", "context": "P.", "question": q, "answers": {"text": ["a"]}}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("1?"), row("2?")]))
    (only,) = squad.load(str(path))
    assert [(q.text, q.gold) for q in only.questions] == [("1?", "a"), ("2?", "a")]


def test_one_passage_may_stand_without_a_list(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"title": "T", "context": "P.", "questions": []}))
    assert [x.passage for x in squad.load(str(path))] == ["P."]


def test_the_order_of_contexts_is_the_reference_s_selection(tmp_path):
    made = squad.task(settings(tmp_path, n=20), right_if_equal)
    expected = squad.select([f"T{i}" for i in range(20)], 0, 0, 42)
    assert [c.title for c in made.contexts] == expected


def test_passages_without_a_question_are_neither_trained_on_nor_held_out(tmp_path, capsys):
    """There is no reward for them. Where no passage has a question, all stay."""
    blank = [ENTRY | {"title": f"B{i}", "questions": []} for i in range(3)]
    asked = [ENTRY | {"title": f"T{i}"} for i in range(4)]
    mixed = config.Task(path=write(tmp_path / "mixed.json", [*blank, *asked]), size=2)
    task = squad.task(mixed, right_if_equal)
    titles = {context.title for context in (*task.contexts, *task.held_out)}
    assert titles == {"T0", "T1", "T2", "T3"} and len(task.contexts) == 2
    assert "mixed.json: 3 passages without a question left out" in capsys.readouterr().err
    none = config.Task(path=write(tmp_path / "none.json", blank), size=2)
    assert len(squad.task(none, right_if_equal).contexts) == 2
