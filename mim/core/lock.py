"""One process at a time in a run folder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mim.core.errors import UserError, setting_error

try:
    import fcntl
except ImportError:  # where there is none, nobody is kept out
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


class InUse(UserError):
    """A folder belongs to another process now."""


def in_use(folder: Path) -> bool:
    """Whether another process works in a folder."""
    try:
        with sole_use(folder):
            return False
    except InUse:
        return True


@contextmanager
def sole_use(folder: Path, setting: str = "output", name: str = NAME) -> Iterator[None]:
    """Keep other processes out of a folder for as long as this one works there.

    The lock is the system's (POSIX record locks, which network file systems know too): it ends
    with the process, however it dies, so that none is ever stale, and workers do not inherit it,
    as they do filelock's, which before its version 4 also empties the file of whoever holds it.
    Its file says who works there, and goes with them.

    Raises:
        InUse: if another process works there; it names the process, and the ``setting``.
    """
    if fcntl is None:
        yield
        return
    path = folder / name
    file = _locked(path, setting)
    try:
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock ends: after it, the file may be another's
        file.close()


def _locked(path: Path, setting: str) -> TextIO:
    """The lock's file, open and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            reason = f"is in use by {_owner(file.read())}; wait for it, or choose another"
            file.close()
            raise InUse(str(setting_error(setting, str(path.parent), reason))) from error
        # Whoever had it may have removed this file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
