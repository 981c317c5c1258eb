"""Calls in the background: a thread makes them in order, so that nobody waits for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """Makes calls in order in a thread of its own; none after one that raises (see ``error``).

    The thread never keeps the process from ending; :meth:`wait` makes sure that the calls are done.
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
        """Queue a call; ignored after an error or :meth:`end`."""
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
        """Wait until all calls are made, or for some seconds; return whether they are."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._calls and self._began is None, timeout=seconds
            )

    def end(self) -> None:
        """Make no further call, and do not wait for the one that is being made."""
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
