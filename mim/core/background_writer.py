"""Calls that keep nobody waiting: a thread makes them, in the order they were asked for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """Makes calls in order in a thread of its own; the first that raises is the last one made.

    The thread never keeps the process from ending. Who wants the calls to be done waits for them.

    Args:
        name: of the thread.

    Attributes:
        error: what the last call raised, if it did.
    """

    def __init__(self, name: str) -> None:
        self.error: BaseException | None = None
        self._name = name
        self._calls: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._began: float | None = None
        self._ended = False

    def ask(self, call: Callable[[], object]) -> None:
        """Make a call after those asked for before; none after an error or :meth:`end`."""
        with self._changed:
            if self._ended or self.error is not None:
                return
            self._calls.append(call)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    @property
    def behind(self) -> int:
        """Calls that have not begun."""
        return len(self._calls)

    @property
    def busy(self) -> float:
        """Seconds since the call that is being made began."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def wait(self, seconds: float | None = None) -> bool:
        """Until all calls are made, or for so many seconds; returns whether they are."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._calls and self._began is None, timeout=seconds
            )

    def end(self) -> None:
        """Make no further call; one that is being made goes on, and nobody waits for it."""
        with self._changed:
            self._ended = True
            self._calls.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._ended)
                if self._ended:
                    return
                call = self._calls.popleft()
                self._began = time.monotonic()
            error = None
            try:
                call()
            except BaseException as raised:  # whoever asked looks at it
                error = raised
            with self._changed:
                self._began = None
                if error is not None:
                    self.error = error
                    self._calls.clear()
                self._changed.notify_all()
