"""Settings of a run: frozen dataclasses, read from YAML, overridden by `key=value`.

The method's defaults are the paper's values for knowledge incorporation (see `configs/` for the
others); the model is the built-in one, and the judge works offline. Every field is written into the
run folder, so a run can be repeated from its folder alone.
"""

import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from seal_jax import config_tree
from seal_jax.errors import SealError

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
ALL_TARGETS: tuple[Target, ...] = ("q", "k", "v", "o", "gate", "up", "down")
Fraction = typing.Annotated[float, pydantic.Field(gt=0, le=1)]
Share = typing.Annotated[float, pydantic.Field(ge=0, lt=1)]
Count = typing.Annotated[int, pydantic.Field(ge=0, lt=1 << 31)]
Positive = typing.Annotated[int, pydantic.Field(ge=1, lt=1 << 31)]
# JAX takes 32 bits of a seed: of larger ones, and of negative ones, two would be the same.
Seed = typing.Annotated[int, pydantic.Field(ge=0, lt=1 << 32)]
Rate = typing.Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Finite = typing.Annotated[float, pydantic.Field(allow_inf_nan=False)]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("one of them appears twice")
    return names


@dataclass(frozen=True)
class Model:
    """Which language model."""

    path: str = "tiny-world"
    """Folder in Hugging Face format, hub id, or a built-in model: tiny-world, tiny-grids."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights; auto is bfloat16 on accelerators and float32 on a CPU."""


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter; its product is scaled by alpha / rank."""

    rank: Positive = 32
    alpha: Finite = 64.0
    targets: typing.Annotated[
        tuple[Target, ...], pydantic.Field(min_length=1), pydantic.AfterValidator(_distinct)
    ] = ("q", "v")


@dataclass(frozen=True)
class Inner:
    """The inner loop: how one self-edit is applied (paper section 3.1)."""

    learning_rate: Rate = 1e-3
    epochs: Count = 10
    batch_size: Count = 1
    """Texts per optimizer step; 0 takes all texts of a self-edit in every step."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Count = 0
    weight_decay: Rate = 0.0
    clip: Rate = 1.0
    """Global norm of the gradient; 0 does not clip."""
    max_length: Positive = 2048
    """Tokens of one training text; longer ones are cut."""
    max_steps: Count = 0
    """A self-edit asking for more steps trains nothing; 0 is no limit. Of a last batch that is not
    full a part counts, as in the reference."""
    pad_loss: bool = False
    """Train on padding up to max_length, as the reference does; for fidelity checks only."""
    chunk: Count = 0
    """Candidates adapted at a time; 0: the most that fit into a GPU or TPU, few on a CPU."""
    remat: Literal["auto", "none", "layers"] = "auto"
    """Recompute activations in the backward pass, a layer at a time; auto: on accelerators, unless
    they fit beside half as many candidates."""


@dataclass(frozen=True)
class Sampling:
    """How self-edits are written."""

    n: Positive = 5
    """Self-edits for each context."""
    temperature: Rate = 1.0
    top_p: Fraction = 0.95
    max_tokens: Positive = 8192
    retries: Count = 3
    """How often a self-edit that cannot be applied is written again, before it counts as none."""
    chunk: Count = 0
    """Sequences decoded together; 0 chooses by the device and its memory."""


@dataclass(frozen=True)
class Answers:
    """How questions are answered, always greedily."""

    max_tokens: Positive = 64
    chunk: Count = 0
    """Sequences decoded together; 0 chooses by the device and its memory."""


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning of the policy on kept self-edits (the M-step)."""

    method: Literal["lora", "full"] = "lora"
    lora: Lora = Lora(rank=64, alpha=128.0, targets=ALL_TARGETS)
    learning_rate: Rate = 3e-4
    epochs: Positive = 2
    batch_size: Positive = 10
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Count = 0
    weight_decay: Rate = 0.0
    clip: Rate = 1.0
    max_length: Positive = 8192
    replay: Share = 0.0
    """Share of rows that are self-edits of the round drawn at random, which keeps a policy from
    collapsing on few rewarded ones."""


@dataclass(frozen=True)
class Outer:
    """The outer loop: rounds of ReST-EM."""

    rounds: Count = 2
    contexts: Positive = 50
    """New contexts in each round."""
    seeds: Positive = 3
    """Inner loops per self-edit; its reward is their mean."""
    keep: Count = 1
    """Best self-edits kept of each context; 0 keeps all that reach min_reward."""
    min_reward: Finite | None = None
    """Self-edits below it are never kept; the paper has no threshold for SQuAD, 1 for ARC."""
    adapt: Literal["policy", "base"] = "policy"
    """Which model applies a self-edit: the policy that wrote it, or the model before any round, so
    that a change in reward comes from the self-edits alone."""
    reward_untrained: bool = True
    """A self-edit that trains nothing scores as the bare model, as in the reference; else 0."""
    control: bool = False
    """Also train a control policy on a random self-edit of each context instead of the best."""
    sft: Sft = Sft()


@dataclass(frozen=True)
class Cpt:
    """Continued pretraining: one model trained on the self-edits of all contexts."""

    method: Literal["lora", "full"] = "lora"
    """An adapter as `lora` says, or all weights; `inner` says how."""
    questions: Count = 0
    """Ask a sample of this size; 0 asks all."""


@dataclass(frozen=True)
class Continual:
    """Passages one after the other, each adapter merged."""

    sequences: Positive = 8
    """Drawn from the contexts, each for itself."""
    length: Positive = 8
    """Passages of a sequence."""


@dataclass(frozen=True)
class Evaluation:
    """The table at the end of a run, and the command `eval`, on held-out contexts."""

    contexts: Count = 0
    """Held-out contexts; with 0 a run evaluates nothing, and `eval` all of them."""
    seeds: Positive = 1
    """Inner loops per self-edit; its reward is their mean."""
    n: Positive = 1
    """Self-edits written for each held-out context."""
    references: tuple[str, ...] | None = None
    """Reference self-edits to compare with, by name; null takes all that the task has."""
    policy: str | None = None
    """What `eval` tests, such as runs/x/round_1/policy; null is the model itself."""
    self_edits: str = "own"
    """What `eval` applies: own (the policy writes them), file (they came with the contexts), or the
    task's reference of this name, such as passage."""
    cpt: Cpt = Cpt()
    continual: Continual = Continual()


@dataclass(frozen=True)
class OpenAI:
    """An OpenAI-compatible endpoint as judge; the key comes from the environment only."""

    model: str = "gpt-4.1"
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: Positive = 16
    """Requests under way at a time."""
    retries: Count = 6
    timeout_s: Rate = 60.0
    """For a whole reply; 0 is no limit."""
    max_calls: Count = 0
    """Calls allowed, retries included, before the run stops with an error; each start of a command
    counts anew. 0 is no limit."""
    cache: str = "~/.cache/seal_jax/judge"
    """Folder of the verdicts given so far."""


@dataclass(frozen=True)
class Arc:
    """Settings of the few-shot task (ARC)."""

    solutions: str | None = None
    """Kaggle's file of solutions to `task.path`; null: they are in that file."""
    held_out_solutions: str | None = None
    """The same for `task.held_out`."""
    format: Literal["llama", "compact"] = "llama"
    """Grid text: the reference's chat text, or one token per cell for tiny models."""
    max_examples: Positive = 250
    """Training examples of a self-edit; of more a random choice is taken."""
    max_tokens: Positive = 8192
    """Training examples and queries that are not shorter are dropped."""
    permutations: Count = 1
    """Random orders of the demonstrations in which a query is asked, besides their own."""
    reference_quirks: bool = False
    """Draw, write and read as the reference does, its oddities included; for fidelity checks."""
    grammar: bool = False
    """Sample self-edits under a grammar: each that ends within its tokens is valid JSON."""


@dataclass(frozen=True)
class Task:
    """What the model learns from: contexts, how to ask for self-edits, how to grade."""

    name: str = "squad"
    """squad, arc, tiny-world, tiny-grids, or `package.module:factory` (called with this group)."""
    path: str | None = None
    """Training contexts: a file in SEAL's or SQuAD's format, or a hub id."""
    held_out: str | None = None
    """Held-out contexts; without it those that `size` leaves of `path`, none where it is 0."""
    order_seed: int | None = 42
    """Shuffle of the contexts, as the reference's `random.seed(42)`; null keeps file order."""
    style: Literal[
        "implications",
        "implications-long",
        "implications-very-long",
        "implications-chain-of-thought",
        "rewrite",
        "self-qa",
        "none",
        "compact",
    ] = "implications"
    """How a self-edit is asked for (paper section B.11); compact is the tiny world's."""
    chat: bool = False
    """Prompts for instruction-tuned models, in Qwen's marks as the reference writes them."""
    split_newlines: bool = True
    """Each line of a self-edit is its own training text."""
    judge: Literal["offline", "exact", "openai", "model"] = "offline"
    """Who says which answers about passages are right; ARC and the tiny tasks compare them."""
    judge_model: str | None = None
    """Model of the judge `model`: a folder or hub id; null is the run's own, before any round."""
    openai: OpenAI = OpenAI()
    arc: Arc = Arc()
    size: Count = 0
    """Contexts taken from `path` (tiny tasks: generated); 0 is all."""
    seed: int = 0
    """Of generated worlds, and of ARC's augmentations and orders of demonstrations."""


@dataclass(frozen=True)
class Mesh:
    """How devices share the work; one device needs none of it."""

    data: Count = 0
    """Devices that share out candidates and keep parts of the weights; 0 is all that remain."""
    model: Positive = 1
    """Devices that share out heads, feed-forward and vocabulary of one candidate."""
    decode: Literal["auto", "fsdp", "tensor", "replicated"] = "auto"
    """Weights while generating: gathered for each token, split over all devices, or whole along
    `data`; auto takes what fits, the fastest first."""


@dataclass(frozen=True)
class Distributed:
    """Processes of one run, on one machine or many."""

    detect: Literal["auto", "always", "never"] = "auto"
    """Ask JAX for the other processes; auto: where the environment tells of several (Slurm, GKE).
    On TPU virtual machines of several hosts: always."""

    coordinator: str | None = None
    """host:port of process 0, reachable from all others."""
    processes: Count = 0
    process_id: Count | None = None
    """Of this process, from 0."""
    start_s: Positive = 300
    """Seconds to wait for the others at the start."""
    heartbeat_s: Positive = 30
    """Seconds until a machine that went dark is lost; a killed process is noticed at once."""


@dataclass(frozen=True)
class Compiler:
    """Flags of XLA, in force from the start of the process on."""

    xla_flags: tuple[str, ...] = ()
    """Such as --xla_gpu_enable_latency_hiding_scheduler=true; added to XLA_FLAGS."""
    libtpu_flags: tuple[str, ...] = ()
    """Such as --xla_tpu_scoped_vmem_limit_kib=32768; added to LIBTPU_INIT_ARGS."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    seed: Seed = 0
    model: Model = Model()
    task: Task = Task()
    lora: Lora = Lora()
    inner: Inner = Inner()
    sampling: Sampling = Sampling()
    answers: Answers = Answers()
    outer: Outer = Outer()
    evaluation: Evaluation = Evaluation()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
    compiler: Compiler = Compiler()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = field(default=())
    """Where scalars go besides metrics.jsonl."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Returns the settings in a YAML file, changed by `key=value` overrides.

    Args:
      path: A YAML file, or None for the defaults.
      overrides: Such as `inner.epochs=5`; values are YAML.

    Raises:
      SealError: names the file and key, and suggests the nearest known key.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = config_tree.read(Path(path))
    return _build(tree, str(path) if path is not None else "configuration", overrides)


def parse(text: bytes, origin: str) -> Config:
    """Returns the settings in the text of a YAML file; `origin` names it in SealErrors."""
    return _build(config_tree.parse(text, origin), origin)


def _build(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    tree = config_tree.overridden(tree, Config, origin, overrides)
    try:
        return pydantic.TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if any(f"{key}.".startswith(f"{item.partition('=')[0]}.") for item in overrides):
            origin = "override"
        said = first["msg"]
        if first["type"] == "tuple_type":
            said = f"expected a list, such as [{first['input']}]"
        raise SealError(f"{origin}: {key}={first['input']!r}: {said}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a group of settings as plain dicts, lists and scalars."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(tree: dict[str, Any]) -> Config:
    """Returns the settings that `to_dict` made plain."""
    return pydantic.TypeAdapter(Config).validate_python(tree)


def dump(config: Config) -> str:
    """Returns the settings as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
