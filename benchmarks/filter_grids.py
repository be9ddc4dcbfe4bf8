"""Lists the tiny grids' puzzles that are as hard as the paper's ARC tasks.

A puzzle is kept if the bare model fails it in-context and some configuration of the oracle's grid
solves it: the paper's own filter (section 4.2), the same for puzzles to train on and held-out ones.
As many of each family are listed as of its split's rarest, so that the lists are balanced.

Run: python benchmarks/filter_grids.py
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import machine
import tyro

from seal_jax import checkpoint, config, rewards, runs
from seal_jax.batching import SelfEdit
from seal_jax.checkpoint import LM
from seal_jax.config import Config
from seal_jax.tasks import Context, Task
from seal_jax.tasks.arc import baselines
from seal_jax.tasks.arc import task as arc_task
from seal_jax.tiny import grids, rules

RESULTS = Path(__file__).parent / "results" / "filter_grids.json"
NEW = ("rl", "held_out", "other")  # families that no pretraining sequence has
SIZES = {"rl": grids.TRAIN_TASKS, "held_out": grids.HELD_OUT_TASKS}


@dataclass(frozen=True)
class Arguments:
    """What to filter."""

    config: Path = Path("configs/arc_tiny.yaml")
    """Settings of the inner loop and the answers."""
    model: str | None = None
    """Another model than the configuration's."""
    pool: int = 192
    """Puzzles drawn of each family."""
    tried: int = 10
    """Puzzles of a family, of those that fail in-context, on which configurations are tried."""
    each: int = 6
    """Puzzles of a family after which no more of it are tried."""
    deal: bool = False
    """Only write the lists anew, from what the last run found."""
    results: Path = RESULTS
    out: Path = grids.FILTERED


def solved(lm: LM, task: Task, contexts: list[Context], text: str, cfg: Config) -> set[str]:
    """Returns the ids of the puzzles that one self-edit solves."""
    edits = [SelfEdit(context, 0, text) for context in contexts]
    found = set()
    for outcomes, _ in rewards.evaluate(lm, task, edits, jax.random.key(0), cfg):
        found |= {contexts[one.at].id for one in outcomes if one.grade.reward == 1}
    return found


def find(lm: LM, cfg: Config, pool: int, tried: int, each: int) -> dict[str, Any]:
    """Returns, for each family, how many puzzles were right in-context, and those that are kept."""
    drawn = {}
    for split in NEW:
        drawn |= grids.puzzles(split, pool * len(rules.SPLITS[split]))
    task = arc_task.make(drawn, cfg.task, name="pool")
    contexts = list(task.contexts)
    bare = rewards.score(lm, None, task, contexts, cfg).reward
    names = [name for split in NEW for name in rules.SPLITS[split]]
    families = {name: {"drawn": pool, "in_context": 0, "tried": 0, "kept": []} for name in names}
    left = []
    for context, reward in zip(contexts, bare, strict=True):
        own = families[_family(context)]
        if reward == 1:
            own["in_context"] += 1
        elif own["tried"] < tried:
            own["tried"] += 1
            left.append(context)
    print({name: own["in_context"] for name, own in families.items()}, flush=True)
    configurations = []
    for text in baselines.grid(cfg.task.arc.format):
        todo = [c for c in left if len(families[_family(c)]["kept"]) < each]
        if not todo:
            break
        right = solved(lm, task, todo, text, cfg)
        left = [c for c in left if c.id not in right]
        for key in sorted(right, key=list(drawn).index):
            families[key.rsplit("-", 2)[0]]["kept"].append(key)
        configurations.append({"self_edit": text, "tried": len(todo), "solved": len(right)})
        print(f"{len(right)} of {len(todo)} by {text.split(' : ', 5)[-1]}", flush=True)
    return {"families": families, "configurations": configurations}


def _family(context: Context) -> str:
    return context.id.rsplit("-", 2)[0]


def deal(families: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the lists: families in turn, equally many of each."""
    lists = {}
    for split, size in SIZES.items():
        names = list(rules.SPLITS[split])
        each = min(-(-size // len(names)), *(len(families[name]["kept"]) for name in names))
        lists[split] = [families[name]["kept"][i] for i in range(each) for name in names]
    return lists


def main(arguments: Arguments) -> None:
    if arguments.deal:
        found = json.loads(arguments.results.read_text())
    else:
        changes = [] if arguments.model is None else [f"model.path={arguments.model}"]
        cfg = config.load_config(arguments.config, changes)
        lm = checkpoint.load_model(cfg.model)
        found = find(lm, cfg, arguments.pool, arguments.tried, arguments.each)
        found |= {"command": machine.command(), "machine": machine.describe()}
        runs.write_json(arguments.results, found)
    for name, own in found["families"].items():
        print(
            f"{name}: {own['drawn']} drawn, {own['in_context']} in-context, {len(own['kept'])} kept"
        )
    lists = deal(found["families"])
    print({split: len(keys) for split, keys in lists.items()})
    runs.write_json(arguments.out, lists)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
