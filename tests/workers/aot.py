"""Compiles the real programs of Qwen2.5-7B for a v5e-8 that is not there; prints facts as JSON."""

import json
import re
import sys

from jax.experimental import topologies

from seal_jax import architecture, config, hardware, plan, plan_text, programs, sharding

TOKENS = 1024
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(hlo: str) -> list[str]:
    return [line.strip() for line in hlo.splitlines() if _COLLECTIVE.search(line)]


def main() -> None:
    wanted = hardware.slice_of("v5e-8")
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=wanted.topology, **wanted.options
    )
    cfg = config.load_config(sys.argv[1], ["lora.targets=[q,k,v,o,gate,up,down]"])
    mesh = sharding.make(cfg.mesh, list(found.devices))
    model = architecture.find(cfg.model.path)
    facts = {"allowed": hardware.MEMORY["v5e"], "rank": cfg.lora.rank, "devices": mesh.size}
    made, compiled = [], programs.compiled
    programs.compiled = lambda lowered: made.append(compiled(lowered)) or made[-1]

    def inner_loops(candidates: int) -> dict:
        request = plan.Request(cfg, "v5e-8", TOKENS, candidates=candidates, stages=("inner",))
        return plan.compile_all(request, lambda text: None)

    facts["inner 24"] = inner_loops(24)["stages"]["inner"]
    hlo = made[0].as_text()
    facts |= {
        "kernels": hlo.count('custom_call_target="tpu_custom_call"'),
        "float64": "f64[" in hlo,
        "transfers": [word for word in ("infeed", "outfeed", "host-compute") if f" {word}(" in hlo],
        "collectives": collectives(hlo),
    }
    refused = inner_loops(32)
    facts |= {"inner 32": refused["stages"]["inner"], "verdict 32": plan_text.verdict(refused)}
    facts["inner 80"] = inner_loops(80)["stages"]["inner"]
    layout = sharding.decode_layout(model, cfg.mesh, mesh, 2, hardware.MEMORY["v5e"])
    program = programs.compiled(programs.answering(model, cfg, mesh, 32, 8, 64, layout))
    facts |= {"layout": layout, "answer 32": programs.memory(program)._asdict()}
    facts["answer collectives"] = collectives(program.as_text())
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
