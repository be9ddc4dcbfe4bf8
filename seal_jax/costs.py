"""What a round costs on paper: operations, bytes moved, and the least time they take.

Counted from the architecture, not from the compiler, which counts a loop's body once.
"""

import math
from typing import NamedTuple

from jax.sharding import Mesh

from seal_jax import lora, sharding
from seal_jax import params as params_lib
from seal_jax.config import Config, Lora
from seal_jax.hardware import Chip
from seal_jax.params import ModelConfig


class Workload(NamedTuple):
    """What a round is assumed to do, where neither settings nor the model say.

    Attributes:
      lines: Training texts of a self-edit besides the passage.
      line: Tokens of one, padding included.
      passage: Tokens of a passage, padding included.
      prompt: Tokens of the prompt for a self-edit.
      written: Tokens of a self-edit.
      questions: Questions of a context; `question` tokens each.
      answer: Tokens until the last answer of a batch has ended.
      efficiency: Of the hardware's peak.
    """

    lines: int = 12
    line: int = 40
    passage: int = 320
    prompt: int = 384
    written: int = 480
    questions: int = 5
    question: int = 64
    answer: int = 64
    efficiency: float = 0.4


def workload(cfg: Config) -> Workload:
    """Returns what a round is assumed to do, within what its settings allow."""
    usual = Workload()
    return usual._replace(
        written=min(usual.written, cfg.sampling.max_tokens),
        answer=min(usual.answer, cfg.answers.max_tokens),
    )


class Floor(NamedTuple):
    """The least a stage takes: operations in all, and seconds on all devices by each limit."""

    flops: float
    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The least of the stage: what limits it most."""
        return max(self.compute, self.memory, self.links)


def matrix_numbers(config: ModelConfig) -> int:
    """Returns the numbers of all matrices that a token is multiplied with, the head included."""
    shapes = params_lib.shapes(config)
    layers = sum(math.prod(x.shape) for x in shapes.layers.values() if len(x.shape) == 3)
    return layers + config.vocab_size * config.d_model


def adapter_numbers(config: ModelConfig, settings: Lora) -> int:
    """Returns the numbers of one adapter."""
    tree = lora.shapes(config, settings)
    return sum(math.prod(x.shape) for x in (*tree.a.values(), *tree.b.values()))


def attention_flops(config: ModelConfig, length: int) -> float:
    """Returns the operations of causal attention over a text, forward."""
    return 2.0 * length * length * config.n_layers * config.n_heads * config.d_head


def train_flops(config: ModelConfig, settings: Lora, length: int) -> float:
    """Returns the operations of one step on one text: forward twice, and the gradient once.

    Layers are computed again in the backward pass; frozen weights have no gradient, adapters do.
    """
    base = 6.0 * matrix_numbers(config) * length
    own = 8.0 * adapter_numbers(config, settings) * length
    return base + own + 4.0 * attention_flops(config, length)


def cache_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Returns the bytes of one token's keys and values."""
    return 2 * config.n_layers * config.n_kv_heads * config.d_head * itemsize


def inner_loops(
    config: ModelConfig, cfg: Config, chip: Chip, mesh: Mesh, chunk: int, work: Workload
) -> Floor:
    """Returns the floor of all inner loops of a round, `chunk` candidates at a time."""
    loops = cfg.outer.contexts * cfg.sampling.n * cfg.outer.seeds
    lengths = [work.passage] + [work.line] * work.lines
    flops = loops * cfg.inner.epochs * sum(train_flops(config, cfg.lora, t) for t in lengths)
    size = cfg.inner.batch_size or len(lengths)
    steps = math.ceil(loops / chunk) * cfg.inner.epochs * math.ceil(len(lengths) / size)
    model, devices = 2 * matrix_numbers(config), mesh.size
    read = 3 * model / mesh.shape[sharding.MODEL]
    # Factors, two moments and the gradient are read, and all but the gradient written.
    state = 7 * 4 * adapter_numbers(config, cfg.lora) * chunk / mesh.shape[sharding.DATA]
    gathered = read * (1 - 1 / mesh.shape[sharding.DATA])
    return Floor(
        flops,
        flops / (devices * chip.flops),
        steps * (read + state) / chip.memory,
        steps * gathered / chip.links,
    )


def generation(
    config: ModelConfig,
    chip: Chip,
    mesh: Mesh,
    layout: sharding.Layout,
    *,
    sequences: int,
    at_once: int,
    prompts: int,
    prompt: int,
    written: int,
) -> Floor:
    """Returns the floor of generating, `at_once` sequences together on all devices."""
    numbers = matrix_numbers(config)
    flops = 2.0 * numbers * (prompts * prompt + sequences * written)
    flops += prompts * attention_flops(config, prompt)
    batches = math.ceil(sequences / at_once)
    own = sharding.bytes_per_device(config, mesh, layout, 2)
    whole = 2 * numbers / mesh.shape[sharding.MODEL]
    read = whole if layout == "fsdp" else own
    cache = cache_bytes(config) * (prompt + written / 2) * at_once / mesh.size
    gathered = whole * (1 - 1 / mesh.shape[sharding.DATA]) if layout == "fsdp" else 0.0
    return Floor(
        flops,
        flops / (mesh.size * chip.flops),
        batches * written * (read + cache) / chip.memory,
        batches * written * gathered / chip.links,
    )


def finetuning(config: ModelConfig, cfg: Config, chip: Chip, mesh: Mesh, work: Workload) -> Floor:
    """Returns the floor of finetuning the policy on the kept self-edits of a round."""
    sft = cfg.outer.sft
    rows = cfg.outer.contexts * (cfg.outer.keep or cfg.sampling.n)
    length = work.prompt + work.written
    flops = sft.epochs * rows * train_flops(config, sft.lora, length)
    steps = sft.epochs * math.ceil(rows / sft.batch_size)
    read = 3 * 2 * matrix_numbers(config) / mesh.shape[sharding.MODEL]
    gathered = read * (1 - 1 / mesh.shape[sharding.DATA])
    return Floor(
        flops,
        flops / (mesh.size * chip.flops),
        steps * read / chip.memory,
        steps * gathered / chip.links,
    )


def round_of(
    config: ModelConfig,
    cfg: Config,
    chip: Chip,
    mesh: Mesh,
    layout: sharding.Layout,
    *,
    chunk: int,
    writers: int,
    work: Workload,
) -> dict[str, Floor]:
    """Returns the floor of each stage of a round.

    Args:
      chunk: Candidates in one program.
      writers: Self-edits written at once.
    """
    edits = cfg.outer.contexts * cfg.sampling.n
    answers = edits * cfg.outer.seeds * work.questions
    return {
        "write self-edits": generation(
            config,
            chip,
            mesh,
            layout,
            sequences=edits,
            at_once=min(writers, edits),
            prompts=cfg.outer.contexts,
            prompt=work.prompt,
            written=work.written,
        ),
        "inner loops": inner_loops(config, cfg, chip, mesh, chunk, work),
        "answer": generation(
            config,
            chip,
            mesh,
            layout,
            sequences=answers,
            at_once=chunk * work.questions,
            prompts=answers,
            prompt=work.question,
            written=work.answer,
        ),
        "finetune": finetuning(config, cfg, chip, mesh, work),
    }
