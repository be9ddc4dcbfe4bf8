"""Lists the tiny grids' puzzles that are as hard as the paper's ARC tasks.

A puzzle is kept if the bare model fails it in-context and some configuration of the oracle's grid
solves it: the paper's own filter (section 4.2). Families take turns, so the lists are balanced.

Run: python benchmarks/filter_grids.py --config configs/arc_tiny.yaml
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from seal_jax import checkpoint, config, rewards, runs
from seal_jax.batching import SelfEdit
from seal_jax.checkpoint import LM
from seal_jax.config import Config
from seal_jax.tasks import Context, Task
from seal_jax.tasks.arc import baselines
from seal_jax.tasks.arc import task as arc_task
from seal_jax.tiny import grids, rules


@dataclass(frozen=True)
class Arguments:
    """What to filter."""

    config: Path = Path("configs/arc_tiny.yaml")
    """Settings of the inner loop and the answers."""
    model: str | None = None
    """Another model than the configuration's."""
    pool: int = 16
    """Puzzles drawn of each family."""
    out: Path = grids.FILTERED


def solved(lm: LM, task: Task, contexts: list[Context], text: str, cfg: Config) -> dict[str, bool]:
    """Returns whether one self-edit solves each puzzle."""
    edits = [SelfEdit(context, 0, text) for context in contexts]
    found = {}
    for outcomes, _ in rewards.evaluate(lm, task, edits, jax.random.key(0), cfg):
        for one in outcomes:
            found[contexts[one.at].id] = one.grade.reward == 1
    return found


def keep(split: str, each: int, lm: LM, cfg: Config, pool: int) -> tuple[list[int], dict]:
    """Returns the numbers of the puzzles kept, `each` of every family, and counts."""
    names = list(rules.SPLITS[split])
    drawn = grids.puzzles(split, range(pool * len(names)))
    task = arc_task.make(drawn, cfg.task, name=split)
    contexts = list(task.contexts)
    bare = rewards.score(lm, None, task, contexts, cfg)
    rest = [c for c, reward in zip(contexts, bare.reward, strict=True) if reward < 1]
    counts = {"drawn": len(contexts), "in_context": len(contexts) - len(rest), "by_edit": []}
    home: dict[str, int] = {}
    for text in baselines.grid(cfg.task.arc.format):
        taken = Counter(key.split("-")[0] for key in home)
        todo = [c for c in rest if c.id not in home and taken[c.id.split("-")[0]] < each]
        if not todo:
            break
        new = [key for key, right in solved(lm, task, todo, text, cfg).items() if right]
        home |= {key: int(key.split("-")[2]) for key in new}
        counts["by_edit"].append([len(todo), len(new)])
        print(split, text.split('"strategy"')[1], f"{len(new)} of {len(todo)}", flush=True)
    kept = []
    for name in names:
        own = sorted(number for key, number in home.items() if key.split("-")[0] == name)
        kept += own[:each]
        counts[name] = len(own[:each])
    return sorted(kept, key=lambda n: (n // len(names), n % len(names))), counts


def main(arguments: Arguments) -> None:
    changes = [] if arguments.model is None else [f"model.path={arguments.model}"]
    cfg = config.load_config(arguments.config, changes)
    lm = checkpoint.load_model(cfg.model)
    rl, rl_counts = keep("rl", grids.TRAIN_TASKS // len(rules.RL), lm, cfg, arguments.pool)
    each = grids.HELD_OUT_TASKS // len(rules.HELD_OUT)
    held_out, counts = keep("held_out", each, lm, cfg, arguments.pool)
    print(json.dumps({"rl": rl_counts, "held_out": counts}, indent=1))
    runs.write_json(arguments.out, {"rl": rl, "held_out": held_out})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
