"""Real ARC tasks through the tiny grids' model: how many it solves, and by which self-edits.

Counts the tasks whose grids have sides up to `--side`, solved in-context, with the fixed
configuration, and with the self-edits of a run's policy before and after RL (5 each). No ARC task
is in the model's pretraining.

Run: python benchmarks/arc_real.py --challenges training_challenges.json \
    --solutions training_solutions.json --run runs/arc_tiny
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import machine
import numpy as np
import tyro

from seal_jax import checkpoint, config, rewards, runs, state, stats, writing
from seal_jax.batching import SelfEdit
from seal_jax.tasks.arc import baselines
from seal_jax.tasks.arc import task as arc_task


@dataclass(frozen=True)
class Arguments:
    """Which tasks, and which policy."""

    challenges: Path
    solutions: Path
    run: Path | None = None
    """Run folder of configs/arc_tiny.yaml; without it only the untrained policy is counted."""
    config: Path = Path("configs/arc_tiny.yaml")
    side: int = 6
    tokens: int = 384
    """Longest prompt with its answer, in tokens: what the model was trained on."""
    n: int = 5
    """Self-edits of a policy for each task."""
    out: Path | None = None


def fits(puzzle, side: int, tokens: int) -> bool:
    """Returns whether all grids of a task are small enough."""
    grids = [g for one in puzzle for pair in (*one.train, one.test) for g in pair]
    small = all(max(grid.shape) <= side for grid in grids if grid is not None)
    return small and all(arc_task.compact.count_tokens(one) <= tokens for one in puzzle)


def main(arguments: Arguments) -> None:
    start = time.monotonic()
    cfg = config.load_config(arguments.config)
    puzzles = arc_task.read(str(arguments.challenges), str(arguments.solutions), None)
    chosen = {
        key: group
        for key, group in puzzles.items()
        if fits(group, arguments.side, arguments.tokens)
    }
    task = arc_task.make(chosen, cfg.task, name="arc")
    contexts = list(task.contexts)
    lm = checkpoint.load_model(cfg.model)
    print(f"{len(contexts)} of {len(puzzles)} tasks fit", flush=True)
    bare = rewards.score(lm, None, task, contexts, cfg)
    rows = {"in-context": bare.reward[:, None]}

    def tested(name: str, edits: list[SelfEdit]) -> None:
        found = np.zeros((len(contexts), len(edits) // len(contexts)))
        for outcomes, _ in rewards.evaluate(lm, task, edits, jax.random.key(0), cfg):
            for one in outcomes:
                edit = edits[one.at]
                found[contexts.index(edit.context), edit.index] = one.grade.reward
        rows[name] = found
        print(name, f"{found.mean(1).sum():.1f}", flush=True)

    fixed = baselines.fixed(cfg.task.arc.format)
    tested("fixed", [SelfEdit(context, 0, fixed) for context in contexts])
    policies = {"before RL": lm}
    if arguments.run is not None:
        round_of = lambda folder: int(folder.parent.name[6:])
        folders = sorted(arguments.run.glob("round_*/policy"), key=round_of)
        if folders:
            policies["learned"] = lm._replace(params=state.load_tree(folders[-1], lm.params))
    for name, policy in policies.items():
        key = jax.random.key(1)
        made = writing.sample_edits(policy, task, contexts, arguments.n, key=key, cfg=cfg)
        tested(name, [edit for own in made for edit in own])
    table = {}
    for name, found in rows.items():
        mean = stats.mean_se(found.mean(1))
        table[name] = {
            "rate": mean.record(),
            "solved_on_average": float(found.mean(1).sum()),
            "solved_by_any": int(found.max(1).sum()),
            "trials": found.size,
            "tasks": [c.id for c, row in zip(contexts, found, strict=True) if row.max() == 1],
        }
        print(
            f"{name:<12} {table[name]['solved_on_average']:5.1f} of {len(contexts)} on average, "
            f"{table[name]['solved_by_any']} by any of {found.shape[1]}; rate {stats.text(mean)}"
        )
    if arguments.out is not None:
        record = {
            "command": machine.command(),
            "machine": machine.describe(),
            "seconds": round(time.monotonic() - start),
            "side": arguments.side,
            "tokens": arguments.tokens,
            "challenges": arguments.challenges.name,
            "tasks_in_file": len(puzzles),
            "tasks_that_fit": len(contexts),
            "table": table,
        }
        runs.write_json(arguments.out, json.loads(json.dumps(record)))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
