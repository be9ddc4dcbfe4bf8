"""Several processes, one run: each runs the same program, process 0 reads and writes files.

JAX's own runtime (`jax.distributed`) joins the processes. Whatever decides the course of a run is
decided by process 0 and told to all (`agree`), so that no two processes ever part ways. A process
that is lost would leave the others waiting in a collective: each keeps a line open to process 0, so
that all hear of it at once, say so and end.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from seal_jax import config as config_lib
from seal_jax.errors import Interrupted, SealError, Stopped

LOST = 75  # exit status of a process that another one left alone (EX_TEMPFAIL)
_GRACE_S = 5
_MOMENT_S = 1  # for a sentence to be said
_asked: set[int] = set()  # signals


@contextlib.contextmanager
def together(settings: config_lib.Distributed, heed: bool = True) -> Iterator[None]:
    """Joins the processes of a run, and keeps watch over them until it ends.

    Inside, SIGTERM (a preempted machine) and Ctrl-C make `check` stop the run at its next record.

    Args:
      heed: Whether there are records to stop at; else signals do what they always do.

    Raises:
      SealError: where the others cannot be reached.
    """
    _join(settings)
    with _heeding_signals() if heed else contextlib.nullcontext():
        if jax.process_count() == 1:
            yield
            return
        say = _watch(settings)
        try:
            yield
        except BaseException as error:
            planned = isinstance(error, Stopped | KeyboardInterrupt)
            if not planned and not isinstance(error, SealError):
                # A collective fails when another process is lost: the line to it says which.
                time.sleep(_MOMENT_S)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            say("" if planned else f"stopped: {reason[0]}")
            raise
        say("")


def _join(settings: config_lib.Distributed) -> None:
    if jax.distributed.is_initialized():
        return
    known = (settings.coordinator, settings.processes or None, settings.process_id)
    timeouts = {
        "initialization_timeout": settings.start_s,
        "heartbeat_timeout_seconds": settings.heartbeat_s,
        "shutdown_timeout_seconds": settings.heartbeat_s,
    }
    if not any(value is not None for value in known):
        if settings.detect == "never" or (settings.detect == "auto" and not _several_hosts()):
            return
    elif None in known:
        raise SealError(
            "distributed: coordinator, processes and process_id are given together or not at all"
        )
    try:
        jax.distributed.initialize(*known, **timeouts)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = settings.coordinator or "the cluster's coordinator"
        raise SealError(f"distributed: cannot join the run at {where}: {reason}") from error


def _several_hosts() -> bool:
    """Returns whether the environment says that this process is one of several."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"
    return len(hosts) > 1 or (tasks.isdigit() and int(tasks) > 1)


def leads() -> bool:
    """Returns whether this is process 0, the one that reads, writes and judges."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agree(act: Callable[[], bytes]) -> bytes:
    """Returns what `act` returns in process 0, where alone it runs.

    Raises:
      Exception: in process 0 what `act` raises; in the others a SealError that says the same.
    """
    if jax.process_count() == 1:
        return act()
    failed: Exception | None = None
    message = b""
    if leads():
        try:
            message = b"+" + act()
        except Exception as error:
            failed, message = error, b"-" + str(error).encode()
    message = _broadcast(message)
    if failed is not None:
        raise failed
    if message[:1] == b"-":
        raise SealError(message[1:].decode())
    return message[1:]


def broadcast(array: np.ndarray) -> np.ndarray:
    """Returns process 0's array; the others give one of the same shape and type."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _broadcast(message: bytes) -> bytes:
    """Returns process 0's message."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    # Few sizes: each one is a program to compile.
    room = max(1 << 10, 1 << (size - 1).bit_length())
    data = np.zeros(room, np.uint8)
    data[: len(message)] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes()[:size]


def check() -> None:
    """Raises Stopped, or Interrupted, in every process where any of them was asked to stop.

    Called after records were written, by all processes at the same places.
    """
    asked = max(_asked, default=0)
    if jax.process_count() > 1:
        asked = int(np.max(multihost_utils.process_allgather(np.int32(asked))))
    if asked == signal.SIGINT:
        raise Interrupted("records are saved and the same call goes on from here")
    if asked:
        raise Stopped(
            "stopped by SIGTERM; records are saved and the same command goes on from here"
        )


@contextlib.contextmanager
def _heeding_signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # a notebook's or a test's thread cannot handle signals
        return

    def ask(number: int, frame: Any) -> None:
        # Raised here, Ctrl-C could come up in a finaliser, where Python swallows it, or in C++.
        _asked.add(number)
        signal.signal(number, before[number])  # a second one ends the process at once
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        print(f"seal-jax: {name}: stopping at the next record", file=sys.stderr, flush=True)

    _asked.clear()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # What is ignored, as Ctrl-C is in the background, or is not Python's stays as it is.
    before = {k: v for k, v in before.items() if v not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def _watch(settings: config_lib.Distributed) -> Callable[[str], None]:
    """Returns a function that tells the others why this process ends ("" is the plan).

    Each process holds a line to process 0; one that breaks without a word means a lost process.
    """
    host = (settings.coordinator or "").rpartition(":")[0] or socket.gethostname()
    listener = socket.socket() if leads() else None
    if listener:
        listener.bind(("", 0))
        listener.listen(jax.process_count())
    card = lambda: json.dumps([host, listener.getsockname()[1], secrets.token_hex(16)]).encode()
    host, port, token = json.loads(agree(card))
    if listener:
        lines = _welcome(listener, token, settings)
    else:
        lines = {0: socket.create_connection((host, port), timeout=settings.start_s)}
        lines[0].sendall(json.dumps([token, jax.process_index()]).encode() + b"\n")
        lines[0].settimeout(None)
    for line in lines.values():
        _keep_alive(line, settings.heartbeat_s)
    over = threading.Event()

    def tell(reason: str, skip: int = -1) -> None:
        over.set()
        for number, line in lines.items():
            if number != skip:
                with contextlib.suppress(OSError):
                    line.sendall((json.dumps(reason) + "\n").encode())

    def listen(number: int, line: socket.socket) -> None:
        with contextlib.suppress(OSError):
            words = line.makefile().readline()
            reason = json.loads(words) if words.endswith("\n") else "was lost"
            # An error that all meet ends each by itself; give this process the time to.
            if not reason or over.wait(0 if reason == "was lost" else _GRACE_S):
                return
            own = f"process {number} of {jax.process_count()} {reason}"
            own = reason if reason.startswith("process ") else own
            tell(own, skip=number)
            advice = "records are saved; start all processes again to go on"
            print(f"seal-jax: {own}: {advice}", file=sys.stderr, flush=True)
            if leads():  # without its coordinator JAX aborts the others before they can speak
                time.sleep(_MOMENT_S)
            os._exit(LOST)  # the main thread may be waiting in a collective for ever

    for number, line in lines.items():
        threading.Thread(target=listen, args=(number, line), daemon=True).start()
    return tell


def _welcome(
    listener: socket.socket, token: str, settings: config_lib.Distributed
) -> dict[int, socket.socket]:
    """Returns a line to every other process, by its number; strangers are turned away."""
    lines: dict[int, socket.socket] = {}
    listener.settimeout(settings.start_s)
    while len(lines) < jax.process_count() - 1:
        line, _ = listener.accept()
        line.settimeout(settings.start_s)
        try:
            given, number = json.loads(line.recv(200))
        except (OSError, ValueError, TypeError):
            line.close()
            continue
        if secrets.compare_digest(str(given).encode("utf-8", "replace"), token.encode()):
            line.settimeout(None)
            lines[int(number)] = line
        else:
            line.close()
    listener.close()
    return lines


def _keep_alive(line: socket.socket, seconds: int) -> None:
    """Makes a line to a machine that went dark break after about so many seconds."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, seconds // 3)
    for name, value in (("TCP_KEEPIDLE", every), ("TCP_KEEPINTVL", every), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
