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
    program = programs.compiled(programs.inner_loop(model, cfg, mesh, 40, TOKENS))
    hlo = program.as_text()
    facts |= {
        "inner 40": programs.memory(program)._asdict(),
        "kernels": hlo.count('custom_call_target="tpu_custom_call"'),
        "float64": "f64[" in hlo,
        "transfers": [word for word in ("infeed", "outfeed", "host-compute") if f" {word}(" in hlo],
        "collectives": collectives(hlo),
    }
    request = plan.Request(cfg, "v5e-8", TOKENS, candidates=64, stages=("inner",))
    refused = plan.compile_all(request, lambda text: None)
    facts |= {"inner 64": refused["stages"]["inner"], "verdict 64": plan_text.verdict(refused)}
    try:
        programs.compiled(programs.inner_loop(model, cfg, mesh, 80, TOKENS))
        facts["inner 80"] = "compiled"
    except programs.TooBig as error:
        facts["inner 80"] = error.needed
    layout = sharding.decode_layout(model, cfg.mesh, mesh, 2, hardware.MEMORY["v5e"])
    program = programs.compiled(programs.answering(model, cfg, mesh, 32, 8, 64, layout))
    facts |= {"layout": layout, "answer 32": programs.memory(program)._asdict()}
    facts["answer collectives"] = collectives(program.as_text())
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
