"""The models of a run: the one at work on the devices, the others on disk.

A run of r rounds with its control comes to 2 r + 1 models, which no device has room for.
"""

from pathlib import Path

import jax

from seal_jax import checkpoint, files, runs, sharding, state
from seal_jax.checkpoint import LM
from seal_jax.errors import SealError
from seal_jax.params import Params

Saved = files.AnyPath | None  # where a policy is; None: the model before any round


class Policies:
    """Loads a run's models, one at a time; callers should not keep them either.

    Args:
      adapt: The model that self-edits are applied to: "policy", the one that wrote them, or "base".
    """

    def __init__(self, base: LM, adapt: str) -> None:
        self._like = state.abstract(base.params)
        self._bare = base._replace(params=None)
        self._adapt = adapt
        self._held: tuple[Saved, LM] | None = (None, base)

    def load(self, saved: Saved) -> LM:
        """Returns a policy."""
        if self._held is None or self._held[0] != saved:
            self._held = None  # or both would be there at once
            self._held = (saved, self._bare._replace(params=self._read(saved)))
        return self._held[1]

    def load_adapted(self, saved: Saved) -> LM:
        """Returns the model that a policy's self-edits are applied to."""
        return self.load(None if self._adapt == "base" else saved)

    def _read(self, saved: Saved) -> Params:
        if saved is not None:
            return state.load_tree(saved, self._like)
        split = sharding.of(self._like) is not None
        places = jax.tree.map(lambda x: x.sharding, self._like) if split else None
        bare = self._bare
        return checkpoint.read_params(bare.source, bare.config, self._like.embed.dtype, places)


def export(run: str | Path, folder: Path, name: str | None = None) -> Path:
    """Writes a policy of a run in Hugging Face's format; returns its folder.

    Args:
      run: The run's folder.
      name: Such as round_0 or control/round_1; None takes the last round's.

    Raises:
      SealError: where there is no such run or policy, before the model is loaded.
    """
    home = files.path(run)
    cfg = runs.settings(home)
    rounds = range(cfg.outer.rounds)
    known = [f"control/round_{i}" for i in rounds] + [f"round_{i}" for i in rounds]
    known = [x for x in known if state.is_saved(home / x / "policy")]
    if name is None:
        name = next((x for x in reversed(known) if x.startswith("round")), None)
    if name not in known:
        there = ", ".join(known) or "none"
        raise SealError(f"{home}: no policy {name or 'of a round'} there (there is: {there})")
    files.check_free(folder)
    lm = checkpoint.load_model(cfg.model)
    params = state.load_tree(home / name / "policy", lm.params)
    return checkpoint.save_hf(lm._replace(params=params), folder)
