"""What a terminal shows of a long run: a bar with rate, time left, loss; plain lines in a pipe."""

from __future__ import annotations

import functools
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mim.core.terminal import printable

_SECONDS_BETWEEN_LINES = 15.0
_FIRST_SIGN = 5.0  # seconds
_silent = False


def silence() -> None:
    """Let no run of this process show its progress from now on."""
    global _silent
    _silent = True


def clock(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def note(text: str) -> None:
    """Write a line to stderr."""
    Console(stderr=True, soft_wrap=True).print(printable(text), markup=False, highlight=False)


@functools.cache
def note_once(text: str) -> None:
    """:func:`note`, but what was said in this process is not said again."""
    note(text)


def stage(text: str) -> None:
    """Say what a run does next, where its progress is shown as lines."""
    if not _silent and not Console(stderr=True).is_terminal:
        note(text)


class RunProgress:
    """Shows on stderr how far a run is.

    Args:
        label: what runs.
        total: steps in all.
        start: steps done before.
        enabled: False shows nothing (all processes but the first).
        measure: name of the number that is shown with each step.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        enabled: bool = True,
        measure: str = "loss",
    ) -> None:
        enabled = enabled and not _silent
        self.measure = measure
        self.label, self.total, self.start, self.enabled = label, total, start, enabled
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._began = self._last = time.monotonic()
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, figures="")

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def alive(self, step: int) -> None:
        """Say once, some seconds after the start, that steps are taken; a bar shows it itself."""
        took = time.monotonic() - self._began
        if self.enabled and self._bar is None and self._last == self._began and took > _FIRST_SIGN:
            self._last = time.monotonic()
            line = f"{self.label}  step {step}/{self.total}  after {took:.1f} s"
            print(line, file=sys.stderr, flush=True)

    def update(self, step: int, loss: float, rate: float | None = None) -> None:
        """Show steps done in all, the latest loss or other measure, and images per second."""
        if not self.enabled:
            return
        figures = f"{self.measure} {loss:.4f}"
        if rate is not None:
            figures += f"  {rate:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if step < self.total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        done = max(step - self.start, 1)
        left = (now - self._began) / done * (self.total - step)
        line = f"{self.label}  step {step}/{self.total}  {figures}  left {clock(left)}"
        print(line, file=sys.stderr, flush=True)
