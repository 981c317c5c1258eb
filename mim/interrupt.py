"""Signals that end a long computation after its step, with its state saved."""

from __future__ import annotations

import contextlib
import signal
import time
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal ended a computation after its state was saved.

    Attributes:
        code: the exit code, 128 + the signal's number.
    """

    def __init__(self, number: int, saved: str) -> None:
        self.code = 128 + number
        super().__init__(f"{signal.Signals(number).name}: {saved}")


# SLURM warns of the end by the signal that `sbatch --signal` names, by custom SIGUSR1.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)  # Windows has no SIGUSR1
]


_AGAIN = 1.0
"""Seconds in which a second SIGINT is the first one: a launcher passes on what a terminal sends to
all of its processes."""


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
