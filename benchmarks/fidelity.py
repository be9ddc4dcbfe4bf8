"""Compares seal_jax with the systems it replaces and writes docs/fidelity.md.

    python benchmarks/fidelity.py

Against transformers and PEFT themselves where torch is installed (`pip install seal_jax[parity]`),
else against what they said when `make_goldens.py` ran; against the reference's recorded inputs and
outputs where they are ($SEAL_JAX_DATA, or ../shared/data).
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import fidelity_text  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import parity  # noqa: E402
import toys  # noqa: E402
import trainer_goldens  # noqa: E402
from fidelity_text import Row  # noqa: E402

from seal_jax import checkpoint, lora, peft  # noqa: E402
from seal_jax.config import Config  # noqa: E402

DRAWS = 20_000


def main() -> None:
    """Prints the table and writes it."""
    tables = {
        "Models": model_rows(),
        "Adapters and weights in files": list(file_rows()),
        "The reference's trainer": list(trainer_rows()),
        "The reference's text, labels and files": list(fidelity_text.text_rows()),
        "The reference's programs, replayed": list(fidelity_text.replay_rows()),
        "The reference's few-shot task (ARC)": list(fidelity_text.arc_rows()),
    }
    names = ["jax", "jaxlib", "numpy", "optax", "safetensors", "transformers"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines = [
        "# Fidelity",
        "",
        "What seal_jax was compared with, and the largest difference found. Made by",
        "`python benchmarks/fidelity.py`; the same comparisons are tests, with limits.",
        "",
        f"Python {platform.python_version()}, {versions}; one CPU, float32.",
    ]
    for title, rows in tables.items():
        lines += ["", f"## {title}", ""]
        if not rows:
            lines.append("Not compared: the recorded data was not found on this machine.")
            continue
        lines += ["| what | against | cases | largest difference |", "|---|---|---:|---|"]
        lines += [f"| {' | '.join(str(x) for x in row)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "fidelity.md").write_text(text, encoding="utf-8")
    print(text)


def live() -> bool:
    """Returns whether the libraries themselves are here."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft"))


def model_rows() -> list[Row]:
    """Returns the comparisons of random models, one for each kind of number."""
    recorded, chances, versions = parity.goldens()
    if live():
        import hf

        recorded = {name: hf.theirs(name) for name in parity.CASES}
        chances, versions = hf.two_token_chances(), hf.VERSIONS
    libraries = f"transformers {versions['transformers']}, torch {versions['torch']}"
    if not live():
        libraries += " (recorded)"
    both = f"{libraries}, PEFT {versions['peft']}"
    tokens = sum(int((parity.inputs(name).segments > 0).sum()) for name in parity.CASES)

    def worst(kind: str) -> float:
        return max(
            parity.difference(parity.ours(name), recorded[name], kind, name)
            for name in parity.CASES
        )

    entries = lambda kind: sum(
        key.split()[0] == kind for entry in recorded.values() for key in entry
    )
    scale = max(np.abs(entry["logits"]).max() for entry in recorded.values())
    switches = "; ".join(parity.CASES)
    likely = parity.surprise(chances, DRAWS)
    return [
        Row(
            f"logits of {tokens} tokens under a live adapter; full, padded and packed rows "
            f"({switches})",
            both,
            len(parity.CASES),
            f"{worst('logits'):.1e} (largest logit {scale:.0f})",
        ),
        Row("loss of those rows", both, len(parity.CASES), f"{worst('loss'):.1e}"),
        Row(
            "gradient of the loss by each LoRA matrix",
            both,
            entries("gradient"),
            f"{worst('gradient'):.1e}",
        ),
        Row(
            "greedy continuation, without and with adapter, two adapters in one batch",
            f"{both}, `generate`",
            entries("greedy"),
            exactly(worst("greedy")),
        ),
        Row(
            f"two tokens sampled at temperature {parity.TEMPERATURE}, top-p {parity.TOP_P}",
            f"exact distribution after {libraries}'s warpers",
            DRAWS,
            f"none in {int((chances > 0).sum())} continuations (χ² test, p = {likely:.2f})",
        ),
    ]


def exactly(value: float) -> str:
    """Returns `none` for no difference at all."""
    return "none" if value == 0 else f"{value:.1e}"


def gap(one: Any, other: Any) -> float:
    """Returns the largest difference between two trees of arrays."""
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), one, other)
    return float(max(jax.tree.leaves(gaps)))


def file_rows() -> Iterator[Row]:
    """Yields round trips through files, and through the libraries where they are here."""
    families = list(toys.FAMILIES)
    with tempfile.TemporaryDirectory() as folder:
        work, worst = Path(folder), {"hf": 0.0, "peft": 0.0}
        for name in families:
            params = toys.params(toys.FAMILIES[name])
            saved = checkpoint.save_hf(
                checkpoint.LM(params, None, params.config), work / name, shard=12_000
            )
            back = checkpoint.read_params(saved, checkpoint.read_config(saved))
            worst["hf"] = max(worst["hf"], gap(back, params))
            one = toys.adapter(params.config)
            kept = peft.load_peft(peft.save_peft(one, work / f"{name}-a", Config()), params.config)
            worst["peft"] = max(worst["peft"], gap(kept, one), abs(kept.scale - one.scale))
        ours = "seal_jax itself"
        yield Row(
            "`save_hf`, sharded, then `load_model`", ours, len(families), exactly(worst["hf"])
        )
        yield Row("`save_peft`, then `load_peft`", ours, len(families), exactly(worst["peft"]))
        if live():
            yield from _library_rows(work)


def _library_rows(work: Path) -> Iterator[Row]:
    import hf
    import peft as hf_peft
    import torch
    import transformers

    tokens_bt = toys.tokens(2, 14)
    feed = {"input_ids": torch.from_numpy(tokens_bt).long()}
    merged, theirs, ours, read = [], [], [], []
    for name, config in toys.FAMILIES.items():
        params, adapter = toys.params(config), toys.adapter(config)
        lm = checkpoint.LM(lora.merge(params, adapter), None, config)
        folder = checkpoint.save_hf(lm, work / f"{name}-merged")
        found = toys.forward(params, adapter, tokens_bt)
        with torch.no_grad():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            merged.append(gap(loaded(**feed).logits.numpy(), found))
            base = hf.hf_model(params)
            wrapped = hf_peft.PeftModel.from_pretrained(base, str(work / f"{name}-a")).eval()
            logits = wrapped(**feed).logits.numpy()
            made = hf.with_adapter(hf.hf_model(params), adapter)
            theirs.append(gap(made(**feed).logits.numpy(), logits))
            ours.append(gap(logits, found))
        made.save_pretrained(str(work / f"{name}-theirs"))
        read.append(gap(peft.load_peft(work / f"{name}-theirs", config), adapter))
    library = f"transformers {transformers.__version__}"
    other = f"PEFT {hf_peft.__version__}"
    n = len(toys.FAMILIES)
    yield Row("merged `save_hf`: logits after loading", library, n, exactly(max(merged)))
    yield Row(
        "`save_peft`: logits after loading",
        f"{other}, the same adapter made there",
        n,
        exactly(max(theirs)),
    )
    yield Row("`save_peft`: logits after loading", f"{other}, ours", n, exactly(max(ours)))
    yield Row("an adapter saved by PEFT, read by `load_peft`", other, n, exactly(max(read)))


def trainer_rows() -> Iterator[Row]:
    """Yields the recorded runs of the reference's trainer, replayed by the inner loop."""
    relative = lambda pair: np.max(np.abs(pair[0] - pair[1]) / np.abs(pair[1]))
    for name in trainer_goldens.names():
        with tempfile.TemporaryDirectory() as folder:
            run = trainer_goldens.replay(name, Path(folder))
        steps = len(run.loss[0])
        yield Row(
            f"`{name}`: loss, gradient norm, learning rate of each step; final adapter",
            "transformers' Trainer, recorded",
            steps,
            f"{relative(run.loss):.0e} relative, {relative(run.grad_norm):.0e} relative, "
            f"{np.max(np.abs(run.learning_rate[0] - run.learning_rate[1])):.0e}, "
            f"{gap(*run.final):.0e}",
        )


if __name__ == "__main__":
    main()
