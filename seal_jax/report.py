"""One HTML file from a run folder: figures, tables, self-edits. It needs nothing beside it."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe

from seal_jax import config as config_lib
from seal_jax import files, runs, stats
from seal_jax import table as table_lib
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.stats import Estimate
from seal_jax.table import Row

_SHOWN = 3  # self-edits of a round, best and worst
_ANSWERS = 8  # of a self-edit


class Round(NamedTuple):
    """A round as far as it went: its summary once it is over, and its self-edits."""

    name: str
    summary: runs.Record | None
    edits: list[runs.Record]
    rewards: list[runs.Record]


class Shown(NamedTuple):
    """A self-edit with its mean reward, and what the model then answered."""

    context: str
    index: int
    reward: float
    text: str
    error: str | None
    answers: list[tuple[str, bool]]


def write(run: str | Path, out: str | Path | None = None) -> files.AnyPath:
    """Writes the report of a run, finished or not; returns its file.

    Args:
      run: The run's folder.
      out: By default `report.html` in it.

    Raises:
      SealError: where there is no run, or a record is damaged.
    """
    home = files.path(run)
    cfg = runs.settings(home)
    file = home / "report.html" if out is None else files.path(out)
    try:
        text = _render(home, cfg)
    except SealError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        raise SealError(f"{home}: a record is not as runs write it: {error}") from error
    runs.write_text(file, text)
    return file


def _render(home: files.AnyPath, cfg: Config) -> str:
    rounds = [_round(home, f"round_{i}") for i in range(cfg.outer.rounds)]
    rounds = [each for each in rounds if each.edits]
    table, metrics = _table(home), runs.whole_records(home / "metrics.jsonl")
    loops = [row for row in metrics if "candidates_per_second" in row]
    over = [each for each in rounds if each.summary]
    losses = [pair for pair in map(_losses, rounds) if pair[1]]
    figures = [
        _figure("Rewards of self-edits, by round", _plot_rewards, over),
        _figure("Held-out contexts", _plot_table, table),
        _figure("Loss of the inner loops", _plot_losses, losses),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # what a model wrote is text, never markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["estimate"] = lambda record: stats.text(stats.from_record(record))
    return environment.get_template("report.html.jinja").render(
        cfg=cfg,
        settings=config_lib.dump(cfg),
        environment=_json(home / "environment.json") or {},
        rounds=[(each, _shown(each)) for each in rounds],
        table=_table_lines(table),
        studies=_studies(home),
        loops=loops,
        figures=[figure for figure in figures if figure],
    )


def _json(file: files.AnyPath) -> Any:
    """Returns a JSON file's content, None where there is none."""
    return runs.read_json(file) if files.exists(file) else None


def _round(home: files.AnyPath, name: str) -> Round:
    place = home / name
    edits, rewards = (runs.whole_records(place / f"{x}.jsonl") for x in ("edits", "rewards"))
    return Round(name, _json(place / "summary.json"), edits, rewards)


def _shown(each: Round) -> list[Shown]:
    """Returns the best self-edits of a round and the worst, by their mean reward."""
    rows: dict[tuple[str, int], list[runs.Record]] = {}
    for row in each.rewards:
        rows.setdefault((row["context"], row["index"]), []).append(row)
    made = []
    for edit in each.edits:
        own = rows.get((edit["context"], edit["index"]))
        if own:
            reward = stats.mean(row["reward"] for row in own)
            answers = list(zip(own[0]["answers"], map(bool, own[0]["verdicts"]), strict=False))
            text, error = edit["text"], own[0]["error"]
            made.append(
                Shown(edit["context"], edit["index"], reward, text, error, answers[:_ANSWERS])
            )
    made.sort(key=lambda shown: -shown.reward)
    return made if len(made) <= 2 * _SHOWN else made[:_SHOWN] + made[-_SHOWN:]


def _table(home: files.AnyPath) -> list[Row]:
    """Returns the held-out table of a run that is over, else nothing."""
    records = _json(home / "eval" / "table.json") or {}
    return [Row(name, tuple(row["rewards"]), row["trials"]) for name, row in records.items()]


def _table_lines(table: Sequence[Row]) -> list[tuple[str, Estimate, int, Estimate | None]]:
    """Returns each row's name, mean and trials, and the last round minus it."""
    return [
        (row.name, row.estimate, row.trials, difference)
        for row, difference in zip(table, table_lib.differences(table), strict=True)
    ]


def _studies(home: files.AnyPath) -> list[tuple[str, str, dict[str, runs.Record]]]:
    """Returns the evaluations of `seal-jax eval`: setting, unit, and rows by name."""
    found = []
    for setting in ("single", "cpt", "continual"):
        record = _json(home / "eval" / setting / "summary.json")
        if record:
            rows = {name: row for name, row in record.items() if isinstance(row, dict)}
            found.append((setting, record["unit"], rows))
    return found


def _figure(
    title: str, plot: Callable[[Any, Sequence[Any]], None], data: Sequence[Any]
) -> tuple[str, markupsafe.Markup] | None:
    """Returns a title and an SVG drawing; None where there is nothing to draw."""
    if not data:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    # Same records, same file.
    style = {"svg.hashsalt": "seal_jax", "svg.fonttype": "none", "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        plot(axes, data)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # Every drawing counts its parts from 1, and in one page an id stands for one thing.
    text = re.sub(r'( id="|href="#|url\(#)', rf"\1{plot.__name__[1:]}-", text[text.index("<svg") :])
    return title, markupsafe.Markup(text)


def _losses(each: Round) -> tuple[str, list[tuple[float, float]]]:
    """Returns the name of a round, and the first loss and the last of each of its inner loops."""
    ends = [(row["first_loss"], row["last_loss"]) for row in each.rewards]
    return each.name, [pair for pair in ends if None not in pair]


def _plot_rewards(axes: Any, rounds: Sequence[Round]) -> None:
    """Draws the mean rewards of rounds, with standard errors over contexts."""
    series = {"base": "un-edited", "reward": "all self-edits", "reward_best": "best of a context"}
    for key, label in series.items():
        made = [stats.from_record(each.summary[key]) for each in rounds]
        errors = [0.0 if one.n < 2 else one.se for one in made]
        means = [one.mean for one in made]
        names = [each.name for each in rounds]
        axes.errorbar(names, means, yerr=errors, marker="o", capsize=3, label=label)
    axes.set_ylabel("reward")
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside right upper", frameon=False)


def _plot_table(axes: Any, table: Sequence[Row]) -> None:
    """Draws the mean reward of each condition."""
    made = [row.estimate for row in table]
    errors = [0.0 if one.n < 2 else one.se for one in made]
    names = [row.name for row in table]
    axes.barh(names, [one.mean for one in made], xerr=errors, color="0.7", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("mean reward, standard error over contexts")


def _plot_losses(axes: Any, losses: Sequence[tuple[str, list[tuple[float, float]]]]) -> None:
    """Draws each inner loop's first loss against its last."""
    for name, pairs in losses:
        axes.plot(*zip(*pairs, strict=True), ".", alpha=0.5, label=name)
    axes.set_xlabel("loss at the first step")
    axes.set_ylabel("at the last")
    axes.figure.legend(loc="outside right upper", frameon=False)
