"""The language of valid self-edits: JSON of the schema, for grammar-constrained sampling."""

import functools

from seal_jax import grammar
from seal_jax.grammar import Automaton, chain, either, one_of, text, up_to
from seal_jax.tasks.arc import edits

_DIGIT, _HIGH = one_of("0123456789"), one_of("123456789")
_SPACE = up_to(one_of(" \n"), 8)
"""Between the parts; bounded, or a text could be spaces without end."""


@functools.cache
def self_edits() -> Automaton:
    """Returns the language: every text of it is a valid self-edit with a rate and epochs above 0.

    Keys in the order of the prompt, rates from 1e-9 to below 1, 1 to 99 epochs.
    """
    flag = either(text("true"), text("false"))
    flags = [(key, flag) for key in edits.FLAGS]
    strategy = either(*(text(f'"{name}"') for name in edits.STRATEGIES))
    mantissa = chain(_HIGH, either(text(""), chain(text("."), _DIGIT)))
    rate = either(
        chain(mantissa, text("e-"), _HIGH),
        chain(mantissa, text("e-0"), _HIGH),
        chain(text("0."), up_to(text("0"), 7), _HIGH, up_to(_DIGIT, 2)),
    )
    epochs = chain(_HIGH, up_to(_DIGIT, 1))
    training = [
        ("strategy", strategy),
        ("learning_rate", rate),
        ("num_train_epochs", epochs),
    ]
    whole = _object([("data_generation", _object(flags)), ("training", _object(training))])
    return grammar.automaton(chain(_SPACE, whole))


def _object(entries):
    parts = [text("{")]
    for number, (key, value) in enumerate(entries):
        comma = [text(","), _SPACE] if number else [_SPACE]
        parts += [*comma, text(f'"{key}"'), _SPACE, text(":"), _SPACE, value, _SPACE]
    return chain(*parts, text("}"))
