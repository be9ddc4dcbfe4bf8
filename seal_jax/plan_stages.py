"""The four programs of a round, compiled at the counts asked for or at the largest that fit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from seal_jax import costs, lanes, programs, sharding, visits
from seal_jax import rows as rows_lib
from seal_jax.batching import Batch, Candidate, Text
from seal_jax.config import Config
from seal_jax.costs import Workload
from seal_jax.params import ModelConfig
from seal_jax.plan_search import Fit, search

_QUESTIONS = 8  # answered together under an adapter: five, made up to a power of two
_SFT_TOKENS = 1024


class Setting(NamedTuple):
    """What all stages of a plan share.

    Attributes:
      limit: Bytes a program may use on a device, head-room taken off.
      layout: Of the weights while generating.
      weights: Bytes of the weights on a device.
      copy: Bytes of their second copy there, laid out for generation; 0 without one.
      tokens: Of the longest training text.
      tell: Hears what is being compiled.
    """

    cfg: Config
    config: ModelConfig
    mesh: Mesh
    limit: int
    layout: sharding.Layout
    weights: int
    copy: int
    itemsize: int
    tokens: int
    work: Workload
    tell: Callable[[str], None]

    @property
    def parts(self) -> int:
        """Devices that share out candidates."""
        return sharding.data_size(self.mesh)

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def adapter(self) -> int:
        """Bytes of one adapter."""
        return 4 * costs.adapter_numbers(self.config, self.cfg.lora)

    @property
    def free(self) -> int:
        """Bytes that the weights leave."""
        return max(self.limit - self.weights - self.copy, 0)


def inner(own: Setting, wanted: int) -> Fit:
    """Returns the inner loop of `wanted` candidates, or of the most that fit (0)."""
    edits = own.cfg.outer.contexts * own.cfg.sampling.n
    label = f"the inner loop of {own.tokens} tokens"
    if not sharding.splits_adapters(own.mesh):
        guess = own.parts * own.free // ((4 + 3 * lanes.GROUP) * own.adapter)
        besides = own.copy if own.mesh.size > 1 else own.weights if own.copy else 0
        at = _at(own, label, functools.partial(_lanes, own), besides)
        return _find(own, at, wanted, own.parts, edits, guess)
    # Adapter, moments, gradient; inputs of layers; a layer at work; some logits.
    each = 4 * own.adapter + 2 * 4 * 128 * own.config.vocab_size
    width = own.config.n_layers * own.config.d_model + 6 * own.config.d_ff
    guess = own.free * own.parts / (each + own.itemsize * own.tokens * width)
    lower = lambda c: programs.inner_loop(own.config, own.cfg, own.mesh, c, own.tokens)
    at = _at(own, label, _program(lower), own.copy)
    return _find(own, at, wanted, own.parts, edits, int(guess))


def _largest_call(own: Setting, count: int) -> lanes.Call:
    """Returns the largest call with `count` candidates resident on all devices."""
    work, cfg = own.work, own.cfg
    text = lambda size: Text(np.zeros(size, np.int32), np.ones(size, np.int8), size)
    usual = (text(min(work.passage, own.tokens)), *[text(min(work.line, own.tokens))] * work.lines)
    made = lambda *texts: Candidate(texts, cfg.inner.learning_rate, cfg.inner.epochs, 0)
    many = max(count, cfg.outer.contexts * cfg.sampling.n)
    batch = Batch((made(text(own.tokens)), *[made(*usual)] * (many - 1)), cfg.inner, 0)
    tokens = visits.TOKENS["cpu" if own.on_cpu else "other"]
    return lanes.largest_call(batch, count, tokens, parts=own.parts)


def _lanes(own: Setting, count: int) -> programs.Memory:
    """Returns the bytes of inner loops in lanes, `count` candidates resident on all devices."""
    cfg, call = own.cfg, _largest_call(own, count)
    layout = "fsdp" if own.mesh.size > 1 else own.layout
    params = programs.weights(own.config, own.mesh, layout, cfg.model.dtype)
    remat = cfg.inner.remat == "layers" or (cfg.inner.remat == "auto" and not own.on_cpu)
    return programs.lanes_memory(params, cfg.lora, cfg.inner, call, remat=remat, mesh=own.mesh)


def answer(own: Setting, count: int) -> Fit:
    """Returns the answers of as many of a chunk's candidates as are answered together.

    Args:
      count: Candidates that are adapted at a time; in lanes a chunk has several times as many.
    """
    lockstep = sharding.splits_adapters(own.mesh)
    chunk = count // own.parts if lockstep else _largest_call(own, count).chunk
    rows = own.cfg.answers.chunk // own.parts or rows_lib.fitting(
        own.config,
        own.limit - own.weights - own.copy - 2 * own.adapter * chunk,
        rows_lib.MOST["other"],
        own.work.question,
        (own.cfg.answers.max_tokens,),
        1,
        own.itemsize,
    )
    each = max(1, min(chunk, rows // _QUESTIONS))
    # Training's weights lie beside the copy that is read, and all adapters beside those in use.
    besides = own.weights if own.copy else 0
    besides += own.adapter * chunk if each < chunk else 0
    shape = (_QUESTIONS, own.work.question, own.layout)
    lower = lambda c: programs.answering(own.config, own.cfg, own.mesh, c, *shape)
    at = _at(own, "answers", _program(lower), besides)
    return at(each * own.parts)


def write(own: Setting) -> Fit:
    """Returns the writing of `sampling.chunk` self-edits at once, or of the most that fit."""
    settings = own.cfg.sampling
    token = costs.cache_bytes(own.config, own.itemsize)
    each = token * (own.work.prompt / settings.n + settings.max_tokens)
    each += 6 * 4 * own.config.vocab_size  # logits, and what is made of them to draw
    at = _at(
        own,
        f"self-edits of {settings.max_tokens} tokens",
        _program(
            lambda c: programs.writing(
                own.config, own.cfg, own.mesh, c, own.work.prompt, own.layout
            )
        ),
        own.weights if own.copy else 0,
    )
    edits = own.cfg.outer.contexts * settings.n
    guess = int(0.8 * own.free * own.mesh.size / each)
    return _find(own, at, settings.chunk, own.parts * settings.n, edits, guess)


def finetune(own: Setting) -> Fit:
    """Returns the finetuning of the policy; the model before and after lie side by side."""
    sft = own.cfg.outer.sft
    length = min(sft.max_length, own.work.prompt + own.cfg.sampling.max_tokens, _SFT_TOKENS)
    at = _at(
        own,
        f"finetuning on texts of {length} tokens",
        _program(lambda _: programs.finetuning(own.config, own.cfg, own.mesh, length)),
        own.weights,
    )
    return at(sft.batch_size)


def _program(lower: Callable[[int], Any]) -> Callable[[int], programs.Memory]:
    """Returns a function from a count to the bytes of the program lowered for it."""
    return lambda count: programs.memory(programs.compiled(lower(count)))


def _at(
    own: Setting, label: str, memory_of: Callable[[int], programs.Memory], besides: int = 0
) -> Callable[[int], Fit]:
    """Returns a function that compiles for a count.

    Args:
      besides: Bytes on each device that are none of the program's.
    """

    def compiled(count: int) -> Fit:
        own.tell(f"compiling {label}: {count} at once")
        try:
            memory = memory_of(count)
        except programs.TooBig as error:
            return Fit(count, error.needed and error.needed + besides, None, False)
        total = memory.total + besides
        return Fit(count, total, memory._asdict() | {"besides": besides}, total <= own.limit)

    return compiled


def _find(
    own: Setting, at: Callable[[int], Fit], wanted: int, unit: int, most: int, first: int
) -> Fit:
    if wanted:
        return at(-(-wanted // unit) * unit)
    return search(at, own.limit, unit, -(-most // unit) * unit, first)
