"""The commands: each parses its arguments, calls one function and prints."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from seal_jax.errors import SealError
from seal_jax.progress import say

Overrides = Annotated[tuple[str, ...], tyro.conf.Positional]


@dataclass(frozen=True)
class Run:
    """Write self-edits, adapt, test, keep the best, finetune, repeat; then the held-out table.

    Goes on where it stopped if the folder holds an unfinished run with the same settings.

    Example: seal-jax run configs/tiny_world.yaml outer.rounds=1 --run runs/try
    """

    config: tyro.conf.Positional[Path]
    """YAML file of settings."""
    overrides: Overrides = field(default=())
    """Changed settings, such as inner.epochs=5."""
    run: str | None = None
    """Folder of records, also in a bucket (gs://...); by default runs/NAME."""


@dataclass(frozen=True)
class Eval:
    """One of the paper's settings on a model or policy: single passages, continued pretraining on
    many at once (cpt), or continual self-edits, each merged.

    Goes on where it stopped if the folder holds an unfinished one with the same settings.

    Example: seal-jax eval configs/tiny_world.yaml single evaluation.policy=runs/x/round_1/policy
    """

    config: tyro.conf.Positional[Path]
    """YAML file of settings."""
    setting: tyro.conf.Positional[Literal["single", "cpt", "continual"]]
    """Which one."""
    overrides: Overrides = field(default=())
    """Changed settings, such as evaluation.self_edits=passage."""
    run: str | None = None
    """Folder of records, also in a bucket (gs://...); by default runs/NAME-SETTING."""


@dataclass(frozen=True)
class Adapt:
    """Teach the model one passage: self-edits, adapters, and answers before and after.

    Example: seal-jax adapt configs/tiny_world.yaml --passage passages.json
    """

    config: tyro.conf.Positional[Path]
    """YAML file of settings."""
    overrides: Overrides = field(default=())
    """Changed settings, such as sampling.n=16."""
    passage: Path | None = None
    """JSON in SEAL's format, one passage or a list of which the first is taken; without it the
    task's first held-out context."""
    out: Path | None = None
    """Folder for the best adapter, in PEFT's format."""


@dataclass(frozen=True)
class Pretrain:
    """Rebuild a built-in model from its generated world.

    Example: seal-jax pretrain tiny-world --out weights/tiny-world
    """

    name: tyro.conf.Positional[Literal["tiny-world", "tiny-grids"]]
    """Which world."""
    out: Path | None = None
    """Folder for the model; by default ./NAME."""
    seed: int = 0
    """Of the texts and the weights."""
    tokens: int | None = None
    """Tokens to train on; by default as many as the model that ships was trained on."""


@dataclass(frozen=True)
class Plan:
    """Does a run fit a TPU slice, and what would it cost? Compiled here, no TPU needed.

    Example: seal-jax plan configs/squad_qwen2p5_7b.yaml --topology v5e:2x4
    """

    config: tyro.conf.Positional[Path | None] = None
    """YAML file of settings."""
    overrides: Overrides = field(default=())
    """Changed settings, such as lora.rank=64."""
    topology: str | None = None
    """Such as v5e:2x4 or v5e-8; `list` shows all; by default the devices of this machine."""
    json: Path | None = None
    """File for the plan as JSON."""
    tokens: int = 1024
    """Tokens of the longest training text."""
    candidates: int = 0
    """Try this many alone; by default the most that fit are searched."""


@dataclass(frozen=True)
class Export:
    """Write a run's policy as a folder that transformers, vLLM and seal-jax load.

    Example: seal-jax export runs/tiny_world --to hf models/tiny_world_policy
    """

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    folder: tyro.conf.Positional[Path]
    """Folder for the model."""
    to: Literal["hf"] = "hf"
    """Hugging Face's format."""
    policy: str | None = None
    """Such as round_0 or control/round_1; by default that of the last round."""


@dataclass(frozen=True)
class Report:
    """One HTML file of a run's figures, tables and self-edits; also of one that goes on.

    Example: seal-jax report runs/tiny_world
    """

    run: tyro.conf.Positional[str]
    """Folder of a run or an evaluation."""
    out: str | None = None
    """The file; by default report.html in the folder."""


_NARROW = 20  # columns
_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=")


def _parse(kind: type, name: str, arguments: list[str]) -> Any:
    """Returns the parsed arguments, of this kind.

    Overrides (key=value) may stand anywhere: they are moved behind the last argument that has a
    place of its own, where tyro looks for them.
    """
    option = lambda word: word.startswith("-")
    values = {i + 1 for i, word in enumerate(arguments) if option(word) and "=" not in word}
    free = [i for i, word in enumerate(arguments) if i not in values and not option(word)]
    changes = [i for i in free if _OVERRIDE.match(arguments[i])]
    last = next((i for i in reversed(free) if i not in changes), -1)  # that has a place of its own
    order = [i for i in range(len(arguments)) if i not in changes]
    at = order.index(last) + 1 if last >= 0 else 0
    arguments = [arguments[i] for i in order[:at] + changes + order[at:]]
    if os.environ.get("COLUMNS", "").isdigit() and int(os.environ["COLUMNS"]) < _NARROW:
        os.environ["COLUMNS"] = str(_NARROW)  # tyro finds no end in wrapping help narrower than it
    return tyro.cli(kind, prog=f"seal-jax {name}", args=arguments, description=kind.__doc__)


def _local(file: Path | None, option: str) -> None:
    """Raises SealError for a bucket, of which a path would become a folder called gs:."""
    if file is not None and re.match(r"\w+:/", str(file)):
        raise SealError(f"{option} {file}: must be on this machine's disk")


def run(arguments: list[str]) -> None:
    """Runs the RL loop."""
    chosen = _parse(Run, "run", arguments)
    from seal_jax import config, experiment

    cfg = config.load_config(chosen.config, chosen.overrides)
    experiment.print_report(experiment.run(cfg, chosen.run))


def evaluate(arguments: list[str]) -> None:
    """Tests a model or policy in one of the paper's settings."""
    chosen = _parse(Eval, "eval", arguments)
    from seal_jax import config
    from seal_jax.evals import study

    cfg = config.load_config(chosen.config, chosen.overrides)
    study.print_study(study.run(cfg, chosen.setting, chosen.run))


def adapt(arguments: list[str]) -> None:
    """Adapts to one passage."""
    chosen = _parse(Adapt, "adapt", arguments)
    from seal_jax import config, lesson

    cfg = config.load_config(chosen.config, chosen.overrides)
    _local(chosen.out, "--out")
    lesson.print_lesson(lesson.teach(cfg, chosen.passage, chosen.out))


def pretrain(arguments: list[str]) -> None:
    """Trains a built-in model."""
    chosen = _parse(Pretrain, "pretrain", arguments)
    from seal_jax import files
    from seal_jax.tiny import pretrain as pretrain_lib

    folder = chosen.out or Path(chosen.name)
    files.check_free(folder)
    train, usual, one_step = {
        "tiny-world": (
            pretrain_lib.tiny_world,
            pretrain_lib.TINY_WORLD_TOKENS,
            pretrain_lib.ROWS * pretrain_lib.LENGTH,
        ),
        "tiny-grids": (
            pretrain_lib.tiny_grids,
            pretrain_lib.TINY_GRIDS_TOKENS,
            math.prod(pretrain_lib.BUCKETS[0]),
        ),
    }[chosen.name]
    tokens = usual if chosen.tokens is None else chosen.tokens
    if tokens < one_step:
        raise SealError(f"--tokens {tokens}: fewer than one step takes")

    def progress(seen: pretrain_lib.Progress) -> None:
        if seen.step % 50 == 0 or seen.step == seen.steps:
            say(f"step {seen.step} of {seen.steps}: loss {seen.loss:.3f}")

    print(train(folder, chosen.seed, tokens, progress))


def plan(arguments: list[str]) -> int:
    """Says whether a run fits a TPU slice, and what it would cost."""
    chosen = _parse(Plan, "plan", arguments)
    from seal_jax import config, files, hardware, plan_text
    from seal_jax import plan as plan_lib

    if chosen.topology == "list":
        print(hardware.listing())
        return 0
    if chosen.config is None:
        raise SealError("plan: which configuration? seal-jax plan CONFIG --topology v5e-8")
    cfg = config.load_config(chosen.config, chosen.overrides)
    if chosen.tokens < 1 or chosen.candidates < 0:
        raise SealError("plan: --tokens must be at least 1, --candidates not negative")
    _local(chosen.json, "--json")
    if chosen.json is not None:  # before the work: what is in the way is told now
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
    request = plan_lib.Request(cfg, chosen.topology, chosen.tokens, chosen.candidates)
    made = plan_lib.make(request)
    if chosen.json is not None:
        files.write(chosen.json, (json.dumps(made, indent=2) + "\n").encode())
    print(plan_text.text(made))
    return 0 if made["fits"] else 1


def export(arguments: list[str]) -> None:
    """Writes a run's policy as a Hugging Face folder."""
    chosen = _parse(Export, "export", arguments)
    from seal_jax import policies

    _local(chosen.folder, "export")
    print(policies.export(chosen.run, chosen.folder, chosen.policy))


def report(arguments: list[str]) -> None:
    """Writes a run's records as one HTML file."""
    chosen = _parse(Report, "report", arguments)
    from seal_jax import report as report_lib

    print(report_lib.write(chosen.run, chosen.out))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "run": run,
    "eval": evaluate,
    "adapt": adapt,
    "pretrain": pretrain,
    "plan": plan,
    "report": report,
    "export": export,
}


def usage() -> str:
    """Returns the overview."""
    lines = ["usage: seal-jax COMMAND ... (each has --help)", ""]
    lines += [f"  {name:<10} {function.__doc__}" for name, function in COMMANDS.items()]
    return "\n".join(lines)
