"""The run folder: settings, records as JSON lines, resume. Plain files anyone can read."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seal_jax import config as config_lib
from seal_jax import files, multihost
from seal_jax.errors import SealError
from seal_jax.tasks import Context

Record = dict[str, Any]
# Settings that change no record: a run may go on with others.
_MACHINE = ("mesh", "distributed", "compiler", "trackers")
_PACE = ("inner.chunk", "sampling.chunk", "answers.chunk")
_CALLS = ("concurrency", "retries", "timeout_s", "max_calls", "cache", "key_variable")


@contextlib.contextmanager
def opened(
    cfg: config_lib.Config,
    folder: str | Path | None,
    contexts: Sequence[Context],
    model: str | None = None,
) -> Iterator[files.AnyPath]:
    """Gives the run's folder, new or to be resumed, to this run alone.

    The arguments are those of `open_run`.

    Raises:
      SealError: where the folder holds a run with other settings, contexts or another model, or
        another run is at work there.
    """
    path = files.path(folder or Path("runs") / cfg.name)
    _fits(cfg, path)  # before anything is made
    with alone(path):
        open_run(cfg, path, contexts, model)
        yield path


def open_run(
    cfg: config_lib.Config,
    folder: str | Path | None = None,
    contexts: Sequence[Context] = (),
    model: str | None = None,
) -> files.AnyPath:
    """Returns the run's folder, new or to be resumed.

    Args:
      contexts: All that the run may use. Those with which it began are the ones it goes on with.
      model: The base model's `checkpoint.fingerprint`, likewise.

    Raises:
      SealError: where the folder holds a run with other settings, contexts or another model.
    """
    path = files.path(folder or Path("runs") / cfg.name)
    digests = _digests(contexts) if contexts else {}
    own = {"model": model} if model else {}
    if _fits(cfg, path):
        known: Record = {}
        with contextlib.suppress(ValueError, TypeError):  # or it says nothing
            known = dict(json.loads(files.read(path / "environment.json") or b"{}"))
        if any(known.get(name) not in (None, digest) for name, digest in digests.items()):
            raise SealError(
                f"{path}: began with other contexts: what task {cfg.task.name!r} reads (task.path, "
                "task.held_out) has changed"
            )
        if any(known.get(name) not in (None, digest) for name, digest in own.items()):
            raise SealError(f"{path}: began with another model: model.path has other files now")
        return path
    write_json(path / "environment.json", environment() | digests | own)
    write_text(path / "config.yaml", config_lib.dump(cfg))  # last: a folder with it is a run
    return path


def _fits(cfg: config_lib.Config, path: files.AnyPath) -> bool:
    """Returns whether a folder holds a run already, which is of these settings."""
    file = path / "config.yaml"
    found = files.read(file)
    if found is not None:
        changed = _changed(config_lib.parse(found, str(file)), cfg)
        calls = [f"task.openai.{name}" for name in _CALLS]
        own = lambda key: key.partition(".")[0] in _MACHINE or key in (*_PACE, *calls)
        changed = [key for key in changed if not own(key)]
        if changed:
            keys = ", ".join(changed)
            raise SealError(f"{path}: holds a run with other settings ({keys}); name a new one")
        return True
    # What a kill, or a full disk, leaves of a run that had not begun.
    draft = lambda name: name in ("environment.json", ".lock") or name.endswith(".partial")
    if not all(map(draft, files.entries(path))):
        raise SealError(f"{path}: not empty and no run of ours (no config.yaml)")
    return False


def _digests(contexts: Sequence[Context]) -> dict[str, str]:
    """Returns what names contexts: by what they say and ask, and by what else their task has."""
    said = [[x.id, x.title, x.passage, [list(q) for q in x.questions]] for x in contexts]
    text = lambda value: json.dumps(value, default=_plain, skipkeys=True)
    digest = lambda value: hashlib.sha256(text(value).encode()).hexdigest()
    found = {"contexts": digest(said)}
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # or it has no form in JSON
        found["context_data"] = digest([x.data for x in contexts])
    return found


def _plain(value: Any) -> Any:
    """Returns what JSON can hold of a value, such as an ARC puzzle; of another kind its name."""
    if dataclasses.is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else type(value).__name__


def settings(path: files.AnyPath) -> config_lib.Config:
    """Returns the settings of the run in a folder.

    Raises:
      SealError: where there is none.
    """
    found = files.read(path / "config.yaml")
    if found is None:
        raise SealError(f"{path}: no run there (no config.yaml)")
    return config_lib.parse(found, str(path / "config.yaml"))


def _changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Returns the dotted keys in which two groups of settings differ."""
    keys = []
    for entry in dataclasses.fields(old):
        a, b = getattr(old, entry.name), getattr(new, entry.name)
        if a != b:
            deeper = dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b)
            name = prefix + entry.name
            keys += _changed(a, b, f"{name}.") if deeper else [name]
    return keys


def environment() -> Record:
    """Returns versions, devices and the commit of the code, for the record."""
    names = ("seal_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "git_commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def write_text(file: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    files.write(file, _bytes(text))


def _bytes(text: str) -> bytes:
    """Returns UTF-8; half of a surrogate pair, as texts by a model may hold, as JSON writes it."""
    return text.encode("utf-8", "backslashreplace")


def write_json(file: Path, value: Any) -> None:
    """Writes indented JSON; see `write_text`."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(file: Path) -> Any:
    """Returns a JSON file's content.

    Raises:
      SealError: names the file and line.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SealError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", "?")
        raise SealError(f"{file}, line {line}: not valid JSON") from error


def records(file: Path, **kinds: type) -> list[Record]:
    """Returns the records of a JSON-lines file; a torn last line is dropped from the file too.

    Args:
      kinds: What every record has to have, as `context=str`.

    Raises:
      SealError: where a line before the last is damaged, naming it.
    """
    data = files.read(file) or b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        files.truncate(file, whole)
    found = _parsed(data[:whole], file)
    for number, row in enumerate(found, 1):
        for key, kind in kinds.items():
            if not isinstance(row.get(key), (int, float) if kind is float else kind):
                raise SealError(f"{file}, line {number}: {key!r} is not as a run writes it")
    return found


def whole_records(file: Path) -> list[Record]:
    """Returns the whole records of a file that a run may be writing, which is left as it is."""
    data = files.read(file) or b""
    return _parsed(data[: data.rfind(b"\n") + 1], file)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _parsed(data: bytes, file: Path) -> list[Record]:
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise SealError(f"{file}, line {number}: not valid JSON") from error
        if not isinstance(row, dict):
            raise SealError(f"{file}, line {number}: not a record")
        found.append(row)
    return found


@contextlib.contextmanager
def alone(folder: files.AnyPath) -> Iterator[None]:
    """Keeps other runs on this machine from a run's folder meanwhile; in a bucket nothing does.

    Raises:
      SealError: where one is at work there.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> bytes:
            if not isinstance(folder, Path):
                return b"free"
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return b""
            except OSError:  # a file system without locks
                pass
            return b"free"

        if not multihost.agree(lock):
            raise SealError(f"{folder}: another run is at work there")
        yield


def append(file: Path, rows: Iterable[Record]) -> None:
    """Appends records in one write, and waits until they are on disk."""
    lines = [_line(row) for row in rows]
    if lines:
        files.append(file, _bytes("".join(lines)))


def write_lines(file: Path, rows: Iterable[Record]) -> None:
    """Writes a JSON-lines file that is there whole or not at all."""
    write_text(file, "".join(map(_line, rows)))


def _line(row: Record) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


class Metrics:
    """Scalars over time: metrics.jsonl always, TensorBoard or Weights & Biases where asked for."""

    def __init__(self, folder: Path, trackers: Sequence[str] = (), name: str = "run"):
        self._file = folder / "metrics.jsonl"
        rows = records(self._file, stage=str)
        self._step = len(rows)
        self._stages = {row["stage"] for row in rows}
        own = trackers if multihost.leads() else ()
        self._sinks = [_tracker(kind, folder, name) for kind in own]

    def has(self, stage: str) -> bool:
        """Returns whether a stage has a line already, as in a run that comes by again."""
        return stage in self._stages

    def log(self, stage: str, **scalars: float | int) -> None:
        """Appends one line of scalars."""
        append(self._file, [{"time": round(time.time(), 3), "stage": stage, **scalars}])
        for sink in self._sinks:
            sink(self._step, scalars)
        self._step += 1
        self._stages.add(stage)


def check_trackers(kinds: Sequence[str]) -> None:
    """Raises SealError for a tracker that is not installed."""
    for kind in kinds:
        if importlib.util.find_spec(_MODULES[kind]) is None:
            raise SealError(f"trackers: {kind} is not installed: pip install seal_jax[{kind}]")


_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def _tracker(kind: str, folder: Path, name: str):
    """Returns a function (step, scalars) that feeds a tracker."""
    check_trackers([kind])
    if kind == "tensorboard":
        import tensorboardX

        writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int, scalars: dict[str, float]) -> None:
            for key, value in scalars.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return to_tensorboard
    import wandb

    run = wandb.init(project="seal_jax", name=name, dir=str(folder))
    return lambda step, scalars: run.log(scalars, step=step)
