"""Does it fit, and what does it cost? Answered by compiling the real programs, without the chips.

The compiling is done by a process of its own (`worker`), with the environment libtpu needs.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from seal_jax import config as config_lib
from seal_jax import hardware
from seal_jax.config import Config
from seal_jax.errors import SealError
from seal_jax.plan_search import Fit, search
from seal_jax.progress import say

HEAD_ROOM = 0.1
_WORKER = "import sys; from seal_jax import plan; sys.exit(plan.worker())"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # not on a TPU machine: ask no metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # such programs cannot be read back
}


class Request(NamedTuple):
    """What is to be planned; `topology` None is the machine this runs on.

    Attributes:
      tokens: Of the longest training text.
      candidates: Compile for this many alone, instead of searching the most that fit.
      stages: The programs to compile.
    """

    settings: Config
    topology: str | None = None
    tokens: int = 1024
    candidates: int = 0
    stages: tuple[str, ...] = ("inner", "answer", "write", "finetune")


def make(request: Request) -> dict[str, Any]:
    """Returns the plan, as JSON has it.

    Raises:
      SealError: where the topology or the model is not known, or libtpu is missing.
    """
    env = dict(os.environ)
    if request.topology is not None:
        hardware.slice_of(request.topology)
        if importlib.util.find_spec("libtpu") is None:
            raise SealError(
                "plans for a TPU need its compiler, libtpu: pip install 'seal_jax[tpu]' "
                "(no TPU is needed)"
            )
        env |= ENVIRONMENT
        env.setdefault("JAX_OPTIMIZATION_LEVEL", "O1")  # a third of the time to compile
    told = request._asdict() | {"settings": config_lib.to_dict(request.settings)}
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as noise:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": noise}
        child = subprocess.Popen([sys.executable, "-c", _WORKER], text=True, env=env, **pipes)
        with child:
            child.stdin.write(json.dumps(told))
            child.stdin.close()
            for line in child.stdout:
                answer = _heard(line) or answer
        noise.seek(0)
        last = [line.strip() for line in noise if line.strip()][-1:]
    if "error" in answer:
        raise SealError(answer["error"])
    if "plan" not in answer:
        raise SealError(f"planning stopped with status {child.returncode}: {''.join(last)}")
    return answer["plan"]


def _heard(line: str) -> dict[str, Any] | None:
    """Returns the worker's answer, says its progress, drops what libraries print."""
    if not line.startswith('{"'):
        return None
    message = json.loads(line)
    if "say" in message:
        say(message["say"])
        return None
    return message


def worker() -> int:
    """Reads a request on standard input, answers on standard output; returns the exit status."""
    told = json.load(sys.stdin)
    settings = config_lib.from_dict(told.pop("settings"))
    tell = lambda **message: print(json.dumps(message), flush=True)
    told["stages"] = tuple(told["stages"])
    try:
        tell(plan=compile_all(Request(settings, **told), lambda text: tell(say=text)))
    except SealError as error:
        tell(error=str(error))
    return 0


class Place(NamedTuple):
    """Devices to plan for: there, or only described."""

    name: str
    devices: list[Any]
    chip: hardware.Chip | None
    limit: int  # bytes a program may use on a device


def _place(topology: str | None) -> Place:
    import jax

    if topology is None:
        devices = jax.devices()
        kind = devices[0].device_kind
        chip = next((c for name, c in hardware.GPUS.items() if name in kind), None)
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        if memory is None:  # a CPU: its devices share the machine's memory
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
        return Place(f"{len(devices)} x {kind}", devices, chip, memory)
    from jax.experimental import topologies

    wanted = hardware.slice_of(topology)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=wanted.topology, **wanted.options
        )
    except Exception as error:  # of many kinds
        text = str(error).strip().splitlines()
        raise SealError(f"--topology {topology}: libtpu refuses it: {text[0]}") from error
    return Place(topology, list(found.devices), wanted.chip, hardware.MEMORY[wanted.kind])


def compile_all(request: Request, tell: Callable[[str], None]) -> dict[str, Any]:
    """Returns the plan; compiles in this process, which must have the environment for it."""
    from seal_jax import architecture, costs, inner, programs, sampling, sharding

    cfg, place = request.settings, _place(request.topology)
    config = architecture.find(cfg.model.path)
    mesh = sharding.make(cfg.mesh, place.devices)
    parts, limit = sharding.data_size(mesh), int(place.limit * (1 - HEAD_ROOM))
    weights = programs.weights(config, mesh)
    itemsize = weights.embed.dtype.itemsize
    layout = sharding.decode_layout(config, cfg.mesh, mesh, itemsize, place.limit)
    held = {"weights": sharding.bytes_per_device(config, mesh, "fsdp", itemsize)}
    held["weights laid out for generation"] = 0
    if mesh.size > 1 and layout != "fsdp":
        held["weights laid out for generation"] = sharding.bytes_per_device(
            config, mesh, layout, itemsize
        )
    elif mesh.size == 1:
        layout = "fsdp"
    copy = held["weights laid out for generation"]
    work = costs.Workload()

    def measure(label: str, lower: Callable[[int], Any], extra: int) -> Callable[[int], Fit]:
        def at(count: int) -> Fit:
            tell(f"compiling {label} for {place.name}: {count} at once")
            try:
                memory = programs.memory(programs.compiled(lower(count)))
            except programs.TooBig as error:
                return Fit(count, error.needed and error.needed + extra, None, False)
            total = memory.total + extra
            return Fit(count, total, memory._asdict() | {"held besides": extra}, total <= limit)

        return at

    def find(at: Callable[[int], Fit], wanted: int, unit: int, most: int, first: int) -> Any:
        if wanted:
            return at(-(-wanted // unit) * unit)
        return search(at, limit, unit, max(unit, -(-most // unit) * unit), first)

    edits = cfg.outer.contexts * cfg.sampling.n
    sequence = costs.cache_bytes(config, itemsize) * (work.prompt / cfg.sampling.n)
    sequence += costs.cache_bytes(config, itemsize) * cfg.sampling.max_tokens
    sequence += 6 * 4 * config.vocab_size  # logits, sorted and not
    room = max(limit - held["weights"] - copy, 0) * mesh.size / sequence
    adapter = 4 * 4 * costs.adapter_numbers(config, cfg.lora)
    tokens = min(request.tokens, cfg.inner.max_length)
    own = request.candidates or cfg.inner.chunk
    stages: dict[str, Fit] = {}
    if "inner" in request.stages:
        at = measure(
            f"the inner loop of {tokens} tokens",
            lambda c: programs.inner_loop(config, cfg, mesh, c, tokens),
            copy,
        )
        # Adapter, moments, gradient; inputs of layers; a layer at work; some logits.
        each = adapter + itemsize * tokens * (config.n_layers * config.d_model + 6 * config.d_ff)
        each += 2 * 4 * 128 * config.vocab_size
        guess = max(limit - held["weights"] - copy, 0) * parts / each
        stages["inner"] = find(at, own, parts, edits, int(guess))
    chunk = stages["inner"].count if "inner" in stages else own or parts
    if "answer" in request.stages and chunk:
        # A tile holds as many adapters as its rows permit; all of the chunk's stay in memory.
        rows = (cfg.answers.chunk or parts * sampling.ROWS["other"]) // (8 * parts)
        tile = max(1, min(chunk // parts, rows)) * parts
        extra = held["weights"] if copy else 0
        extra += adapter // 4 * (chunk if tile < chunk else 0) // parts
        at = measure(
            "answers",
            lambda c: programs.answering(config, cfg, mesh, c, 8, work.question, layout),
            extra,
        )
        stages["answer"] = at(tile)
    if "write" in request.stages:
        unit = parts * cfg.sampling.n
        at = measure(
            f"self-edits of {cfg.sampling.max_tokens} tokens",
            lambda c: programs.writing(config, cfg, mesh, c, work.prompt, layout),
            held["weights"] if copy else 0,
        )
        stages["write"] = find(at, cfg.sampling.chunk, unit, edits, int(0.8 * room))
    if "finetune" in request.stages:
        length = min(cfg.outer.sft.max_length, work.prompt + cfg.sampling.max_tokens, 1024)
        # The weights before and after the merge are there together.
        at = measure(
            f"finetuning on texts of {length} tokens",
            lambda c: programs.finetuning(config, cfg, mesh, length),
            held["weights"] + copy,
        )
        stages["finetune"] = at(cfg.outer.sft.batch_size)
    result = {
        "model": cfg.model.path,
        "devices": place.name,
        "count": mesh.size,
        "mesh": dict(mesh.shape),
        "decode layout": layout if mesh.size > 1 else "whole",
        "bytes allowed": place.limit,
        "head-room": HEAD_ROOM,
        "tokens": tokens,
        "lora": dataclasses.asdict(cfg.lora),
        "fits": all(fit.fits for fit in stages.values()),
        "held": held
        | {
            "one adapter": adapter // 4,
            "one adapter's moments and gradient": 3 * adapter // 4,
        },
        "stages": {name: fit._asdict() for name, fit in stages.items()},
        "recomputed layers": inner.recompute(cfg.inner) or cfg.inner.remat != "none",
    }
    if place.chip is not None and chunk:
        writers = stages["write"].count if "write" in stages else 0
        floors = costs.round_of(
            config,
            cfg,
            place.chip,
            mesh,
            layout,
            chunk=chunk,
            writers=writers or parts,
            work=work,
        )
        seconds = sum(floor.seconds for floor in floors.values()) / work.efficiency
        result |= {
            "peak": place.chip._asdict(),
            "round": {k: f._asdict() | {"seconds": f.seconds} for k, f in floors.items()},
            "flops": sum(f.flops for f in floors.values()),
            "hours": seconds / 3600,
            "chip hours": seconds / 3600 * mesh.size * place.chip.chips,
            "assumed": work._asdict()
            | {
                "contexts": cfg.outer.contexts,
                "self-edits": cfg.sampling.n,
                "seeds": cfg.outer.seeds,
                "epochs": cfg.inner.epochs,
            },
        }
    return result
