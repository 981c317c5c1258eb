"""The curves of a run: ``metrics.jsonl`` and trackers."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mim.core.background_writer import BackgroundWriter
from mim.core.errors import TrainingError
from mim.core.files import write_text_atomic
from mim.training.runtime.trackers import Trackers


class Metrics:
    """Writes ``metrics.jsonl`` from a thread, so that a slow disk does not slow the training.

    Args:
        path: of the file.
        step: lines of later steps, left by a run that was killed, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._lines: deque[str] = deque()
        self._writer = BackgroundWriter("mim-metrics")
        if path.is_file():
            lines = []
            text = path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                # A line cut short by a kill, or damaged.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    if json.loads(line)["step"] <= step:
                        lines.append(line + "\n")
            write_text_atomic(path, "".join(lines))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._writer.wait()
        self._writer.end()
        if kind is None:
            self.check()

    def write(self, **values: Any) -> None:
        """Appends a line; raises as :meth:`check` does."""
        self.check()
        self._lines.append(json.dumps(values) + "\n")
        self._writer.ask(self._append)

    def flush(self) -> None:
        """Waits until all lines are in the file, which must not lag behind a checkpoint."""
        self._writer.wait()
        self.check()

    def check(self) -> None:
        """Raises TrainingError if a line could not be written."""
        error = self._writer.error
        if isinstance(error, OSError):
            raise TrainingError(
                f"{str(self.path)!r} cannot be written: {error.strerror or error}; the last good "
                "checkpoint is kept. Make room, then go on with --resume auto"
            ) from error
        if error is not None:
            raise error

    def _append(self) -> None:
        """Writes all waiting lines at once: on a slow disk there are many."""
        text = "".join(self._lines.popleft() for _ in range(len(self._lines)))
        if text:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)


class Curves:
    """Gives the numbers of a training to a file, in the first process, and to trackers."""

    def __init__(self, metrics: Metrics | None = None, trackers: Trackers | None = None) -> None:
        self.metrics, self.trackers = metrics, trackers
        self._open = ExitStack()

    def __enter__(self) -> Curves:
        for part in (self.trackers, self.metrics):
            if part is not None:
                self._open.enter_context(part)
        return self

    def __exit__(self, *details: Any) -> None:
        self._open.__exit__(*details)

    def log(self, step: int, epoch: float, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(step=step, epoch=epoch, **values)
        if self.trackers is not None:
            self.trackers.log(values, step)

    def picture(self, path: Path, step: int) -> None:
        if self.trackers is not None:
            self.trackers.picture(path, step)

    def flush(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()

    def check(self) -> None:
        if self.metrics is not None:
            self.metrics.check()
