"""A plan as text."""

from typing import Any

from seal_jax.hardware import GIB

_NAMES = {
    "inner": ("inner loops", "candidates"),
    "answer": ("answers", "candidates"),
    "write": ("self-edits", "sequences"),
    "finetune": ("finetuning", "texts a step"),
}


def verdict(plan: dict[str, Any]) -> str:
    """Returns one line: does it fit, how many candidates, how long."""
    if not plan["fits"]:
        bad = [_NAMES[name][0] for name, fit in plan["stages"].items() if not fit["fits"]]
        return f"{plan['model']} on {plan['devices']}: does NOT fit ({', '.join(bad)})"
    parts = [f"{plan['model']} on {plan['devices']}: fits"]
    for name in ("inner", "write"):
        if name in plan["stages"]:
            parts.append(f"{plan['stages'][name]['count']} {_NAMES[name][1]} at once")
    if "hours" in plan:
        parts.append(f"about {plan['hours']:.2g} h ({plan['chip hours']:.2g} chip-hours) a round")
    return ", ".join(parts)


def text(plan: dict[str, Any]) -> str:
    """Returns the whole plan, a screenful."""
    allowed = plan["bytes allowed"] * (1 - plan["head-room"])
    lora = plan["lora"]
    lines = [
        verdict(plan),
        f"mesh: {plan['mesh']['data']} data x {plan['mesh']['model']} model; weights while "
        f"generating: {plan['decode layout']}",
        f"inner adapters: rank {lora['rank']} on {' '.join(lora['targets'])}; training texts up "
        f"to {plan['tokens']} tokens",
        "",
        f"GiB on each device, of {_gib(plan['bytes allowed'])} less "
        f"{plan['head-room']:.0%} head-room = {_gib(allowed)}:",
    ]
    lines += [f"  {_gib(size):>7}  {kind}" for kind, size in plan["held"].items() if size]
    lines += ["", f"  {'program':<13}{'at once':>22}{'needs':>8}  of which arguments, temporaries"]
    for name, fit in plan["stages"].items():
        label, unit = _NAMES[name]
        needs = _gib(fit["bytes"]) if fit["bytes"] else "too much"
        kinds = ""
        if fit["kinds"]:
            kinds = f"  {_gib(fit['kinds']['arguments'])}, {_gib(fit['kinds']['temporaries'])}"
        refused = "" if fit["fits"] else "  REFUSED"
        lines.append(f"  {label:<13}{fit['count']:>9} {unit:<12}{needs:>8}{kinds}{refused}")
    if "round" in plan:
        lines += ["", *_time(plan)]
    return "\n".join(lines)


def _time(plan: dict[str, Any]) -> list[str]:
    chip, work = plan["peak"], plan["assumed"]
    lines = [
        f"A round: {work['contexts']} contexts x {work['self-edits']} self-edits x "
        f"{work['seeds']} seeds; {plan['flops']:.2g} operations. Least seconds by each limit "
        f"(each device: {chip['flops'] / 1e12:.0f} TFLOP/s, {chip['memory'] / 1e9:.0f} GB/s "
        f"memory, {chip['links'] / 1e9:.0f} GB/s links):",
        f"  {'stage':<18}{'compute':>9}{'memory':>9}{'links':>9}",
    ]
    for stage, floor in plan["round"].items():
        cells = "".join(f"{floor[kind]:>9.1f}" for kind in ("compute", "memory", "links"))
        lines.append(f"  {stage:<18}{cells}")
    lines += [
        f"Estimate: {plan['hours']:.2g} h, {plan['chip hours']:.2g} chip-hours, assuming "
        f"{work['efficiency']:.0%} of the larger floor of each stage,",
        f"  self-edits of {work['written']} tokens giving {work['lines']} texts of {work['line']} "
        f"tokens and one of {work['passage']}, {work['epochs']} epochs,",
        f"  {work['questions']} questions of {work['question']} tokens with answers of "
        f"{work['answer']}. Not measured on such a device.",
    ]
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
