"""The real programs of a run, compiled ahead of time for devices that need not be there.

The inner loop is `residents.advance`, or `inner.adapt_slots` where adapters are split over devices,
generation `decoding.run`, finetuning what `sft.finetune` runs; only their arguments are shapes, not
arrays.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from seal_jax import decoding, inner, lanes, lora, readers, residents, sharding
from seal_jax import params as params_lib
from seal_jax import sft as sft_lib
from seal_jax.config import Config, Inner, Lora
from seal_jax.params import ModelConfig
from seal_jax.slots import Slots


class Memory(NamedTuple):
    """Bytes on each device while a program runs."""

    arguments: int
    outputs: int  # those that do not take the place of an argument
    temporaries: int
    code: int
    peak: int  # all but the code, as the compiler reckons it; 0 where it does not say

    @property
    def total(self) -> int:
        """What is there at once. The sum counts temporaries that never live together: compilers
        accept programs whose sum is far beyond the device. A CPU's peak leaves them out."""
        least = self.arguments + self.outputs
        return (self.peak if self.peak > least else least + self.temporaries) + self.code

    def beside(self, held: int) -> "Memory":
        """Returns the bytes if so many more are held that are no arguments."""
        peak = self.peak and self.peak + held
        return self._replace(arguments=self.arguments + held, peak=peak)


class TooBig(Exception):
    """The compiler refused: the program does not fit. `needed` is in bytes, where it said so."""

    def __init__(self, needed: int | None):
        super().__init__(needed)
        self.needed = needed


def weights(
    config: ModelConfig, mesh: Mesh, layout: sharding.Layout = "fsdp", dtype: str = "auto"
) -> Any:
    """Returns the weights as shapes with shardings, of the type that `model.dtype` asks for."""
    if dtype == "auto":  # as `checkpoint.load_model` chooses
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    shapes = params_lib.shapes(config, jnp.dtype(dtype))
    if layout == "apart":  # as `readers.ready` lays them on one device
        shapes = jax.eval_shape(functools.partial(readers.layers_apart, always=True), shapes)
        return _placed(shapes, jax.tree.map(lambda _: sharding.replicated(mesh), shapes))
    return _placed(shapes, sharding.weights(config, mesh, layout))


def inner_loop(
    config: ModelConfig,
    cfg: Config,
    mesh: Mesh,
    candidates: int,
    tokens: int,
    rows: int = 0,
    steps: int = 16,
) -> Any:
    """Returns the lowered inner loop of a chunk, each step `rows` rows of `tokens`.

    Args:
      rows: By default `inner.batch_size`, or 4 where a step takes all texts.
    """
    rows = rows or cfg.inner.batch_size or 4
    slots = _slots(candidates, rows, tokens, steps)
    adapters = _stacked(lora.shapes(config, cfg.lora), candidates)
    with sharding.use(mesh):
        return inner.adapt_slots.lower(
            weights(config, mesh, dtype=cfg.model.dtype),
            _placed(adapters, sharding.adapters(config, cfg.lora, mesh)),
            _placed(slots, inner.slot_shardings(slots, mesh)),
            settings=inner.loop_settings(cfg.inner),
            remat=cfg.inner.remat != "none",
        )


def lanes_memory(
    params: Any,
    adapter: Lora,
    settings: Inner,
    call: lanes.Call,
    *,
    remat: bool,
    mesh: Mesh | None = None,
) -> Memory:
    """Returns the bytes on each device at the worst moment of adapting a chunk in lanes.

    That is a call, with the adapters that are done beside it, or the end, when these become
    adapters again.

    Args:
      params: The weights as shapes.
      mesh: The devices; by default the one that programs run on.

    Raises:
      TooBig: where one of the two programs does not fit.
    """
    lead = (sharding.data_size(mesh),) if mesh is not None and mesh.size > 1 else ()
    place = mesh and (sharding.candidates(mesh) if lead else sharding.replicated(mesh))

    def of(shape: tuple[int, ...], kind: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *shape), kind, sharding=place)

    form = lora.form_of(lora.shapes(params.config, adapter))
    done_cex = of((call.chunk, *form.shape), jnp.float32)
    wp, wbt = (call.width, call.size.places), (call.width, call.size.rows, call.size.t)
    texts = [of(wbt, kind) for kind in (jnp.int32, jnp.int8, jnp.int32, jnp.int8)]
    work = residents.Work(*[of(wp, jnp.int32)] * 3, *texts, of(wp, jnp.float32), of(wp, jnp.int32))
    with sharding.use(mesh):
        step = residents.advance.lower(
            params,
            of((call.residents, 3, *form.shape), jnp.float32),
            of((call.chunk, call.room), jnp.float32),
            work,
            form=form,
            settings=inner.loop_settings(settings),
            remat=remat,
            predicted=call.size.predicted,
        )
        last = residents.unflat.lower(done_cex, form)
    own, end = memory(compiled(step)), memory(compiled(last))
    done = 4 * done_cex.size // math.prod(lead)
    weights = sum(_bytes_here(x) for x in jax.tree.leaves(params))
    return max(own.beside(done), end.beside(weights), key=lambda found: found.total)


def _bytes_here(x: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array on one device."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def writing(
    config: ModelConfig,
    cfg: Config,
    mesh: Mesh,
    sequences: int,
    prompt: int,
    layout: sharding.Layout,
) -> Any:
    """Returns the lowered generation of `sequences` self-edits in all, n of each prompt."""
    parts = sharding.data_size(mesh)
    rows = max(1, sequences // (parts * cfg.sampling.n))
    return _generation(
        weights(config, mesh, layout, cfg.model.dtype),
        mesh,
        None,
        (parts, rows, prompt),
        samples=cfg.sampling.n,
        room=cfg.sampling.max_tokens,
        own_adapters=False,
        greedy=not cfg.sampling.temperature,
        nucleus=bool(cfg.sampling.temperature) and cfg.sampling.top_p < 1,
        scored=True,
    )


def answering(
    config: ModelConfig,
    cfg: Config,
    mesh: Mesh,
    candidates: int,
    questions: int,
    prompt: int,
    layout: sharding.Layout,
) -> Any:
    """Returns the lowered generation of answers, each candidate's under its own adapter."""
    adapters = _stacked(lora.shapes(config, cfg.lora), candidates)
    adapters = _placed(adapters, sharding.adapters(config, cfg.lora, mesh))
    return _generation(
        weights(config, mesh, layout, cfg.model.dtype),
        mesh,
        adapters,
        (candidates, questions, prompt),
        samples=1,
        room=cfg.answers.max_tokens,
        own_adapters=True,
        greedy=True,
        nucleus=False,
        scored=False,
    )


def finetuning(config: ModelConfig, cfg: Config, mesh: Mesh, tokens: int, steps: int = 16) -> Any:
    """Returns the lowered finetuning of the policy, each step `batch_size` rows of `tokens`."""
    sft = cfg.outer.sft
    rows = sft.batch_size + -sft.batch_size % sharding.data_size(mesh)
    slots = _slots(1, rows, tokens, steps)
    slots = sft_lib.one_candidate(slots, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    slots = _placed(slots, jax.tree.map(lambda _: sharding.replicated(mesh), slots))
    settings = {"settings": sft_lib.program(sft), "remat": True}
    params = weights(config, mesh, dtype=cfg.model.dtype)
    with sharding.use(mesh):
        if sft.method == "full":
            return sft_lib.fit_all.lower(params, slots, **settings)
        places = sharding.adapters(config, sft.lora, mesh, stacked=False)
        adapter = _placed(lora.shapes(config, sft.lora), places)
        return sft_lib.fit_lora.lower(params, adapter, slots, **settings)


def compiled(lowered: Any) -> Any:
    """Returns the compiled program.

    Raises:
      TooBig: where the compiler finds that it does not fit.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.search(r"(?:[Uu]sed |\()([\d.]+)([KMG])\)? (?:of|exceeds)", str(error))
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        raise TooBig(said and int(float(said[1]) * scale[said[2]])) from error


def memory(program: Any) -> Memory:
    """Returns the bytes on each device while a compiled program runs."""
    found = program.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        peak=getattr(found, "peak_memory_in_bytes", 0) or 0,
    )


def _generation(
    params: Any,
    mesh: Mesh,
    adapters: Any,
    shape: tuple[int, int, int],
    *,
    samples: int,
    room: int,
    own_adapters: bool,
    greedy: bool,
    nucleus: bool,
    scored: bool,
) -> Any:
    """Returns the lowered `decoding.run` of prompts of this shape, [c, b, t]."""
    over, whole = sharding.candidates(mesh), sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
    draws = decoding.Draws(
        ids_cb=jax.ShapeDtypeStruct(shape[:2], jnp.uint32, sharding=over),
        key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        ends=jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole),
        limit=scalar(jnp.int32),
        temperature=scalar(jnp.float32),
        top_p=scalar(jnp.float32),
        grammar=None,
        greedy=greedy,
        nucleus=nucleus,
        scored=scored,
        columns=sharding.splits_vocabulary(params),
    )
    with sharding.use(mesh):
        return decoding.run.lower(
            params,
            adapters,
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=over),
            jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=over),
            draws,
            samples=samples,
            room=room,
            own_adapters=own_adapters,
        )


def _slots(candidates: int, rows: int, tokens: int, steps: int) -> Slots:
    """Returns a chunk's arrays as shapes, with one bucket of `steps` slots."""
    of = jax.ShapeDtypeStruct
    size = (candidates, steps, rows, tokens)
    return Slots(
        tokens=(of(size, jnp.int32),),
        weights=(of(size, jnp.int8),),
        segments=(of(size, jnp.int32),),
        bucket_i=of((steps,), jnp.int32),
        row_i=of((steps,), jnp.int32),
        active_ci=of((candidates, steps), jnp.bool_),
        visits=of((), jnp.int32),
        learning_rate_c=of((candidates,), jnp.float32),
        total_c=of((candidates,), jnp.int32),
    )


def _stacked(tree: Any, candidates: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((candidates, *x.shape), x.dtype), tree)


def _placed(tree: Any, places: Any) -> Any:
    put: Callable = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(put, tree, places)
