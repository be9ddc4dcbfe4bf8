"""The task of docs/tasks.md, as it stands there, through the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)
SMALL = [
    "outer.rounds=1",
    "outer.contexts=8",
    "inner.epochs=5",
    "outer.sft.epochs=1",
    "outer.control=false",
    "evaluation.contexts=4",
]


def test_the_task_of_the_docs_runs(tmp_path):
    task, notes = BLOCKS
    (tmp_path / "flashcards.py").write_text(task)
    subprocess.run([sys.executable, "-c", notes], check=True, cwd=tmp_path)
    script = Path(sys.executable).with_name("seal-jax")  # its folder is not on Python's path
    words = ["task.name=flashcards:make", "task.path=notes.jsonl", "--run", "run"]
    command = [script, "run", str(ROOT / "configs" / "tiny_world.yaml"), *SMALL, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = tmp_path / "run" / "round_0"
    kept = [json.loads(line) for line in (first / "kept.jsonl").read_text().splitlines()]
    assert kept and all(" Answer: " in one["completion"] for one in kept if one["reward"])
    own = [json.loads(line) for line in (first / "rewards.jsonl").read_text().splitlines()]
    assert any(one["reward"] > 0.2 for one in own)
