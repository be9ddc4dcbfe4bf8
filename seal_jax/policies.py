"""The models of a run: the one at work on the devices, the others on disk.

A run of r rounds with its control comes to 2 r + 1 models, which no device has room for.
"""

import jax

from seal_jax import checkpoint, files, sharding, state
from seal_jax.checkpoint import LM
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
