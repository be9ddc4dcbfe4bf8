"""Self-edits that no model wrote, to compare a policy's with: fixed, random, a grid of them."""

import itertools

import numpy as np

from seal_jax.tasks.arc import compact, edits
from seal_jax.tasks.arc.edits import ArcEdit

RANDOM = 5
"""Random self-edits for each context."""
_GRID_RATES = {"compact": (1e-2, 3e-3), "llama": (2e-4, 1e-4)}
_GRID_EPOCHS = {False: (8, 4), True: (2, 1)}  # with augmentations an epoch is longer


def written(edit: ArcEdit, form: str) -> str:
    """Returns a self-edit as text in a form, `compact` or `llama`."""
    return compact.edit_text(edit) if form == "compact" else edits.text(edit)


def fixed(form: str) -> str:
    """Returns the self-edit of a fixed configuration, the same for every puzzle."""
    rate = {"compact": 5e-3, "llama": 1e-4}[form]
    return written(edits.make(basic=True, learning_rate=rate, epochs=2), form)


def grid(form: str) -> list[str]:
    """Returns a grid of configurations; the best of them for each puzzle is an oracle's choice."""
    return [
        written(edits.make(basic=basic, strategy=strategy, learning_rate=rate, epochs=epochs), form)
        for strategy, rate, basic in itertools.product(
            reversed(edits.STRATEGIES), _GRID_RATES[form], (False, True)
        )
        for epochs in _GRID_EPOCHS[basic]
    ]


def random(rng: np.random.Generator) -> ArcEdit:
    """Returns a valid self-edit, each of its seven choices drawn uniformly.

    Learning rates are 1, 2, 3, 5 or 8 times 1e-6 to 1e-1, epochs 1 to 8: what nobody chose.
    """
    flags = (rng.random(4) < 0.5).tolist()
    return edits.make(
        *flags,
        strategy=edits.STRATEGIES[rng.integers(2)],
        learning_rate=float(compact.RATES[rng.integers(len(compact.RATES))]),
        epochs=int(compact.EPOCHS[rng.integers(len(compact.EPOCHS))]),
    )
