"""How many of the tiny grids' self-edits are valid, drawn freely and under the grammar.

    python benchmarks/validity.py

Self-edits of the held-out puzzles by the policy before RL, and by those of a run with `--run`. A
valid one is JSON of the schema; of the valid ones some ask for more steps than are allowed, and
train nothing.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import machine

from seal_jax import checkpoint, config, state, stats, writing
from seal_jax.errors import SelfEditError
from seal_jax.tasks import arc
from seal_jax.tasks.registry import load_task

ROOT = Path(__file__).resolve().parents[1]


def valid(text: str) -> bool:
    """Returns whether a self-edit is JSON of the schema."""
    try:
        arc.parse_self_edit(text)
    except SelfEditError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "arc_tiny.yaml")
    parser.add_argument("--run", type=Path, help="folder of a run, whose policies are counted too")
    parser.add_argument("-n", type=int, default=20, help="self-edits of each puzzle")
    parser.add_argument("--quick", action="store_true", help="2 self-edits of each puzzle")
    parser.add_argument("--out", type=Path, help="JSON file (default: results/validity.json)")
    args = parser.parse_args()
    cfg = config.load_config(args.config)
    lm = checkpoint.load_model(cfg.model)
    policies = {"before RL": lm}
    round_of = lambda folder: int(folder.parent.name[6:])
    for folder in sorted(args.run.glob("round_*/policy"), key=round_of) if args.run else ():
        trained = state.load_tree(folder, lm.params)
        policies[f"round {round_of(folder) + 1}"] = lm._replace(params=trained)
    rows = []
    for name, policy in policies.items():
        for constrained in (False, True):
            own = dataclasses.replace(cfg.task.arc, grammar=constrained)
            task = load_task(dataclasses.replace(cfg.task, arc=own))
            n = 2 if args.quick else args.n
            key = jax.random.key(0)
            drawn = writing.sample_edits(policy, task, task.held_out, n, key=key, cfg=cfg)
            of_puzzle = [sum(valid(edit.text) for edit in own) / n for own in drawn]
            found = stats.mean_se(of_puzzle)
            way = "grammar" if constrained else "free"
            rows.append([name, way, n * len(drawn), found.mean, found.se])
    print(machine.table(rows, ("policy", "sampling", "self-edits", "valid", "s.e.")))
    result = {"command": machine.command(), "machine": machine.describe(), "rows": rows}
    machine.report("validity", result, args.out, args.quick)


if __name__ == "__main__":
    main()
