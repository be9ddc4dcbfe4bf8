"""Progress of long stages: a bar on a terminal, plain lines elsewhere. All on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from seal_jax import multihost

_EVERY_S = 15.0


def say(text: str) -> None:
    """Prints a line; of several processes only the first one speaks."""
    if not multihost.leads():
        return
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that reports n more of `total` as done."""
    if sys.stderr.isatty() and multihost.leads():
        from rich import console, progress

        columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
        with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n: bar.advance(task, n)
        return
    start = last = time.monotonic()
    count = 0

    def advance(n: int) -> None:
        nonlocal count, last
        count += n
        if time.monotonic() - last > _EVERY_S and count < total:
            last = time.monotonic()
            say(f"{label}: {count} of {total}")

    yield advance
    say(f"{label}: {count} of {total} in {time.monotonic() - start:.1f} s")
