"""SEAL, Self-Adapting Language Models (arXiv 2506.10943), as pure functions in JAX.

    import seal_jax as seal

The names below are the public interface; each is one step of the method.
"""

__version__ = "0.1.0"

from seal_jax import judge, lora, outer, tasks
from seal_jax.batching import Batch, SelfEdit, pack
from seal_jax.checkpoint import LM, load_model, save_hf
from seal_jax.config import Config, load_config
from seal_jax.errors import SealError, SelfEditError
from seal_jax.evals.study import Study
from seal_jax.evals.study import run as evaluate
from seal_jax.experiment import Report, run
from seal_jax.inner import adapt_many
from seal_jax.lora import Adapter, concat, merge
from seal_jax.model import Params, forward
from seal_jax.peft import load_peft, save_peft
from seal_jax.rewards import Scores, score
from seal_jax.sampling import generate
from seal_jax.tasks import Context, Task
from seal_jax.tasks import arc as _arc  # noqa: F401  seal.tasks.arc
from seal_jax.tasks import squad as _squad  # noqa: F401  seal.tasks.squad
from seal_jax.tasks.registry import load_task
from seal_jax.writing import sample_edits

__all__ = [
    "Adapter",
    "Batch",
    "Config",
    "Context",
    "LM",
    "Params",
    "Report",
    "Scores",
    "SealError",
    "SelfEdit",
    "SelfEditError",
    "Study",
    "Task",
    "adapt_many",
    "concat",
    "evaluate",
    "forward",
    "generate",
    "judge",
    "load_config",
    "load_model",
    "load_peft",
    "load_task",
    "lora",
    "merge",
    "outer",
    "pack",
    "run",
    "sample_edits",
    "save_hf",
    "save_peft",
    "score",
    "tasks",
]
