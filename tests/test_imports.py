"""Imports of the package run one way."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_module_imports_itself_by_way_of_others():
    files = {}
    for file in (ROOT / "seal_jax").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = file
    graph = {}
    for name, file in files.items():
        found = set()
        for node in ast.parse(file.read_text()).body:  # inside functions it is another matter
            if isinstance(node, ast.ImportFrom) and node.module in files:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {x if x in files else node.module for x in inner}
        graph[name] = found - {name, "seal_jax"}
    assert len(graph["seal_jax.rewards"]) > 5
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises with the cycle
