"""How far a run is, read from its folder alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim.core.errors import UserError
from mim.core.files import load_yaml
from mim.core.progress import clock

QUIET = 600.0
"""Seconds after which a run that has written nothing is taken to have stopped."""
_TAIL = 65536
"""Bytes at the end of metrics.jsonl that are read: the state is in the last lines."""


UNREADABLE = "unreadable"
"""The state of a run whose files are torn, or not what a run writes."""
ODD: tuple[type[Exception], ...] = (
    *(UserError, OSError, TypeError, ValueError),
    *(AttributeError, KeyError, OverflowError, RecursionError),
)
"""What reading such files raises."""


def why_unreadable(folder: Path, error: Exception) -> str:
    """The reason, for people."""
    if isinstance(error, UserError):
        return str(error)
    return f"{folder}: its files are not what a run writes ({error})"


def is_unfinished(result: Mapping[str, Any]) -> bool:
    """Whether the run has not ended: its ``result.json`` is empty, or holds evaluations alone."""
    return "steps" not in result and result.get("status", "unfinished") == "unfinished"


@dataclass(frozen=True)
class Progress:
    """Where a run is that has no result yet."""

    status: str
    """``waiting`` (not begun), ``running``, or ``stopped`` (nothing written for ten minutes)."""
    step: int = 0
    total: int | None = None
    """Steps in all, where they can be told."""
    loss: float | None = None
    seconds_left: float | None = None

    @property
    def reason(self) -> str:
        """The state in words."""
        if self.status == "waiting":
            return "not begun yet: no result.json"
        where = f"at step {self.step}" + (f" of {self.total}" if self.total else "")
        where = where if self.step else "before its first logged step"
        if self.status == "stopped":
            minutes = round(QUIET / 60)
            return f"{where}, and nothing written for {minutes} minutes: no result.json"
        left = f", {clock(self.seconds_left)} left" if self.seconds_left is not None else ""
        return where + left


def read_progress(folder: Path) -> Progress:
    """The state of a run folder without a ``result.json``.

    Raises:
        UserError: if its ``config.yaml`` cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        return Progress("waiting")
    files = (folder / name for name in ("config.yaml", "metrics.jsonl", "checkpoints"))
    newest = max(path.stat().st_mtime for path in files if path.exists())
    status = "running" if time.time() - newest < QUIET else "stopped"
    last = last_metrics(folder)
    if not last.get("step"):
        return Progress(status)
    config = read_yaml(folder / "config.yaml")
    step, epoch = int(last["step"]), float(last["epoch"])
    train = config.get("train") or {}
    total = round(train.get("epochs", epoch) * step / epoch) if epoch else None
    if total and train.get("max_steps"):
        total = min(total, int(train["max_steps"]))
    rate, batch = last.get("images_per_second"), (config.get("data") or {}).get("batch_size")
    left = (total - step) * batch / rate if total and rate and batch else None
    return Progress(status, step, total, last.get("loss"), left)


def last_metrics(folder: Path) -> dict[str, Any]:
    """The newest value of each metric; empty where nothing was logged."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL, 0))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    found: dict[str, Any] = {}
    for line in lines[:-1]:  # what follows the last line end is still being written
        try:
            found.update(json.loads(line))
        except ValueError:  # the first of the tail may be cut
            continue
    return found


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: if it holds something else, or cannot be read.
    """
    try:
        content = load_yaml(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping of settings")
    return content
