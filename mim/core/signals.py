"""Signals: those that end a long computation after its step, saved, and Ctrl-C anywhere else."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal ended a computation after its state was saved."""

    def __init__(self, number: int, saved: str) -> None:
        self.code = 128 + number  # the exit code
        super().__init__(f"{signal.Signals(number).name}: {saved}")


# SLURM warns of the end by the signal that `sbatch --signal` names, by custom SIGUSR1.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)  # Windows has no SIGUSR1
]


_LATER = 0.1
"""Seconds after which a Ctrl-C within an import is tried again."""
_AGAIN = 1.0
"""Seconds in which a second SIGINT is the first one: a launcher passes on what a terminal sends to
all of its processes."""


@contextlib.contextmanager
def between_imports() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, but the first one not in the middle of an import.

    Libraries that are being imported swallow it, or are half loaded after it and fail elsewhere.
    Where Python itself ignores an exception, such as in ``__del__``, it is sent once more.
    """
    first, sent_again = math.inf, False
    later: threading.Timer | None = None

    def wait() -> None:
        nonlocal later
        later = threading.Timer(_LATER, send_again)
        later.daemon = True
        later.start()

    def send_again() -> None:
        nonlocal sent_again
        sent_again = True
        os.kill(os.getpid(), signal.SIGINT)

    def forget() -> None:
        nonlocal first, sent_again, later
        first, sent_again = math.inf, False
        if later is not None:
            later.cancel()
            later = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal first, sent_again
        while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        now = time.monotonic()
        if frame is None or (not sent_again and now - first > _AGAIN):
            forget()
            raise KeyboardInterrupt
        if sent_again or first == math.inf:  # else it waits to be sent again already
            wait()
        first, sent_again = min(first, now), False

    def ignored(found: sys.UnraisableHookArgs) -> None:
        if issubclass(found.exc_type, KeyboardInterrupt):
            wait()
        else:
            old_ignored(found)

    main = threading.current_thread() is threading.main_thread()
    old = signal.getsignal(signal.SIGINT)
    # On other systems os.kill ends the process; one started to ignore SIGINT must keep doing so.
    if not main or os.name != "posix" or old is not signal.default_int_handler:
        yield
        return
    old_ignored, sys.unraisablehook = sys.unraisablehook, ignored
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        forget()
        signal.signal(signal.SIGINT, old)
        sys.unraisablehook = old_ignored


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Start processes that do not get Ctrl-C until they call :func:`hear`."""
    if os.name != "posix":
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def start_server() -> None:
    """Start the server of forked processes, unheard: while importing it would print tracebacks."""
    resource_tracker.ensure_running()  # it would let Ctrl-C through again
    with unheard():
        forkserver.ensure_running()


def hear() -> None:
    """Get Ctrl-C again; see :func:`unheard`."""
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_at_once() -> None:
    """Let Ctrl-C end this process silently: the one that started it reports."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    hear()


class Signals:
    """Notes SIGINT, SIGTERM and SIGUSR1, so that a loop can finish its step and save."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._since = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
            for number in _SIGNALS:
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.caught is None:
            self._since = now
        elif number == signal.SIGINT and now - self._since > _AGAIN:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.caught = number

    def __exit__(self, *details: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
