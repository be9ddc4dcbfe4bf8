"""Model replies are untrusted: 10,000 hostile self-edits and grids; none crashes or runs."""

import builtins
import json
import random

import numpy as np
import pytest

from seal_jax.errors import SelfEditError
from seal_jax.tasks import arc
from seal_jax.tasks.arc import compact, edits, grids, replies

VALID = edits.text(edits.make(basic=True))
TREE = json.loads(VALID)
ODD = [None, True, 0, 1, -1, 2.5, "false", "", [], {}, [1], {"a": 1}, 1e308, -0.0, "3", 10**30]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "0x1", "1_0", "\\u0000", "'x'", "\x00"]
CODE = [
    "__import__('os').system('x')",
    "[].append(1)",
    "open('/etc/passwd')",
    "{1: 2}",
    "lambda: 0",
]


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch):
    """Makes any evaluation of text a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("text was evaluated")

    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, refuse)


def hostile_edit(draw):
    """Returns a reply that is nearly a self-edit."""
    kind = draw.randrange(10)
    tree = json.loads(VALID)
    group = draw.choice([tree, tree["data_generation"], tree["training"]])
    key = draw.choice(list(group))
    if kind == 0:
        group[key] = draw.choice(ODD)
    elif kind == 1:
        del group[key]
    elif kind == 2:
        group[draw.choice(["extra", "__class__", "", key + " "])] = draw.choice(ODD)
    text = json.dumps(tree, indent=draw.choice([None, 2]))
    if kind == 3:
        at = draw.randrange(len(text))
        return (
            text[:at] + draw.choice(RAW + CODE + list('{}[],:"\\')) + text[at + draw.randrange(3) :]
        )
    if kind == 4:
        return text[: draw.randrange(len(text))]
    if kind == 5:
        return draw.choice(
            ["```json\n{}\n```", "```\n{}\n```", "{}\nThat is my choice.", "Sure: {}", "{} {}"]
        ).replace("{}", text)
    if kind == 6:
        deep = draw.choice([10, 1000, 2000, 100_000])
        return draw.choice(["[", '{"a":', "[{"]) * deep
    if kind == 7:
        return text.replace(draw.choice(["0.0001", "2", "true", "false"]), draw.choice(RAW), 1)
    if kind == 8:
        return text.replace('"training"', '"training": {}, "training"', 1)
    if kind == 9:
        return "".join(chr(draw.randrange(1, 0x2FFF)) for _ in range(draw.randrange(60)))
    return text


def hostile_grid(draw):
    """Returns a reply that is nearly a grid, in either format."""
    kind = draw.randrange(8)
    rows, columns = draw.randrange(0, 34), draw.randrange(0, 34)
    cells = [
        [
            str(draw.choice([0, 5, 9, 10, -1, 1.5, "x", 10**20]))
            if draw.random() < 0.02
            else str(draw.randrange(10))
            for _ in range(columns)
        ]
        for _ in range(rows)
    ]
    text = "[[" + "]\n [".join(" ".join(row) for row in cells) + "]]"
    if kind == 0:
        return text + draw.choice(["", "#", "# [[1]]", "assistant", " -> ", "\n\n"])
    if kind == 1:
        at = draw.randrange(len(text))
        return text[:at] + draw.choice([*CODE, "[", "]", "\n", ",", "٣", "\x00", "²"]) + text[at:]
    if kind == 2:
        return draw.choice(CODE)
    if kind == 3:
        return draw.choice(["[", "[[", "1 ", "\n", "```"]) * draw.choice([1, 10_000, 300_000])
    if kind == 4:
        return "".join(chr(draw.randrange(1, 0x2FFF)) for _ in range(draw.randrange(80)))
    words = [f"h{rows}", f"w{columns}"]
    colours = [[draw.randrange(10) for _ in range(columns)] for _ in range(rows)]
    if rows and columns:
        words = compact.grid_words(np.array(colours, np.int8))
    if words and kind > 5:
        words[draw.randrange(len(words))] = draw.choice(
            [*compact.WORDS, "h-1", "h٣", "w99999999999", "11", "11٣", "011a", "11a//", ""]
        )
    return " ".join(words)


def test_hostile_self_edits_are_refused_with_a_reason():
    draw, accepted = random.Random(0), 0
    for _ in range(10_000):
        text = hostile_edit(draw)
        try:
            edit = arc.parse_self_edit(text)
        except SelfEditError as error:
            assert str(error).startswith("self-edit: ") and len(str(error)) < 400
        else:  # the change left it valid
            accepted += 1
            again = json.loads(text)
            assert again == edit.model_dump()
            assert type(again["training"]["num_train_epochs"]) is int
    assert 20 < accepted < 3_000
    assert arc.parse_self_edit(VALID) == edits.make(basic=True)


def test_hostile_grids_are_refused_or_read_exactly():
    draw, accepted = random.Random(1), 0
    for _ in range(10_000):
        text = hostile_grid(draw)
        for parse in (arc.parse_grid, compact.parse_grid):
            grid = parse(text)
            if grid is None:
                continue
            accepted += 1
            assert grid.ndim == 2 and 1 <= min(grid.shape) and grids.fits(grid)
            assert 0 <= grid.min() and grid.max() <= 9
        grids.decode_as_reference(text)
    assert accepted > 500


def test_the_lenient_reader_never_crashes_otherwise_either():
    draw = random.Random(2)
    for _ in range(2_000):
        try:
            replies.read(hostile_edit(draw))
        except SelfEditError:
            pass


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("```json\n" + VALID + "\n```", "code fence"),
        (VALID + " Done.", "text after"),
        (VALID.replace("true", '"true"'), "use_basic_augmentations"),
        (VALID.replace('"num_train_epochs": 2', '"num_train_epochs": 2.0'), "num_train_epochs"),
        (VALID.replace('"num_train_epochs": 2', '"num_train_epochs": true'), "num_train_epochs"),
        (VALID.replace('"num_train_epochs": 2', '"num_train_epochs": -1'), "num_train_epochs"),
        (VALID.replace("0.0001", "NaN"), "NaN"),
        (VALID.replace("0.0001", "1e999"), "learning_rate"),
        (VALID.replace("0.0001", "1" * 3000), "learning_rate"),
        (VALID.replace("0.0001", "1" * 5000), "longer than"),
        (VALID.replace('"training"', '"training": 1, "training"'), "twice"),
        (VALID.replace("train_using_output_tokens", "x"), "strategy"),
        ("[" * 4000, "nested too deeply|not JSON"),
        ("5", "the whole"),
        ("", "not JSON"),
    ],
)
def test_reasons_name_what_is_wrong(reply, reason):
    with pytest.raises(SelfEditError, match=reason):
        arc.parse_self_edit(reply)


def test_a_self_edit_that_trains_nothing_is_valid():
    assert (
        arc.parse_self_edit(
            edits.text(edits.make(epochs=0, learning_rate=0))
        ).training.num_train_epochs
        == 0
    )
