"""The plan table of docs/tpu.md, and the plans at the head of configurations.

    python benchmarks/plan_table.py        # tens of minutes on two cores

Compiles the real programs for every model and slice, with the settings of the paper's SQuAD runs
but self-edits of at most 1,024 tokens, and texts of at most 1,024. A cell that is there already (a
file of results/plans) is not compiled again; `--render` compiles nothing.
"""

import argparse
import json
import re
from pathlib import Path

from seal_jax import config, plan
from seal_jax.hardware import GIB

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "benchmarks" / "results" / "plans"
CONFIGS = ROOT / "configs"
HEAD = re.compile(r"# `plan` \(benchmarks/results/plans/(.+)\.json;.*\n(?:#   .*\n)+")
PAGE = ROOT / "docs" / "tpu.md"
SETTINGS = ROOT / "configs" / "squad_qwen2p5_7b.yaml"
MODELS = {
    "0.5B": "Qwen/Qwen2.5-0.5B",
    "1B": "meta-llama/Llama-3.2-1B",
    "3B": "Qwen/Qwen2.5-3B",
    "7B": "Qwen/Qwen2.5-7B",
}
SLICES = ("v5e-1", "v5e-8", "v6e-8", "v5p-8")
# Those of configurations first.
ORDER = [("7B", "v5e-8"), ("0.5B", "v5e-1"), ("1B", "v5e-1"), ("7B", "v6e-8")]
BEGIN, END = "<!-- plan table: written by benchmarks/plan_table.py -->", "<!-- end -->"


def cell_file(model: str, place: str) -> Path:
    return PLANS / f"{model}_{place}.json"


def compile_cell(model: str, place: str) -> None:
    """Writes the plan of one cell."""
    changes = [f"model.path={MODELS[model]}", "sampling.max_tokens=1024"]
    made = plan.make(plan.Request(config.load_config(SETTINGS, changes), place))
    PLANS.mkdir(parents=True, exist_ok=True)
    cell_file(model, place).write_text(json.dumps(made, indent=1) + "\n")


def row(model: str, place: str) -> str:
    """Returns a line of the table."""
    file = cell_file(model, place)
    if not file.exists():
        return f"| {model} | {place} | not compiled yet | | | | | |"
    made = json.loads(file.read_text())
    stages = made["stages"]
    inner, write = stages["inner"], stages["write"]
    needs = f"{inner['bytes'] / GIB:.1f}" if inner["bytes"] else "?"
    room = made["bytes allowed"] * (1 - made["head-room"]) / GIB
    bad = [name for name, fit in stages.items() if not fit["fits"]]
    fits = "yes" if made["fits"] else f"no ({', '.join(bad)})"
    hours = f"{made['hours']:.2g} | {made['chip hours']:.2g}" if "hours" in made else " | "
    return (
        f"| {model} | {place} | {fits} | {inner['count']} | {needs} of {room:.1f} | "
        f"{write['count']} | {hours} |"
    )


def head(name: str) -> str:
    """Returns the comment on a cell's plan at the head of a configuration."""
    made = json.loads((PLANS / f"{name}.json").read_text())
    fits = {stage: (fit["count"], fit["bytes"] / GIB) for stage, fit in made["stages"].items()}
    floors = {
        limit: sum(stage[limit] for stage in made["round"].values())
        for limit in ("compute", "links", "memory")
    }
    slowest = sorted(floors, key=lambda limit: -floors[limit])
    return (
        f"# `plan` (benchmarks/results/plans/{name}.json; GiB a device, of "
        f"{made['bytes allowed'] * (1 - made['head-room']) / GIB:.2f}):\n"
        f"#   fits: {fits['inner'][0]} candidates at once ({fits['inner'][1]:.2f}), "
        f"{fits['write'][0]} self-edits at once ({fits['write'][1]:.2f}), "
        f"finetuning ({fits['finetune'][1]:.2f})\n"
        f"#   a round: {made['flops']:.2g} operations; floors: "
        + ", ".join(f"{limit} {floors[limit]:.0f} s" for limit in slowest if floors[limit])
        + f";\n#   about {made['hours']:.2g} h ({made['chip hours']:.2g} chip-hours) at "
        f"{made['assumed']['efficiency']:.0%} of them\n"
    )


def render() -> None:
    """Writes the table into the page, and the comments into configurations."""
    for file in CONFIGS.glob("*.yaml"):
        file.write_text(HEAD.sub(lambda found: head(found[1]), file.read_text()))
    lines = [
        BEGIN,
        "| model | slice | fits | candidates at once | GiB a device | self-edits at once | "
        "hours a round | chip-hours |",
        "|---|---|---|---|---|---|---|---|",
        *(row(model, place) for model in MODELS for place in SLICES),
        END,
    ]
    page = PAGE.read_text()
    start, stop = page.index(BEGIN), page.index(END) + len(END)
    PAGE.write_text(page[:start] + "\n".join(lines) + page[stop:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="compile nothing")
    parser.add_argument("--again", action="store_true", help="compile what is there, too")
    chosen = parser.parse_args()
    cells = [(model, place) for model in MODELS for place in SLICES]
    for model, place in sorted(cells, key=lambda c: ORDER.index(c) if c in ORDER else 99):
        if not chosen.render and (chosen.again or not cell_file(model, place).exists()):
            compile_cell(model, place)
            render()
    render()


if __name__ == "__main__":
    main()
