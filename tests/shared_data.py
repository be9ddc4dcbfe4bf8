"""Where the reference's inputs and goldens lie: $SEAL_JAX_DATA, else ../shared/data."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def folder() -> Path | None:
    """Returns the folder with `ki_goldens` in it, or None."""
    path = Path(os.environ.get("SEAL_JAX_DATA") or _BESIDE)
    return path if (path / "ki_goldens").is_dir() else None


def path(name: str) -> Path:
    """Returns a file of the reference data; skips the test where there is none."""
    root = folder()
    if root is None:
        pytest.skip("no reference data: set SEAL_JAX_DATA or put it in ../shared/data")
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.exists():
            return candidate
    pytest.skip(f"this copy of the reference data has no {name}")


def read(name: str) -> Any:
    """Returns a JSON file's content, or the list of a JSONL file's rows; gzip or plain."""
    file = path(name)
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    if file.name.removesuffix(".gz").endswith(".jsonl"):
        # Not splitlines: a text in a row may hold U+2028 or U+0085 as it is.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)
