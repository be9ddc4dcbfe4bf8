"""The reference's files: read, recomputed from their records, and written to the byte."""

import gzip
import json

import pytest
import shared_data

from seal_jax import config
from seal_jax.errors import SealError
from seal_jax.formats import continual, cpt, files, results, sft, synthetic, wire
from seal_jax.tasks import squad


def number(value):
    """Floats are compared to 12 digits: both sides sum in their own order."""
    return pytest.approx(value, abs=1e-12)


def content_of(path):
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def result_files():
    """Returns the golden `overall` blocks whose result file is in this copy of the data."""
    for case in shared_data.read("ki_goldens/stats_overall.json"):
        yield case, shared_data.path(f"ki_inputs/{case['file']}")


# Result files of single passages


def test_overall_blocks_follow_from_their_records():
    for case, path in result_files():
        content = results.read(path)
        made = [results.recompute(content)]
        if case["has_question_records"]:
            made.append(results.recompute(content, from_questions=True))
        for block in made:
            for key, stated in case["stated_overall"].items():
                if stated is not None:  # one old file states no deviations
                    assert block[key] == stated, (case["file"], key)


def test_every_statistic_of_a_result_file_follows_from_its_verdicts():
    for case, path in result_files():
        for article in results.read(path)["articles"] if case["has_question_records"] else []:
            for entry in article["completions"]:
                assert results.stats_of_records(entry["questions"]) == number(entry["stats"])
            made = results.article_stats([entry["stats"] for entry in article["completions"]])
            assert made == number(article["stats"])


def test_a_result_file_is_written_as_it_was_read(tmp_path):
    for _, path in result_files():
        results.write(tmp_path / "run.json", results.read(path))
        assert (tmp_path / "run.json").read_text(encoding="utf-8") == content_of(path)


def test_statistics_round_each_run_then_the_exact_mean():
    thirds = results.completion_stats([[True, False, False]] * 2, [[True] * 3, [False] * 3])
    assert thirds["baseline_mean"] == 0.3333 and thirds["gain_mean"] == number(0.1667)
    uneven = results.completion_stats([[True, False, False], [False] * 3], [[True] * 3] * 2)
    assert uneven["baseline_mean"] == number(0.16665) and uneven["gain_mean"] == number(0.83335)
    one = results.completion_stats([[True]], [[False]])
    assert one["adapter_std"] == 0.0 and one["gain_mean"] == -1.0
    assert results.accuracy([]) == 0.0
    block = results.overall([[thirds], [one, one, one]])
    assert block["adapter_mean_accuracy"] == 0.25  # passages weigh the same
    assert block["mean_adapter_std_within_completions"] == round(0.5**0.5 / 4, 4)  # self-edits


def test_the_gain_of_a_run_is_the_difference_of_its_means():
    """Of a passage it is the mean of gains that were each rounded, as in the reference."""
    thirds = results.completion_stats([[True, False, False]], [[True, True, False]])
    assert results.article_stats([thirds])["mean_gain"] == 0.3333
    block = results.overall([[thirds]])
    assert block["mean_gain"] == 0.3334  # .6667 - .3333


def test_a_run_without_passages_has_statistics_of_0():
    assert set(results.overall([]).values()) == {0.0} and len(results.overall([])) == 7


def test_a_passage_without_questions_has_statistics_of_0():
    assert set(results.stats_of_records([]).values()) == {0.0}


def test_missing_statistics_stay_missing():
    old = {"baseline_mean": 0.5, "adapter_mean": 0.5, "gain_mean": 0.0}
    assert results.overall([[old], [old]])["mean_adapter_std_within_completions"] is None
    assert results.overall([[old], [old]])["adapter_mean_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("articles"), "run.json: no 'articles'"),
        (lambda c: c["articles"][0].pop("title"), "article 0: no 'title'"),
        (lambda c: c["articles"][0]["completions"].append(3), "completion 1: expected an object"),
        (
            lambda c: c["articles"][0]["completions"][0]["stats"].update(adapter_mean="x"),
            "article 0, completion 0: 'adapter_mean' is not a number",
        ),
    ],
)
def test_a_bad_result_file_is_named_with_its_entry(tmp_path, change, message):
    stats = {"baseline_mean": 0.5, "adapter_mean": 0.5, "gain_mean": 0.0}
    entry = {"title": "T", "completions": [{"text": "x", "stats": stats}]}
    content = {"overall": {}, "articles": [entry]}
    change(content)
    results.write(tmp_path / "run.json", content)
    with pytest.raises(SealError, match=message):
        results.read(tmp_path / "run.json")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(SealError, match="none.json: no such file"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json.gz").write_bytes(b"not gzip")
    with pytest.raises(SealError, match="bad.json.gz"):
        files.read_json(tmp_path / "bad.json.gz")
    (tmp_path / "bad.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(SealError, match="bad.json, line 3"):
        files.read_json(tmp_path / "bad.json")


# ReST-EM's training set


def test_sft_files_are_the_reference_s_to_the_byte(tmp_path):
    """`ki_goldens/sft/REPORT.json` says which rank file each committed training set came from."""
    folder = shared_data.path("ki_goldens/sft/REPORT.json").parent
    for case in shared_data.read("ki_goldens/sft/REPORT.json"):
        path = shared_data.path(f"ki_inputs/{case['input']}")
        content = results.read(path)
        tag = path.name.removeprefix("rank_").removesuffix(".gz").removesuffix(".json")
        expected = sorted(folder.glob(f"{tag}__sft_best*.gz"))
        assert expected, tag
        for golden in expected:
            name = golden.name.removeprefix(f"{tag}__").removesuffix(".gz")
            k = int(name.removeprefix("sft_best").split("of")[0])
            assert sft.file_name(content, k) == name
            sft.write(tmp_path / name, sft.rows(content, k))
            assert (tmp_path / name).read_bytes() == gzip.decompress(golden.read_bytes())
        assert case["out_name"] == sft.file_name(content)
        assert case["rows"] == len(sft.rows(content))


def test_ties_and_blank_self_edits_are_settled_as_the_reference_does():
    for case in shared_data.read("ki_goldens/sft/synthetic.json"):
        assert sft.rows(case["input"], case["k_best"]) == case["expected_rows"]
        assert sft.file_name(case["input"], case["k_best"]) == case["expected_name"]


def test_the_name_of_rows_counts_the_first_passage_s_self_edits():
    """By the reference's public code."""
    one = {"text": "x", "stats": {"adapter_mean": 1.0}}
    articles = [{"prompt": "P", "completions": [one] * n} for n in (2, 5)]
    assert sft.file_name({"timestamp": "T", "articles": articles}) == "sft_best1of2_T.jsonl"
    assert sft.file_name({"timestamp": "T", "articles": []}) == "sft_best1of0_T.jsonl"


def test_rows_need_the_prompt_and_the_time_of_the_run():
    old = {"articles": [{"completions": [{"text": "x", "stats": {"adapter_mean": 1.0}}]}]}
    with pytest.raises(SealError, match="article 0: no 'prompt'"):
        sft.rows(old)
    with pytest.raises(SealError, match="no 'timestamp'"):
        sft.file_name(old)


# Data sets with completions


def test_generating_a_data_set_is_the_reference_s_run(tmp_path):
    """`make_squad_data_main.json`: prompts asked, file and settings written, blanks refused."""
    for case in shared_data.read("ki_goldens/make_squad_data_main.json"):
        options, payload = case["options"], case["expected_payload"]
        files.write_json(tmp_path / "data.json", case["dataset"])
        chosen = squad.select(
            squad.load(tmp_path / "data.json"), options.get("start", 0), options["n"]
        )
        style = options.get("prompt_key", "implications")
        chat = options.get("instruct_model", False)
        asked = [squad.prompt(c.title, c.passage, style, chat) for c in chosen]
        assert synthetic.prompts(asked, options["k"]) == payload["prompt"]
        sampling = config.Sampling(
            n=options["k"],
            temperature=options.get("temperature", 1.0),
            max_tokens=options.get("max_tokens", 8192),
        )
        assert sampling.temperature == payload["temperature"]
        assert sampling.top_p == payload["top_p"]
        assert sampling.max_tokens == payload["max_tokens"]
        if case["expected_error"]:
            texts = case["texts_by_index"]
            blank = next(i for i, text in enumerate(texts) if not text.strip())
            i, j = divmod(blank, options["k"])
            with pytest.raises(SealError, match=f"passage {i}: self-edit {j} is blank"):
                synthetic.entries(chosen, asked, texts)
            continue
        made = synthetic.entries(chosen, asked, case["texts_by_index"])
        assert json.dumps(made) == json.dumps(case["expected_output"])  # order of keys, too
        about = synthetic.meta(payload["model"], "in", "out", sampling, len(chosen), "now")
        removed = {"dataset_in", "dataset_out", "timestamp"}
        assert {k: v for k, v in about.items() if k not in removed} == case["expected_meta"]
        synthetic.write(tmp_path / "made.json", made, about)
        again = squad.load(tmp_path / "made.json")
        assert [c.data["completions"] for c in again] == [e["completions"] for e in made]
        assert list(files.read_json(tmp_path / "made.json.meta")) == [
            *("model", "dataset_in", "dataset_out", "temperature", "top_p"),
            *("max_tokens", "n", "k", "timestamp"),
        ]


def test_what_else_an_entry_says_stays_in_the_data_set():
    old = {"title": "T", "context": "C", "questions": [], "completions": ["old"], "id": 7}
    made = synthetic.entries(squad.from_entries([old], "here"), ["P"], [" new "])
    assert made == [old | {"completions": ["new"], "prompt": "P"}]


def test_missing_generations_are_an_error():
    contexts = squad.from_entries([{"title": "T", "context": "C", "questions": []}] * 2, "here")
    with pytest.raises(SealError, match="3 self-edits do not divide among 2 passages"):
        synthetic.entries(contexts, ["P", "P"], ["a", "b", "c"])


# Continual summaries


def test_pooling_runs_gives_the_published_figures():
    golden = shared_data.read("ki_goldens/continual_pooling.json")
    root = shared_data.path("ki_inputs/results/continual_self_edits")
    paths = [path for run in golden["runs"] for path in sorted((root / run).glob("*.json"))]
    if len(paths) < len(golden["runs"]):
        pytest.skip("this copy of the data lacks some runs")
    pooled = continual.pool([continual.read(path) for path in paths])
    assert pooled["n_sequences"] == golden["n_sequences_total"]
    assert {key: pooled[key] for key in golden["metadata"]} == golden["metadata"]
    assert pooled["mean"] == golden["average_mean"]
    by_name = {key.split()[0]: value for key, value in golden.items()}
    assert pooled["average_std"] == by_name["average_std"]
    assert pooled["pooled_std"] == by_name["pooled_std"]


def test_pooled_deviation_is_that_of_all_sequences_together():
    one, two = [[[a], [b]] for a, b in ((0.1, 0.5), (0.3, 0.2))], [[[0.9], [0.4]], [[0.2], [0.2]]]
    runs = [continual.summary(matrices, "d", "m") for matrices in (one, two)]
    together = continual.summary(one + two, "d", "m")
    assert continual.pool(runs)["pooled_std"] == [
        [round(value, 4) for value in row] for row in together["std_over_sequences"]
    ]
    with pytest.raises(SealError, match="cannot be pooled"):
        continual.pool([runs[0], continual.summary(one, "d", "m") | {"n_sequences": 3}])
    with pytest.raises(SealError, match="differ in 'base_model': they cannot be pooled"):
        continual.pool([runs[0], continual.summary(two, "d", "other")])


def test_a_continual_summary_is_written_as_it_was_read(tmp_path):
    root = shared_data.path("ki_inputs/results/continual_self_edits")
    for path in root.glob("run*/*.json"):
        continual.write(tmp_path / "summary.json", continual.read(path))
        assert (tmp_path / "summary.json").read_text(encoding="utf-8") == content_of(path)
    (tmp_path / "bad.json").write_text('{"mean_over_sequences": [[1, 2]]}')
    with pytest.raises(SealError, match="bad.json: 'mean_over_sequences' is not n . 1 rows"):
        continual.read(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"mean_over_sequences": [[1], 2]}')
    with pytest.raises(SealError, match="bad.json: 'mean_over_sequences' is not n . 1 rows"):
        continual.read(tmp_path / "bad.json")


# Results of many passages


def test_published_cpt_results_follow_from_their_verdicts(tmp_path):
    """Held-out copies hold published files; every copy holds the replay's."""
    replayed = [c["expected_output"] for c in shared_data.read("ki_goldens/cpt_replay.json")]
    root = shared_data.path("ki_inputs/squad_val.json").parent
    published = [cpt.read(path) for path in sorted((root / "results/cpt").glob("*.json*"))]
    for content in replayed + published:
        assert cpt.overall(content["server_reply"]) == content["overall"]
    cpt.write(tmp_path / "cpt.json", replayed[0])
    assert cpt.read(tmp_path / "cpt.json") == replayed[0]
    cpt.write(tmp_path / "bad.json", {"overall": {}, "server_reply": {"error": "boom"}})
    with pytest.raises(SealError, match="bad.json: server_reply: the inner loop failed: boom"):
        cpt.read(tmp_path / "bad.json")
    cpt.write(tmp_path / "bad.json", {"server_reply": replayed[0]["server_reply"]})
    with pytest.raises(SealError, match="bad.json: no 'overall'"):
        cpt.read(tmp_path / "bad.json")


@pytest.mark.parametrize("key", ["end_mask_substring", "skip_training"])
def test_a_request_for_what_training_does_not_do_is_refused(key):
    assert wire.read_settings({key: None}) == wire.read_settings({})
    with pytest.raises(SealError, match=f"{key}='x': not supported"):
        wire.read_settings({key: "x"})
