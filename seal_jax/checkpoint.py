"""Models in Hugging Face's format, in and out: config.json, safetensors, tokenizer files."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from seal_jax import config as config_lib
from seal_jax import files, runtime, sharding
from seal_jax import params as params_lib
from seal_jax.architecture import read_config, write_config
from seal_jax.errors import SealError
from seal_jax.params import ModelConfig, Params

_WEIGHTS = Path(__file__).parent / "tiny" / "weights"
BUILT_IN = {name: _WEIGHTS / name for name in ("tiny-world", "tiny-grids")}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TYPES = ("auto", "float32", "bfloat16")  # float16 is too narrow: neither sums nor gradients fit
_FAST = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the second in transformers 5
_SHARD = 5_000_000_000  # bytes of one safetensors file, as transformers splits them
_STORED = ("F32", "F16", "BF16")
_READ_AT_ONCE = 1 << 22  # numbers
_PARTS, _PART = 256, 1 << 16  # of a file, and their bytes, that its fingerprint reads


class LM(NamedTuple):
    """A language model: weights, tokenizer, architecture, and the folder it came from.

    `reader` is a copy of the weights laid out for generation, while there is one.
    """

    params: Params
    tokenizer: Any
    config: ModelConfig
    source: Path | None = None
    reader: Params | None = None

    def __repr__(self) -> str:
        """Returns a line: to print the weights would fetch them all from the devices."""
        count = sum(x.size for x in jax.tree.leaves(self.params))
        kind = "no weights" if self.params is None else self.params.embed.dtype.name
        return f"LM({self.source or 'of no folder'}: {count:,} parameters, {kind})"


def load_model(
    model: config_lib.Model | str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LM:
    """Returns a model from a folder, a hub id, or a built-in name (tiny-world, tiny-grids).

    Args:
      mesh: Devices that share the weights; by default they lie on one.

    Raises:
      SealError: names the file and what is missing, misshapen or unsupported.
    """
    if not isinstance(model, config_lib.Model):
        model = config_lib.Model(path=str(model))
    runtime.keep_compiled()
    folder = find(model.path, model.revision)
    config = read_config(folder)
    kind = dtype or model.dtype
    if kind not in _TYPES:
        raise SealError(f"model.dtype={kind!r}: expected one of {', '.join(_TYPES)}")
    if kind == "auto":
        kind = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    runtime.keep_memory()
    tokenizer = load_tokenizer(folder)
    config = _ended(config, tokenizer)
    split = mesh is not None and mesh.size > 1
    places = sharding.weights(config, mesh) if split else None
    params = read_params(folder, config, jnp.dtype(kind), places)
    return LM(params, tokenizer, config, folder)


def fingerprint(folder: Path) -> str:
    """Returns what tells a model's files from another's: of large ones parts of them."""
    found = hashlib.sha256()
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for file in sorted(
        x for x in folder.iterdir() if x.name in names or x.suffix == ".safetensors"
    ):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(size // _PARTS, _PART)):
                stream.seek(start)
                found.update(stream.read(_PART))
    return found.hexdigest()


def _ended(config: ModelConfig, tokenizer: Any) -> ModelConfig:
    """Returns the architecture with the tokenizer's end of text as an end of generations too.

    Training texts end with it (`eos`), and the reference's engine stops there whatever the model's
    own files name.
    """
    own = tokenizer.eos_token_id
    ends = (*config.eos_ids, *([] if own is None else [own]))
    return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys(ends)))


def eos(lm: LM) -> int:
    """Returns the id that ends a training text.

    Raises:
      SealError: where the model has none.
    """
    own = lm.tokenizer.eos_token_id
    if own is None and not lm.config.eos_ids:
        raise SealError(f"{lm.source}: neither tokenizer nor config names an end-of-text token")
    return lm.config.eos_ids[0] if own is None else own


def find(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the folder of a model on this machine.

    What lies on the hub or in a bucket (gs://) is downloaded: weights, JSON and templates only.

    Args:
      weights: Whether they are wanted too.

    Raises:
      SealError: where there is no such model, or the hub does not serve it.
    """
    if path in BUILT_IN:
        return BUILT_IN[path]
    wanted = ["*.json", "*.jinja", "merges.txt"] + ["*.safetensors"] * weights
    folder = Path(path).expanduser()
    if "://" in path:
        folder = files.local_copy(files.path(path), tuple(wanted))
    if folder.exists() or "://" in path:
        if not (folder / "config.json").is_file():
            raise SealError(f"{path}: no config.json there, so it is not a model folder")
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise SealError(f"{path}: no such folder, and not a hub id such as Qwen/Qwen2.5-0.5B")
    import huggingface_hub

    try:
        # Never code, nor weights as pickles; of subfolders nothing.
        chosen = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
        return Path(huggingface_hub.snapshot_download(path, revision=revision, **chosen))
    except Exception as error:  # the hub's many exceptions, network errors among them
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SealError(
            f"{path}: no such folder, and the hub did not serve it: {detail}"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """Returns the folder's tokenizer; code in the folder is never run.

    Raises:
      SealError: where its files are missing or cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        # transformers would give an empty tokenizer without a word.
        raise SealError(f"{folder}: no tokenizer there ({', '.join(_TOKENIZERS)})")
    loader = transformers.AutoTokenizer
    try:
        # By the architecture alone transformers 5 would take e.g. Qwen2's own splitting into words,
        # whatever tokenizer.json says.
        own = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
        if str(own) in _FAST and (folder / "tokenizer.json").is_file():
            loader = transformers.PreTrainedTokenizerFast
    except (OSError, ValueError, AttributeError, RecursionError):
        pass  # AutoTokenizer says what is wrong
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of many kinds, from Rust too
        what = f"{type(error).__name__}: {error}"
        raise SealError(f"{folder}: the tokenizer files cannot be read: {what}") from error


def _files(folder: Path) -> dict[str, Path]:
    """Returns the file that holds each tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # first, as for transformers, which leaves old indexes beside it
        with _open(single) as file:
            return {name: single for name in file.keys()}
    if not index.is_file():
        raise SealError(f"{folder}: no model.safetensors and no index (only safetensors are read)")
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SealError(f"{index}: not an index of safetensors files") from error
    named = lambda file: isinstance(file, str) and file and Path(file).name == file
    outside = [file for file in places.values() if not named(file)]
    if outside:
        raise SealError(f"{index}: {outside[0]!r} is not a file of this folder")
    return {name: folder / file for name, file in places.items()}


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise SealError(f"{file}: not readable as safetensors: {error}") from error


def read_params(
    folder: Path, config: ModelConfig, dtype: Any = jnp.float32, shardings: Params | None = None
) -> Params:
    """Returns the weights of a folder, layers stacked.

    Files are read slice by slice: of each weight this host holds what its devices hold, and no
    second copy of more than one weight at a time. The largest come first, while there is room.

    Args:
      shardings: A tree like the weights' of jax.sharding.Sharding; by default the weights go
        whole to the default device.

    Raises:
      SealError: names the file, and the tensor that is missing, misshapen or of another type.
    """
    places = _files(folder)
    opened: dict[Path, Any] = {}

    def stored(name: str, want: tuple[int, ...]) -> Any:
        """Returns a tensor of a file, not yet read."""
        if name not in places:
            raise SealError(f"{folder}: tensor {name!r} is missing")
        file = places[name]
        if file not in opened:
            opened[file] = _open(file)
        try:
            tensor = opened[file].get_slice(name)
        except safetensors.SafetensorError as error:
            raise SealError(f"{file}: tensor {name!r} cannot be read: {error}") from error
        if tuple(tensor.get_shape()) != want:
            raise SealError(
                f"{file}: tensor {name!r} has shape {tuple(tensor.get_shape())}, "
                f"config.json says {want}"
            )
        if tensor.get_dtype() not in _STORED:
            raise SealError(f"{file}: tensor {name!r} has type {tensor.get_dtype()}")
        return tensor

    def read(weight: params_lib.Weight, shape: tuple[int, ...], index: tuple) -> np.ndarray:
        """Returns the part of a weight at `index`, one slice of each dimension."""
        ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        sizes = [len(own) for own in ranges]
        if weight.dims[0] != "l":
            tensor = stored(weight.source, _flip(shape, weight))
            out = np.empty(sizes, dtype)  # of a size that the file has too
            _fill(out, tensor, ranges, weight.transposed)
            return out
        of_layer = lambda layer: stored(weight.source.format(l=layer), _flip(shape[1:], weight))
        of_layer(ranges[0][-1])
        out = np.empty(sizes, dtype)
        for at, layer in enumerate(ranges[0]):
            _fill(out[at], of_layer(layer), ranges[1:], weight.transposed)
        return out

    def leaf(weight: params_lib.Weight, shape: tuple[int, ...], home: Any) -> jax.Array:
        if home is None:
            return jnp.asarray(read(weight, shape, (slice(None),) * len(shape)))
        seen: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one reading

        def part(index: tuple) -> np.ndarray:
            name = tuple((i.start, i.stop) for i in index)
            if name not in seen:
                seen[name] = read(weight, shape, index)
            return seen[name]

        return jax.make_array_from_callback(shape, home, part)

    if config.tied and "lm_head.weight" in places:
        shape = (config.vocab_size, config.d_model)
        embed = params_lib.table(config)["embed"].source
        if not _equal(stored("lm_head.weight", shape), stored(embed, shape), shape):
            raise SealError(
                f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs "
                "from it; tie_word_embeddings: false keeps it"
            )
    wanted = {}
    params_lib.build(config, lambda name, weight, shape: wanted.update({name: (weight, shape)}))
    made = {}
    for name, (weight, shape) in sorted(wanted.items(), key=lambda x: -math.prod(x[1][1])):
        made[name] = leaf(weight, shape, shardings and params_lib.of(shardings, name))
        made[name].block_until_ready()  # a copy still under way would keep its source alive
    return params_lib.build(config, lambda name, weight, shape: made[name])


def _flip(shape: tuple[int, ...], weight: params_lib.Weight) -> tuple[int, ...]:
    return shape[::-1] if weight.transposed else shape


def _equal(one: Any, other: Any, shape: tuple[int, int]) -> bool:
    """Returns whether two stored tensors are equal, some rows at a time."""
    step = max(1, _READ_AT_ONCE // shape[1])
    parts = (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))
    return all(np.array_equal(one[part], other[part]) for part in parts)


def _fill(out: np.ndarray, tensor: Any, ranges: list[range], transposed: bool) -> None:
    """Copies a part of a stored tensor to `out`, some rows of the file at a time."""
    ranges = ranges[::-1] if transposed else ranges
    out = out.T if transposed else out
    rest = tuple(slice(own.start, own.stop) for own in ranges[1:])
    width = math.prod(len(own) for own in ranges[1:])
    step = max(1, _READ_AT_ONCE // max(width, 1))
    for start in range(0, len(ranges[0]), step):
        stop = min(start + step, len(ranges[0]))
        first = ranges[0].start
        out[start:stop] = tensor[(slice(first + start, first + stop), *rest)]


def named_tensors(params: Params) -> dict[str, Callable[[], np.ndarray]]:
    """Returns, by Hugging Face name, functions that give each tensor C-contiguous.

    safetensors 0.8 writes wrong data for transposed views, without an error.
    """
    result: dict[str, Callable[[], np.ndarray]] = {}
    for name, weight in params_lib.table(params.config).items():
        value = params_lib.of(params, name)

        def tensor(value=value, layer=None, flip=weight.transposed) -> np.ndarray:
            array = np.asarray(value if layer is None else value[layer])
            return np.ascontiguousarray(array.T if flip else array)

        if weight.dims[0] != "l":
            result[weight.source] = tensor
            continue
        for layer in range(params.config.n_layers):
            result[weight.source.format(l=layer)] = lambda t=tensor, i=layer: t(layer=i)
    return result


def save_hf(lm: LM, folder: str | Path, *, shard: int = _SHARD) -> Path:
    """Writes a model that transformers, vLLM and `load_model` read; returns its folder.

    Configuration and tokenizer files are copied verbatim from where the model came from, since
    re-saved ones are misread by older tools; but config.json names the type of these weights, to
    which transformers would round them. The folder appears complete or not at all.

    Args:
      shard: Bytes of one safetensors file at most, unless a single tensor has more.

    Raises:
      SealError: where something stands in the folder already.
    """
    folder = Path(folder).expanduser().absolute()
    with files.new_folder(folder) as work:
        _copy_metadata(lm, work)
        tensors = named_tensors(lm.params)
        groups: list[list[str]] = [[]]
        room, total = shard, 0
        itemsize = lm.params.embed.dtype.itemsize
        for name, size in _sizes(lm.params).items():
            size *= itemsize
            if size > room and groups[-1]:
                groups.append([])
                room = shard
            groups[-1].append(name)
            room -= size
            total += size
        index = {}
        for number, names in enumerate(groups, 1):
            file = "model.safetensors"
            if len(groups) > 1:
                file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            chunk = {name: tensors[name]() for name in names}
            safetensors.numpy.save_file(chunk, work / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        if len(groups) > 1:
            table = {"metadata": {"total_size": total}, "weight_map": index}
            (work / "model.safetensors.index.json").write_text(json.dumps(table, indent=2))
    return folder


def _sizes(params: Params) -> dict[str, int]:
    sizes = {}
    for name, weight in params_lib.table(params.config).items():
        value = params_lib.of(params, name)
        layered = weight.dims[0] == "l"
        for layer in range(params.config.n_layers if layered else 1):
            sizes[weight.source.format(l=layer)] = value[0].size if layered else value.size
    return sizes


def _copy_metadata(lm: LM, folder: Path) -> None:
    if lm.source is not None:
        for file in lm.source.iterdir():
            keep = file.suffix in (".json", ".jinja", ".txt", ".model")
            if keep and file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        _name_dtype(folder / "config.json", lm.params.embed.dtype.name)
        return
    (folder / "config.json").write_text(json.dumps(write_config(lm.config, lm.params), indent=2))
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)


def _name_dtype(file: Path, dtype: str) -> None:
    """Makes a config.json name the type of the weights beside it, if it names another."""
    content = json.loads(file.read_text())
    named = [key for key in ("torch_dtype", "dtype") if key in content]
    if any(content[key] != dtype for key in named):
        file.write_text(json.dumps(content | dict.fromkeys(named, dtype), indent=2) + "\n")
