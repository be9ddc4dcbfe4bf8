"""The command line: `python -m seal_jax COMMAND`, also installed as `seal-jax`."""

import gc
import sys

from seal_jax.commands import COMMANDS, usage
from seal_jax.errors import SealError, Stopped


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for bad input, 130 when interrupted, 143 by SIGTERM."""
    # Tracing makes hundreds of thousands of small objects: looking through all that live after
    # every 700 of them takes a fifth of a short command.
    gc.set_threshold(200_000, 10, 10)
    arguments = sys.argv[1:] if arguments is None else arguments
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
        return 0
    try:
        if name not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise SealError(f"unknown command {name!r}: expected one of {known}")
        return COMMANDS[name](rest) or 0
    except SealError as error:
        print(f"seal-jax: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"seal-jax: {error}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("seal-jax: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
