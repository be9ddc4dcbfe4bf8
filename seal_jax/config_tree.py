"""Trees of settings: read from YAML, checked against nested dataclasses, changed by overrides."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from seal_jax.errors import SealError

# What the loader raises for odd dates, numbers, tags and depths, besides its own errors.
_ODD = (yaml.YAMLError, ValueError, KeyError, OverflowError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a group: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"{key.value!r} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> dict[str, Any]:
    """Returns the settings in a YAML file; a SealError names the file and the line at fault."""
    if not path.is_file():
        raise SealError(f"{path}: no such configuration file")
    return parse(path.read_bytes(), str(path))


def parse(text: bytes, origin: str) -> dict[str, Any]:
    """Returns the settings in the text of a YAML file; `origin` names it in SealErrors."""
    try:
        tree = yaml.load(text.decode(), Loader=_Loader)
    except _ODD as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = f": {error.problem}" if isinstance(error, yaml.constructor.ConstructorError) else ""
        raise SealError(f"{origin}{where}: not valid YAML{what}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SealError(f"{origin}: expected `key: value` lines at the top level")
    return tree


def overridden(
    tree: dict[str, Any], root: type, origin: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Returns settings changed by `key=value` overrides, every key of both known to `root`.

    Raises:
      SealError: names the key, and suggests the nearest known one.
    """
    _check(tree, root, origin, root)
    if isinstance(overrides, str):
        raise SealError(f"override {overrides!r}: expected a list of them, not one text")
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise SealError(f"override {item!r}: expected key=value, such as inner.epochs=5")
        try:
            branch: Any = yaml.load(text, Loader=_Loader)
        except _ODD as error:
            raise SealError(f"override {item!r}: the value is not YAML") from error
        for part in reversed(key.split(".")):
            branch = {part: branch}
        _check(branch, root, f"override {item!r}", root)
        tree = _merge(tree, branch)
    return tree


def _group(kind: Any) -> type | None:
    """Returns the dataclass a field holds, or None for a plain value."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def known_keys(group: type, prefix: str = "") -> list[str]:
    """Returns every dotted key below a group of settings."""
    keys = []
    for entry in dataclasses.fields(group):
        keys.append(prefix + entry.name)
        inner = _group(entry.type)
        if inner:
            keys += known_keys(inner, f"{prefix}{entry.name}.")
    return keys


def _check(tree: Any, group: type, origin: str, root: type, prefix: str = "") -> None:
    if not isinstance(tree, dict):
        raise SealError(f"{origin}: {prefix.rstrip('.')} holds a group of settings, not {tree!r}")
    fields = {entry.name: entry for entry in dataclasses.fields(group)}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            near = difflib.get_close_matches(dotted, known_keys(root), n=1, cutoff=0.5)
            near = near or [k for k in known_keys(root) if k.split(".")[-1] == str(key)][:1]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SealError(f"{origin}: unknown key {dotted!r}{hint}")
        inner = _group(fields[key].type)
        if inner and value is not None:
            _check(value, inner, origin, root, f"{dotted}.")
        elif isinstance(value, bool) and fields[key].type is not bool:
            said = f"{value} (as YAML reads yes, no, on and off, too) is neither number nor text"
            raise SealError(f"{origin}: {dotted}: {said}")


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Returns base with change laid over it, group by group."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merge(old, value) if both else value
    return result
