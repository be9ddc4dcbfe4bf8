"""The report of a run folder: whole, escaped, the same every time; also of a run that goes on."""

import html.parser
import json
import re

import pytest

from seal_jax import config, report, runs
from seal_jax.__main__ import main
from seal_jax.errors import SealError
from seal_jax.stats import mean_se

HOSTILE = "<script>alert('x')</script> & <b>bold</b>"
VOID = {"meta", "br", "img", "path", "use", "rect"}
MAY_STAY_OPEN = {"tr", "td", "th"}


class Page(html.parser.HTMLParser):
    """Reads a page: its tags, attributes and text, and whether what opens closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self._open = [], [], "", []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID | MAY_STAY_OPEN:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID | MAY_STAY_OPEN:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def edit(context, index, text):
    return {"context": context, "index": index, "text": text, "tokens": 3, "logprob": -1.0}


def reward(context, index, value, error=None):
    return {
        "context": context,
        "index": index,
        "seed": 0,
        "reward": value,
        "verdicts": [int(value > 0.5)],
        "answers": [f"answer {HOSTILE}"],
        "steps": 2,
        "first_loss": 2.0 + index,
        "last_loss": None if error else 1.0,
        "error": error,
    }


@pytest.fixture
def folder(tmp_path):
    """A run of two rounds of which the second goes on."""
    home = runs.open_run(config.load_config(None, ["name=a<b>c"]), tmp_path / "run")
    edits = [edit(c, i, f"{HOSTILE} {c}{i}") for c in ("p", "q") for i in range(5)]
    values = [reward(c, i, 0.1 * i) for c in ("p", "q") for i in range(4)]
    values += [reward(c, 4, 0.0, f"diverged {HOSTILE}") for c in ("p", "q")]
    for number, rows in ((0, values), (1, values[:3])):
        runs.write_lines(home / f"round_{number}" / "edits.jsonl", edits)
        runs.write_lines(home / f"round_{number}" / "rewards.jsonl", rows)
    one = mean_se([0.25, 0.5]).record()
    summary = {"contexts": 2, "self_edits": 10, "base": one, "reward": one, "reward_best": one}
    summary |= {"reward_kept": None, "kept": 0, "not_applied": {f"bad {HOSTILE}": 2}}
    runs.write_json(home / "round_0" / "summary.json", summary)
    rows = {"base": [0.0, 0.5], "round 1": [0.5, 0.5]}
    table = {
        name: {**mean_se(values).record(), "trials": 2, "rewards": values}
        for name, values in rows.items()
    }
    runs.write_json(home / "eval" / "table.json", table)
    study = {"unit": "contexts", "n": 2}
    for name in ("no self-edit", f"own {HOSTILE}"):
        study[name] = {**one, "trials": 4, "gain": one, "rewards": [0.25, 0.5]}
    runs.write_json(home / "eval" / "single" / "summary.json", study)
    runs.append(home / "metrics.jsonl", [{"stage": "round_0/rewards", "seed": 0, "seconds": 1.5}])
    loop = {"candidates_per_second": 4.2, "token_efficiency": 0.8, "step_efficiency": 0.9}
    runs.append(home / "metrics.jsonl", [{"stage": "s", "seed": 0, "seconds": 1.5, **loop}])
    return home


def test_the_report_holds_all_figures_and_needs_nothing_beside_it(folder):
    page = Page(report.write(folder).read_text())
    text = re.sub(r"\s+", " ", page.text)
    assert ".375 (.125)" in text and ".250 (.250)" in text  # summary; round 1 minus base
    assert "not over: 10 self-edits written, 3 inner loops done" in text
    assert page.tags.count("svg") == 3
    assert all(link.startswith("#") for link in page.links)
    assert "4.2" in text and "reward 0.300" in text and "learning_rate" in text


def test_drawings_of_a_page_share_no_id_and_links_find_theirs(folder):
    text = report.write(folder).read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    links = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert len(ids) == len(set(ids)) > 30
    assert {one or other for one, other in links} <= set(ids)


def test_what_a_model_wrote_is_never_markup(folder):
    text = report.write(folder).read_text()
    page = Page(text)
    assert not {"script", "b", "c"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 10


def test_the_same_records_make_the_same_file_and_stay_as_they_are(folder):
    with open(folder / "round_1" / "rewards.jsonl", "a") as file:
        file.write('{"context": "q", "ind')  # as a run leaves it while it writes
    before = {p: p.read_bytes() for p in folder.rglob("*.jsonl")}
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first
    assert {p: p.read_bytes() for p in folder.rglob("*.jsonl")} == before


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    home = runs.open_run(config.load_config(None), tmp_path / "run")
    assert "No records yet" in Page(report.write(home).read_text()).text


def test_what_is_no_run_is_a_sentence_and_leaves_nothing(folder, tmp_path, capsys):
    assert main(["report", str(tmp_path / "nosuch")]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main(["report", str(folder), "--out", str(tmp_path / "mine.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine.html")
    (folder / "round_0" / "rewards.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(SealError, match="rewards.jsonl, line 2"):
        report.write(folder, tmp_path / "other.html")
    (folder / "round_0" / "rewards.jsonl").unlink()
    odd = {"trials": 2, "rewards": [0.0, "x"]}
    (folder / "eval" / "table.json").write_text(json.dumps({"base": odd}))
    with pytest.raises(SealError, match="a record is not as runs write it"):
        report.write(folder, tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_names_and_texts_of_any_kind_are_shown_as_they_are(folder):
    """A reference may be called what matplotlib takes for mathematics; half a surrogate pair."""
    name = f"cheap $\\frac{{$ {HOSTILE}"
    table = runs.read_json(folder / "eval" / "table.json")
    runs.write_json(folder / "eval" / "table.json", {name: table["base"], **table})
    runs.append(folder / "round_1" / "rewards.jsonl", [reward("q", 4, 0.0, "no key '\ud800'")])
    text = report.write(folder).read_text()
    page = Page(text)
    assert page.text.count(name) == 2  # in the table and the drawing
    assert "no key '\\ud800'" in page.text and not {"script", "b"} & set(page.tags)
