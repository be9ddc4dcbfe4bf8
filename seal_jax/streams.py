"""Chunks of candidates side by side: the host grades one while the device works on the next.

A CPU works on several chunks at once: the products of a small model keep only one core busy.
Results come in the order of the chunks, whoever is done first.
"""

import collections
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST = 4

# What JAX keeps for each thread: a block under one of these means the threads of its work too.
_SETTINGS = {
    "jax_default_device": jax.default_device,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_transfer_guard_host_to_device": jax.transfer_guard_host_to_device,
    "jax_transfer_guard_device_to_host": jax.transfer_guard_device_to_host,
    "jax_transfer_guard_device_to_device": jax.transfer_guard_device_to_device,
    "jax_disable_jit": jax.disable_jit,
    "jax_debug_nans": jax.debug_nans,
}

_guard = threading.Lock()
_first_calls: dict[Hashable, Any] = {}


def count(devices: int = 1) -> int:
    """Returns how many chunks are worked on at once: on a CPU one a core, elsewhere 1.

    0 where several processes must dispatch the same programs in the same order.

    Args:
      devices: That run each program together. Of several, all must start programs in one order.
    """
    if jax.process_count() > 1:
        return 0
    if jax.default_backend() != "cpu" or devices > 1:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _MOST))


def ordered(
    work: Callable[[Item], Result], items: Iterable[Item], streams: int | None = None
) -> Iterator[Result]:
    """Yields `work` of each item, in order; it runs ahead of the consumer by `streams` items.

    Args:
      work: Runs in threads of its own, except with 0 streams, under the caller's settings of JAX.
      streams: Items worked on at once; `count()` by default.
    """
    streams = count() if streams is None else streams
    if not streams:
        yield from map(work, items)
        return
    work = _as_here(work)
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > streams:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the consumer may have stopped, or an item failed
            for future in waiting:
                future.cancel()


def _as_here(work: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """Returns the work, to be done in another thread under this thread's settings of JAX."""
    here = {name: getattr(jax.config, name) for name in _SETTINGS}

    def done(item: Item) -> Result:
        with contextlib.ExitStack() as stack:
            for name, value in here.items():
                if value is not None:
                    stack.enter_context(_SETTINGS[name](value))
            return work(item)

    return done


@contextlib.contextmanager
def first_call(program: Hashable) -> Iterator[None]:
    """Lets one thread make the first call of a program alone, so that none is compiled twice."""
    with _guard:
        own = _first_calls.setdefault(program, threading.Lock())
    if own is None:
        yield
        return
    with own:
        yield
    _first_calls[program] = None
