"""Chunks side by side: results in order, errors reach the consumer, no program is made twice."""

import signal
import threading
import time

import jax
import numpy as np
import pytest

from seal_jax import streams


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_results_come_in_order_whoever_is_done_first(n):
    def work(i):
        time.sleep(0.02 if i % 2 == 0 else 0)
        return i * i

    assert list(streams.ordered(work, range(9), n)) == [i * i for i in range(9)]


def test_items_are_worked_on_at_the_same_time():
    together = threading.Barrier(3, timeout=20)  # broken unless three are at work at once
    assert list(streams.ordered(lambda i: together.wait() < 3, range(6), 3)) == [True] * 6


@pytest.mark.parametrize("n", [0, 2])
def test_an_error_is_raised_at_its_place_and_the_rest_is_not_begun(n):
    begun = []

    def work(i):
        begun.append(i)
        if i == 2:
            raise ValueError("the third")
        return i

    seen = []
    with pytest.raises(ValueError, match="the third"):
        for result in streams.ordered(work, range(100), n):
            seen.append(result)
    assert seen == [0, 1]
    assert max(begun) <= 2 + n


def test_a_consumer_that_stops_leaves_nothing_running():
    running = threading.active_count()
    results = streams.ordered(lambda i: time.sleep(0.01), range(100), 2)
    next(results)
    results.close()
    assert threading.active_count() == running


def test_on_ctrl_c_work_that_waits_is_not_begun():
    begun, main = [], threading.get_ident()

    def work(i):
        begun.append(i)
        time.sleep(0.1)  # until the consumer waits for this item
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.3)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(streams.ordered(work, range(9), 1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun == [0]


def test_work_is_done_under_the_settings_of_its_caller():
    def seen(_):
        moved = jax.jit(lambda x: x)
        try:
            moved(np.ones(3))  # a transfer that nothing names
            refused = False
        except jax.errors.JaxRuntimeError:
            refused = True
        return refused, jax.config.jax_default_matmul_precision, jax.config.jax_disable_jit

    assert list(streams.ordered(seen, range(2), 2)) == [(False, None, False)] * 2
    with jax.transfer_guard("disallow"), jax.default_matmul_precision("highest"):
        assert list(streams.ordered(seen, range(2), 2)) == [(True, "highest", False)] * 2
    with jax.disable_jit():
        assert list(streams.ordered(seen, range(2), 2)) == [(False, None, True)] * 2


def test_the_first_call_of_a_program_is_made_by_one_thread_alone():
    inside, most, lock = 0, 0, threading.Lock()

    def call(i):
        nonlocal inside, most
        with streams.first_call(("a program of this test", i % 2)):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with lock:
                inside -= 1

    # Other programs do not wait: at most one thread is in each of the two.
    list(streams.ordered(call, [0, 0, 0, 1], 4))
    assert most == 2
    both = threading.Barrier(2, timeout=20)  # broken if later calls took turns

    def later(i):
        with streams.first_call(("a program of this test", 0)):
            return both.wait() < 2

    assert all(streams.ordered(later, range(2), 2))
