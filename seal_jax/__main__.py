"""The command line: `python -m seal_jax COMMAND`, also installed as `seal-jax`."""

import gc
import os
import sys

from seal_jax.commands import COMMANDS, usage
from seal_jax.errors import Interrupted, SealError, Stopped

_GOING_ON = (["run"], ["eval"])


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for bad input, 130 when interrupted, 143 by SIGTERM.

    Args:
      arguments: None takes those of this process, which is then ours to end.
    """
    # Tracing makes hundreds of thousands of small objects: looking through all that live after
    # every 700 of them takes a fifth of a short command.
    gc.set_threshold(200_000, 10, 10)
    ours = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = _command(arguments)
        if sys.stdout is not None:  # closed by who called us
            sys.stdout.flush()
        return status
    except SealError as error:
        print(f"seal-jax: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"seal-jax: {error}", file=sys.stderr)
        return 143
    except KeyboardInterrupt as error:
        goes_on = "; the same command goes on from here" if arguments[:1] in _GOING_ON else ""
        print(f"seal-jax: interrupted{goes_on}", file=sys.stderr)
        if ours and not isinstance(error, Interrupted):
            # Python's own end waits for programs on the devices, and then crashes under them.
            sys.stderr.flush()
            os._exit(130)
        return 130
    except BrokenPipeError:  # who reads our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"seal-jax: {error.filename or 'error'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _command(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise SealError(f"unknown command {name!r}: expected one of {known}")
    return COMMANDS[name](rest) or 0


if __name__ == "__main__":
    sys.exit(main())
