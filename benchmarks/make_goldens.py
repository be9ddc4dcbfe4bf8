"""Writes tests/goldens/hf_parity.npz: what transformers and PEFT say about the cases of parity.py.

    python benchmarks/make_goldens.py

Needs torch (`pip install seal_jax[parity]`); the tests that read the file do not.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import hf  # noqa: E402
import parity  # noqa: E402


def main() -> None:
    """Writes the file."""
    arrays = {"versions": np.array(json.dumps(hf.VERSIONS))}
    for name in parity.CASES:
        arrays |= {f"{name}|{key}": value for key, value in hf.theirs(name).items()}
    arrays["chances"] = hf.two_token_chances()
    parity.GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(parity.GOLDENS, **arrays)
    print(f"{parity.GOLDENS}: {len(arrays)} arrays, {parity.GOLDENS.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
