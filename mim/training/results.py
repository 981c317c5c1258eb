"""Reads and changes ``result.json`` of a run folder; nothing else writes it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mim.core.errors import UserError
from mim.core.files import write_json_atomic
from mim.core.lock import InUse, sole_use

NAME = "result.json"
UNFINISHED = "unfinished"
"""``status`` of a run that was evaluated before its end, which writes the file anew."""
_LOCK = ".result.lock"
_THREADS = threading.Lock()
_SECONDS = 60.0  # time-out for another writer, which needs milliseconds
_MAPPINGS = ("evaluations", "evaluation_settings", "evaluation_precision", "protocols", "config")


def read_result(run: str | Path) -> dict[str, Any]:
    """Reads ``result.json`` of a run folder; returns {} if there is none.

    Raises:
        UserError: if it is torn, or not what a run writes.
    """
    path = Path(run) / NAME
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(result, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    for key in _MAPPINGS:
        if not isinstance(result.get(key, {}), dict):
            raise UserError(f"{path} cannot be read: its {key!r} is no mapping")
    for name, numbers in result.get("evaluations", {}).items():
        if not isinstance(numbers, dict):
            raise UserError(f"{path} cannot be read: its evaluation {name!r} is no mapping")
    return result


def update_result(
    run: str | Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Replaces the content of ``result.json`` by ``change`` of it, and returns the new content.

    Raises:
        UserError: if it cannot be read, or another process locks it for a minute.
    """
    with _THREADS, _alone(Path(run)):
        result = change(read_result(run))
        write_json_atomic(Path(run) / NAME, result)
        return result


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Waits until no other process changes the file."""
    end = time.monotonic() + _SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(sole_use(run, NAME, _LOCK))
                break
            except InUse:
                if time.monotonic() > end:
                    raise
            time.sleep(0.01)
        yield
