"""Calls made by a thread, in order, for which nobody waits."""

from __future__ import annotations

import threading
from functools import partial

from mim.core.background_writer import BackgroundWriter


def test_calls_are_made_in_order_and_waited_for() -> None:
    made: list[int] = []
    calls = BackgroundWriter("test")
    assert calls.wait(0) and calls.busy == 0
    free = threading.Event()
    calls.ask(free.wait)
    for number in range(100):
        calls.ask(partial(made.append, number))
    assert not calls.wait(0.01) and calls.busy >= 0.01 and calls.behind == 100
    free.set()
    assert calls.wait(10) and made == list(range(100)) and calls.busy == 0
    calls.end()


def test_the_first_call_that_raises_is_the_last_one() -> None:
    made: list[int] = []
    calls = BackgroundWriter("test")
    free = threading.Event()

    def fail() -> None:
        free.wait()
        raise SystemExit(3)

    calls.ask(fail)
    calls.ask(lambda: made.append(1))
    free.set()
    assert calls.wait(10)
    calls.ask(lambda: made.append(2))
    assert calls.wait(10) and not made
    assert isinstance(calls.error, SystemExit)
    calls.end()


def test_nothing_is_made_after_the_end() -> None:
    made: list[int] = []
    calls = BackgroundWriter("test")
    free = threading.Event()
    calls.ask(free.wait)
    calls.ask(lambda: made.append(1))
    calls.end()
    calls.ask(lambda: made.append(2))
    free.set()
    assert calls.wait(10) and not made
    thread = calls._thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
