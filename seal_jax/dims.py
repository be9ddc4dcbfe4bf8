"""The one key of dimension letters, used in array names, the weights table and sharding rules.

b batch            t tokens           s tokens attended to   d model
n query heads      k key/value heads  g n // k               h head
f feed-forward     v vocabulary       l layers               r LoRA rank
c candidate self-edits                i inner steps          q sequences of one prompt
m slots of a bucket (`slots`), or places for generated tokens (`model.Cache`)
w groups of a call (`residents`)      p candidates of a group
nh, kh: heads and their width as one axis. ex: an adapter's numbers in rows (`lora.Form`).
Grammars and the judge's trees, which are no models, have letters of their own.
"""

import typing

if typing.TYPE_CHECKING:
    from seal_jax.params import ModelConfig


def sizes(config: "ModelConfig") -> dict[str, int]:
    """Returns the length of each model dimension."""
    return {
        "d": config.d_model,
        "n": config.n_heads,
        "k": config.n_kv_heads,
        "g": config.n_heads // config.n_kv_heads,
        "h": config.d_head,
        "f": config.d_ff,
        "v": config.vocab_size,
        "l": config.n_layers,
        "nh": config.n_heads * config.d_head,
        "kh": config.n_kv_heads * config.d_head,
    }
