"""In which shape the inputs of a program reach its arithmetic, read off its jaxpr."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

# These move or cast an array without mixing it with another: what comes out is still the input.
_MOVES = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "dynamic_slice",
    "expand_dims",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "transpose",
}


def uses(function: Any, names: list[str], *args: Any) -> dict[str, set[tuple[int, ...]]]:
    """Returns, for the first inputs of a function, the shapes in which arithmetic meets them.

    Args:
      function: Traced with args; its first leaves are called `names`.
    """
    closed = jax.make_jaxpr(function)(*args)
    labels: list[str | None] = [*names, *[None] * (len(closed.jaxpr.invars) - len(names))]
    found: dict[str, set[tuple[int, ...]]] = {name: set() for name in names}
    for name, shape in _walk(closed.jaxpr, labels):
        found[name].add(shape)
    return found


def _walk(jaxpr: Any, labels: list[str | None]) -> Iterator[tuple[str, tuple[int, ...]]]:
    known = {var: label for var, label in zip(jaxpr.invars, labels, strict=True) if label}
    for eqn in jaxpr.eqns:
        given = [None if isinstance(v, core.Literal) else known.get(v) for v in eqn.invars]
        if eqn.primitive.name in _MOVES and given[0]:
            known[eqn.outvars[0]] = given[0]
            continue
        inner = list(_inner(eqn, given))
        for body, passed in inner:
            yield from _walk(body, passed)
        if not inner:
            yield from ((x, v.aval.shape) for x, v in zip(given, eqn.invars, strict=True) if x)


def _inner(eqn: Any, given: list[str | None]) -> Iterator[tuple[Any, list[str | None]]]:
    """Yields the programs inside an equation, with the labels of their inputs."""
    params, kind = eqn.params, eqn.primitive.name
    if kind == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        yield params["body_jaxpr"].jaxpr, given[n_cond : n_cond + n_body] + given[n_cond + n_body :]
    elif kind == "cond":
        yield from ((branch.jaxpr, given[1:]) for branch in params["branches"])
    else:
        for value in params.values():
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns") and len(body.invars) == len(given):
                yield body, given
