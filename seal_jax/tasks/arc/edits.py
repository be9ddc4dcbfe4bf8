"""A self-edit of ARC: a JSON object that configures the model's own training. Untrusted."""

import json
from typing import Any, Literal, get_args

import pydantic

from seal_jax.errors import SelfEditError

MAX_TEXT = 4096  # 128 tokens are some 600 characters

Strategy = Literal["train_using_all_tokens", "train_using_output_tokens"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False
    )


class DataGeneration(_Strict):
    """Which families of augmenters make training data."""

    use_basic_augmentations: bool
    use_size_augmentations: bool
    use_chain_augmentations: bool
    use_repeat_augmentations: bool


FLAGS = tuple(DataGeneration.model_fields)
"""The keys of its families, in order."""


class Training(_Strict):
    """How to train on it; 0 epochs or a learning rate of 0 train nothing."""

    strategy: Strategy
    learning_rate: float = pydantic.Field(ge=0, le=1)
    num_train_epochs: int = pydantic.Field(ge=0, le=1000)


class ArcEdit(_Strict):
    """A valid self-edit."""

    data_generation: DataGeneration
    training: Training

    @property
    def loss_on(self) -> Literal["all", "output"]:
        """Which tokens carry loss."""
        return "all" if self.training.strategy == "train_using_all_tokens" else "output"

    @property
    def families(self) -> dict[str, bool]:
        """The chosen families, as `augment.families` takes them."""
        chosen = self.data_generation.model_dump()
        return {key.split("_")[1]: value for key, value in chosen.items()}


def make(
    basic: bool = False,
    size: bool = False,
    chain: bool = False,
    repeat: bool = False,
    strategy: Strategy = "train_using_output_tokens",
    learning_rate: float = 1e-4,
    epochs: int = 2,
) -> ArcEdit:
    """Returns a self-edit from its seven choices."""
    return ArcEdit(
        data_generation=DataGeneration(
            use_basic_augmentations=basic,
            use_size_augmentations=size,
            use_chain_augmentations=chain,
            use_repeat_augmentations=repeat,
        ),
        training=Training(strategy=strategy, learning_rate=learning_rate, num_train_epochs=epochs),
    )


def text(edit: ArcEdit) -> str:
    """Returns the JSON of a self-edit, laid out as the prompt asks for it."""
    return json.dumps(edit.model_dump(), indent=2)


def parse_self_edit(text: str) -> ArcEdit:
    """Returns the self-edit in a model's reply, which must be one JSON object and nothing else.

    Raises:
      SelfEditError: says why the reply is refused.
    """
    if not isinstance(text, str):
        raise SelfEditError(f"self-edit: expected text, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise SelfEditError(f"self-edit: longer than {MAX_TEXT} characters")
    bare = text.strip()
    if bare.startswith("```"):
        raise SelfEditError("self-edit: wrapped in a code fence")
    try:
        tree, end = _DECODER.raw_decode(bare)
    except SelfEditError:
        raise
    except RecursionError as error:
        raise SelfEditError("self-edit: nested too deeply") from error
    except ValueError as error:  # also numbers of thousands of digits
        reason = getattr(error, "msg", "a number is too long")
        raise SelfEditError(f"self-edit: not JSON: {reason}") from error
    if end != len(bare):
        raise SelfEditError("self-edit: text after the JSON object")
    try:
        return ArcEdit.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise SelfEditError(f"self-edit: {key[:80]}: {first['msg']}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise SelfEditError("self-edit: a key appears twice")
    return tree


def _constant(name: str) -> float:
    raise SelfEditError(f"self-edit: {name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
