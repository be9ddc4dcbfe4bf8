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
from seal_jax.progress import say

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
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        if memory is None:  # a CPU: its devices share the machine's memory
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
        return Place(f"{len(devices)} x {kind}", devices, hardware.gpu(kind), memory)
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
    import jax

    from seal_jax import architecture, costs, plan_stages, programs, readers, sharding

    cfg, place = request.settings, _place(request.topology)
    config = architecture.find(cfg.model.path, cfg.model.revision)
    mesh = sharding.make(cfg.mesh, place.devices)
    itemsize = programs.weights(config, mesh, dtype=cfg.model.dtype).embed.dtype.itemsize
    layout, copy = "fsdp", 0
    weights = sharding.bytes_per_device(config, mesh, "fsdp", itemsize)
    if mesh.size > 1:
        layout = sharding.decode_layout(config, cfg.mesh, mesh, itemsize, place.limit)
        if layout != "fsdp":
            copy = sharding.bytes_per_device(config, mesh, layout, itemsize)
    elif readers.takes_a_copy(config, weights, place.devices[0], place.limit):
        layout = "apart"
        apart = programs.weights(config, mesh, layout, cfg.model.dtype)
        copy = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(apart))
    own = plan_stages.Setting(
        cfg=cfg,
        config=config,
        mesh=mesh,
        limit=int(place.limit * (1 - hardware.HEAD_ROOM)),
        layout=layout,
        weights=weights,
        copy=copy,
        itemsize=itemsize,
        tokens=min(request.tokens, cfg.inner.max_length),
        work=costs.workload(cfg),
        tell=lambda text: tell(f"{place.name}: {text}"),
    )
    wanted, stages = request.candidates or cfg.inner.chunk, {}
    if "inner" in request.stages:
        stages["inner"] = plan_stages.inner(own, wanted)
    chunk = stages["inner"].count if "inner" in stages else wanted or own.parts
    if "answer" in request.stages and chunk:
        stages["answer"] = plan_stages.answer(own, chunk)
    if "write" in request.stages:
        stages["write"] = plan_stages.write(own)
    if "finetune" in request.stages:
        stages["finetune"] = plan_stages.finetune(own)
    result = {
        "model": cfg.model.path,
        "devices": place.name,
        "count": mesh.size,
        "mesh": dict(mesh.shape),
        "decode layout": layout if mesh.size > 1 else "whole",
        "bytes allowed": place.limit,
        "head-room": hardware.HEAD_ROOM,
        "tokens": own.tokens,
        "lora": dataclasses.asdict(cfg.lora),
        "fits": all(fit.fits for fit in stages.values()),
        "held": {
            "weights": own.weights,
            "weights laid out for generation": copy,
            "one adapter": own.adapter,
            "one adapter's moments and gradient": 3 * own.adapter,
        },
        "stages": {name: fit._asdict() for name, fit in stages.items()},
    }
    if place.chip is None or not chunk:
        return result
    writers = stages["write"].count if "write" in stages else 0
    counts = {"chunk": chunk, "writers": writers or own.parts}
    floors = costs.round_of(config, cfg, place.chip, mesh, layout, work=own.work, **counts)
    hours = sum(floor.seconds for floor in floors.values()) / own.work.efficiency / 3600
    settings = {
        "contexts": cfg.outer.contexts,
        "self-edits": cfg.sampling.n,
        "seeds": cfg.outer.seeds,
        "epochs": cfg.inner.epochs,
    }
    return result | {
        "peak": place.chip._asdict(),
        "round": {name: x._asdict() | {"seconds": x.seconds} for name, x in floors.items()},
        "flops": sum(floor.flops for floor in floors.values()),
        "hours": hours,
        "chip hours": hours * mesh.size * place.chip.chips,
        "assumed": own.work._asdict() | settings,
    }
