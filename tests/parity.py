"""What is compared with Hugging Face: cases that cover every switch, and our side of them.

`hf.py` is the other side, for machines with torch; `goldens/hf_parity.npz` is what it once said.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import toys
from scipy import stats

from seal_jax import lora, model, optim, sampling
from seal_jax.checkpoint import LM
from seal_jax.config import ALL_TARGETS
from seal_jax.lora import Adapter
from seal_jax.params import ModelConfig, Params

GOLDENS = Path(__file__).parent / "goldens" / "hf_parity.npz"
SAMPLED, TEMPERATURE, TOP_P = "qwen2", 0.7, 0.8
NEW_TOKENS = 12


class Case(NamedTuple):
    """A random model, an adapter, and what is fed to them."""

    config: ModelConfig
    targets: tuple[str, ...] = ALL_TARGETS
    rank: int = 3
    alpha: float = 6.0


CASES = {
    "qwen2": Case(toys.config("qwen2", d_head=4)),
    "qwen2, tied, a key head for each query head": Case(
        toys.config("qwen2", d_head=4, n_kv_heads=4, tied=True, rope_theta=1e6), ("q", "v")
    ),
    "qwen2, one key head, wide heads": Case(
        toys.config("qwen2", d_head=6, n_kv_heads=1, rms_eps=1e-4), ("k", "o", "down"), 5, 1.0
    ),
    "llama": Case(
        toys.config("llama", d_head=4, rope_scaling=None, tied=False, eos_ids=(0,)),
        ("q", "v", "gate", "up", "down"),
    ),
    "llama, llama3 rope scaling, tied, wide heads": Case(toys.config("llama")),
    "qwen3, query and key norms, wide heads": Case(toys.config("qwen3")),
    "qwen3, tied, one key head": Case(toys.config("qwen3", tied=True, n_kv_heads=1, d_head=4)),
}
# One of each family also generates.
GENERATING = ("qwen2", "llama, llama3 rope scaling, tied, wide heads", "qwen3, tied, one key head")


class Inputs(NamedTuple):
    """Three rows: one text, a padded text, two packed texts; -100 carries no loss."""

    tokens: np.ndarray
    segments: np.ndarray
    labels: np.ndarray
    prompts: tuple[tuple[int, ...], ...]


def weights(name: str) -> tuple[Params, Adapter]:
    """Returns a case's random model and adapter."""
    case, seed = CASES[name], list(CASES).index(name)
    adapter = toys.adapter(case.config, seed, case.rank, case.targets, case.alpha)
    return toys.params(case.config, seed), adapter


def inputs(name: str) -> Inputs:
    """Returns what a case's model reads."""
    seed = list(CASES).index(name)
    tokens = toys.tokens(3, 14, seed=seed)
    segments = np.array([[1] * 14, [1] * 9 + [0] * 5, [1] * 6 + [2] * 8])
    starts = np.diff(segments, axis=1, prepend=0) != 0
    drop = np.random.RandomState(seed).rand(3, 14) < 0.2  # masks within a text
    labels = np.where(starts | (segments == 0) | drop, -100, tokens)
    prompts = tuple(tuple(row[:n].tolist()) for row, n in zip(tokens, (3, 7, 5), strict=True))
    return Inputs(tokens, segments, labels, prompts)


@functools.cache
def ours(name: str) -> dict[str, np.ndarray]:
    """Returns logits, loss, LoRA gradients, and greedy continuations without and with adapter."""
    params, adapter = weights(name)
    tokens, segments, labels, prompts = inputs(name)

    @jax.jit
    def both(params, adapter):
        loss_of = lambda a: optim.loss(params, a, tokens, labels != -100, segments)
        logits = model.forward(params, adapter, tokens, segments_bt=segments)
        return logits, *jax.value_and_grad(loss_of)(adapter)

    logits, loss, grads = jax.device_get(both(params, adapter))
    found = {"logits": logits, "loss": np.asarray(loss)}
    found |= {f"gradient a {target}": value for target, value in grads.a.items()}
    found |= {f"gradient b {target}": value for target, value in grads.b.items()}
    if name in GENERATING:
        lm = LM(params, None, params.config)
        pair = lora.stack([jax.tree.map(np.zeros_like, adapter), adapter])
        rows = sampling.decode(lm, [prompts, prompts], pair, max_tokens=NEW_TOKENS)
        for label, own in zip(("bare", "adapted"), rows, strict=True):
            found |= {f"greedy {label} {i}": row[0].tokens for i, row in enumerate(own)}
    return found


def difference(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], kind: str, name: str
) -> float:
    """Returns the largest difference among the entries of a kind; inf where they do not match.

    Positions of padding do not count: nobody reads them.
    """
    keys = {key for key in one if key.split()[0] == kind}
    if keys != {key for key in other if key.split()[0] == kind}:
        return float("inf")
    worst = 0.0
    for key in keys:
        a, b = np.asarray(one[key], np.float64), np.asarray(other[key], np.float64)
        if a.shape != b.shape:
            return float("inf")
        if kind == "logits":
            real = inputs(name).segments > 0
            a, b = a[real], b[real]
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)))
    return worst


KINDS = ("logits", "loss", "gradient", "greedy")


def goldens() -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray, dict[str, str]]:
    """Returns what Hugging Face said by case, the chances of two tokens, and its versions."""
    with np.load(GOLDENS) as file:
        found: dict[str, dict[str, np.ndarray]] = {name: {} for name in CASES}
        for key in file.files:
            case, _, entry = key.partition("|")
            if entry:
                found[case][entry] = file[key]
        return found, file["chances"], json.loads(str(file["versions"]))


def two_tokens() -> tuple[LM, tuple[int, ...]]:
    """Returns the model and the prompt whose two-token continuations are counted."""
    params, _ = weights(SAMPLED)
    endless = dataclasses.replace(params.config, eos_ids=())
    # Flatter than it is, so that the nucleus holds several tokens.
    params = params.replace(norm=params.norm * 0.4, config=endless)
    return LM(params, None, endless), inputs(SAMPLED).prompts[0]


@functools.cache
def _counts(draws: int) -> np.ndarray:
    lm, prompt = two_tokens()
    rows = sampling.decode(
        lm,
        [[prompt]],
        samples=draws,
        max_tokens=2,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        key=jax.random.key(0),
    )[0][0]
    counts = np.zeros([lm.config.vocab_size] * 2)
    np.add.at(counts, tuple(np.array([row.tokens for row in rows]).T), 1)
    return counts


def surprise(chances: np.ndarray, draws: int) -> float:
    """Returns how likely counts as odd as ours are under these chances of two tokens (chi-square).

    Rare continuations are pooled; an impossible one that we drew has likelihood 0.
    """
    counts = _counts(draws)
    if counts[chances == 0].any():
        return 0.0
    common = chances * draws >= 5
    expected, seen = (np.append(x[common], x[~common].sum()) for x in (chances * draws, counts))
    real = expected > 0
    distance = ((seen[real] - expected[real]) ** 2 / expected[real]).sum()
    return float(stats.chi2.sf(distance, real.sum() - 1))
