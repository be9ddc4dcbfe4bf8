"""Reads and writes JSON as the reference does: two spaces, no escapes, no final newline."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seal_jax.errors import SealError


def read_json(path: str | Path) -> Any:
    """Returns the content of a JSON file, gzipped if its name ends with .gz.

    Raises:
      SealError: names the file, and the line if it is not JSON.
    """
    return _parsed(_text(Path(path)), str(path), 1)


def read_lines(path: str | Path) -> list[Any]:
    """Returns the rows of a file of JSON lines, as `read_json` reads one."""
    # Not splitlines: texts may hold other separators, such as U+2028, as they are.
    lines = enumerate(_text(Path(path)).split("\n"), 1)
    return [_parsed(line, str(path), number) for number, line in lines if line.strip()]


def _text(path: Path) -> str:
    path = path.expanduser()
    if not path.is_file():
        raise SealError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SealError(f"{path}: not a readable UTF-8 file: {error}") from error


def _parsed(text: str, name: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise SealError(f"{name}, line {line}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number, or a depth, beyond Python's
        raise SealError(f"{name}: not valid JSON: {error}") from error


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file in the reference's layout; it appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False))


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file, and its folder where there is none; it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def need(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns `entry[key]`; a SealError says `where` it is missing or of another kind."""
    if not isinstance(entry, Mapping):
        raise SealError(f"{where}: expected an object with {key!r}")
    if key not in entry:
        raise SealError(f"{where}: no {key!r}")
    if not isinstance(entry[key], kind):
        names = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(_NAMES.get(name, name.__name__) for name in names)
        raise SealError(f"{where}: {key!r} is not {expected}")
    if isinstance(entry[key], str) and not is_text(entry[key]):
        raise SealError(f"{where}: {key!r} is not text: half of a surrogate pair stands alone")
    return entry[key]


def is_text(value: Any) -> bool:
    """Returns whether a value is a string that can be written down: JSON may hold half a letter."""
    return isinstance(value, str) and not _SURROGATE.search(value)


_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES = {str: "text", list: "a list", dict: "an object", float: "a number", int: "a number"}
