"""Files of a run: on a disk or in a bucket (`gs://`, by etils.epath), written by process 0 alone.

Every process gets what process 0 read, so nothing depends on a shared file system.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from seal_jax import multihost
from seal_jax.errors import SealError

AnyPath = Path | epath.Path


def path(name: str | AnyPath) -> AnyPath:
    """Returns a path, on a disk or in a bucket.

    Raises:
      SealError: where the library for buckets of this kind is not installed.
    """
    if "://" not in str(name):
        return Path(name).expanduser()
    try:
        found = epath.Path(name)
        found.exists()
        return found
    except (ImportError, ValueError, KeyError) as error:
        kind = str(name).partition("://")[0]
        raise SealError(
            f"{name}: {kind}:// paths need a library that is not here (gs:// needs gcsfs): {error}"
        ) from error


def exists(file: AnyPath) -> bool:
    """Returns whether process 0 finds it."""
    return multihost.agree(lambda: b"1" if file.exists() else b"") == b"1"


def entries(folder: AnyPath) -> list[str]:
    """Returns the names of what lies in a folder; none where there is no folder."""
    names = lambda: sorted(x.name for x in folder.iterdir()) if folder.exists() else []
    return json.loads(multihost.agree(lambda: json.dumps(names()).encode()))


def read(file: AnyPath) -> bytes | None:
    """Returns a file's bytes, or None where there is none."""
    data = multihost.agree(lambda: b"+" + file.read_bytes() if file.exists() else b"")
    return data[1:] if data else None


def read_settings(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file on this machine, as model and adapter folders hold them.

    Raises:
      SealError: names the file, where it is not there or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SealError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SealError(f"{file}: holds no settings")
    return content


def check_free(folder: Path) -> None:
    """Raises SealError where something stands in the way of a new folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SealError(f"{folder}: already there and not empty; nothing was written")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `folder` when it is whole.

    Raises:
      SealError: where something stands in the way.
    """
    check_free(folder)
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    yield work
    if folder.exists():
        folder.rmdir()
    work.rename(folder)


def make_folder(folder: AnyPath) -> None:
    """Makes a folder and those above it."""
    if multihost.leads():
        folder.mkdir(parents=True, exist_ok=True)


def write(file: AnyPath, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    if not multihost.leads():
        return
    make_folder(file.parent)
    if not isinstance(file, Path):
        file.write_bytes(data)  # buckets show a file when it is complete
        return
    if file.is_dir():
        raise SealError(f"{file}: is a folder")
    partial = file.with_name(f".{file.name}.partial")
    with _named(file), open(partial, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def append(file: AnyPath, data: bytes) -> None:
    """Appends in one write, and waits until it is on disk."""
    if not multihost.leads():
        return
    make_folder(file.parent)
    if not isinstance(file, Path):
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(before + data)  # buckets cannot append
        return
    with _named(file), open(file, "ab") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Makes errors name a file: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def truncate(file: AnyPath, size: int) -> None:
    """Cuts a file to its first `size` bytes."""
    if multihost.leads():
        with contextlib.suppress(FileNotFoundError):
            data = file.read_bytes()
            if len(data) > size:
                write(file, data[:size])


def local_copy(folder: AnyPath, patterns: tuple[str, ...]) -> Path:
    """Returns a folder on this machine's disk with the matching files of one in a bucket."""
    if isinstance(folder, Path):
        return folder
    home = Path(os.environ.get("SEAL_JAX_CACHE") or "~/.cache/seal_jax").expanduser()
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    copy = home / "models" / f"{folder.name}-{name}"
    for file in folder.iterdir() if folder.exists() else ():
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
            continue
        target = copy / file.name
        if target.exists() and target.stat().st_size == file.stat().length:
            continue
        copy.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{file.name}.{os.getpid()}")
        with file.open("rb") as source, open(partial, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 24)
        partial.replace(target)
    return copy
