"""``metrics.jsonl``: the curves of a run, a line each interval."""

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
    """``metrics.jsonl``: a line each interval, never one twice.

    A thread writes the lines, so that a slow disk does not slow the training; leaving waits for it.

    Args:
        path: of the file.
        step: lines of later steps, left by a run that was killed, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._lines: deque[str] = deque()
        self._writer = BackgroundWriter("mim-metrics")
        if path.is_file():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line cut short by a kill
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
            write_text_atomic(path, "".join(kept))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._writer.wait()
        self._writer.end()
        if kind is None:
            self.check()

    def write(self, **values: Any) -> None:
        """Append a line, after those before.

        Raises:
            TrainingError: where one before cannot be written.
        """
        self.check()
        self._lines.append(json.dumps(values) + "\n")
        self._writer.ask(self._append)

    def flush(self) -> None:
        """Until all lines are in the file: a checkpoint must not know of steps that it lacks.

        Raises:
            TrainingError: where they cannot be written.
        """
        self._writer.wait()
        self.check()

    def check(self) -> None:
        """Raises TrainingError where a line could not be written."""
        error = self._writer.error
        if isinstance(error, OSError):
            raise TrainingError(
                f"{str(self.path)!r} cannot be written: {error.strerror or error}; the last good "
                "checkpoint is kept. Make room, then go on with --resume auto"
            ) from error
        if error is not None:
            raise error

    def _append(self) -> None:
        """All lines that wait, at once: where the disk is slow, they are many."""
        text = "".join(self._lines.popleft() for _ in range(len(self._lines)))
        if text:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)


class Curves:
    """Where the numbers of a training go: a file, and trackers.

    Args:
        metrics: None writes no file, as all processes but the first.
        trackers: None are none.
    """

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
        """Write a line."""
        if self.metrics is not None:
            self.metrics.write(step=step, epoch=epoch, **values)
        if self.trackers is not None:
            self.trackers.log(values, step)

    def picture(self, path: Path, step: int) -> None:
        """Show a picture as ``reconstructions``."""
        if self.trackers is not None:
            self.trackers.picture(path, step)

    def flush(self) -> None:
        """Until all lines are in the file; see :meth:`Metrics.flush`."""
        if self.metrics is not None:
            self.metrics.flush()

    def check(self) -> None:
        """Raises TrainingError where a line could not be written."""
        if self.metrics is not None:
            self.metrics.check()
