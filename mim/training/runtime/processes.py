"""Several processes of one run: none waits for another for ever, and the missing one is named.

torch ends an operation of all processes after a time-out, but does not tell which of them is
missing, nor does a process that hangs elsewhere learn of it. So a thread of each process tells the
store of torch's rendezvous that it lives and where its main thread is, and looks there whether
another has failed.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch.distributed as dist

from mim.core.errors import LostProcess
from mim.core.signals import Interrupted

T = TypeVar("T")
_FAILED, _KNOW = "failed", "know"
_ANSWER = 4.0
"""Seconds that the store may take to answer."""
_OF_OTHERS = re.compile(r"gloo|NCCL|nccl|[Cc]onnection (closed|reset|refused)|[Tt]imed? ?out")
# Where the main thread stands while it waits for the other processes.
_WAITING = re.compile(r"torch/(distributed|autograd|nn/parallel)/")
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


@contextmanager
def gathering(setting: str, seconds: float) -> Iterator[None]:
    """Around the start of the process group.

    Args:
        setting: that holds how long they wait for each other.
        seconds: its value.

    Raises:
        LostProcess: when not all processes come.
    """
    try:
        yield
    except dist.DistError as error:
        reason = f"not all processes have come within {setting} ({seconds:g} s)"
        raise LostProcess(f"{reason}: {str(error).splitlines()[0]}") from error


@contextmanager
def together(rank: int, world: int, seconds: float) -> Iterator[None]:
    """Work with the other processes of a run; when one is lost, all end.

    Args:
        rank: of this process.
        world: how many there are; 1 changes nothing.
        seconds: how long an operation of all processes waits, as the process group was told.

    Raises:
        LostProcess: when another process died, hangs or failed; names it.
    """
    if world == 1:
        yield
        return
    watch = _Watch(rank, world, seconds)
    watch.start()
    try:
        yield
    except Interrupted:  # by all, after the same step
        raise
    except BaseException as error:
        watch.ending.set()
        if not _of_others(error):
            watch.tell(f"rank {rank} {_line(error)}")
            watch.linger()
            raise
        reason = watch.explain(error)
        watch.linger()
        raise LostProcess(reason) from error
    finally:
        watch.stop()


def _of_others(error: BaseException) -> bool:
    """Whether it says that an operation of all processes failed."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _OF_OTHERS.search(str(error)) is not None


def _line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    return f"failed: {_text(error)}"


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if type(error).__module__.startswith("mim") else f"{type(error).__name__}: {text}"


class _Watch(threading.Thread):
    """Tells the store that this process lives, and ends it when another has failed.

    Attributes:
        ending: set when the main thread is on its way out by itself.
        told: why all end, once another has told.
    """

    told = ""

    def __init__(self, rank: int, world: int, seconds: float) -> None:
        super().__init__(name="mim-processes", daemon=True)
        self.rank, self.world, self.seconds = rank, world, seconds
        self.interval = min(2.0, seconds / 10)
        self.address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.ending, self._stopped = threading.Event(), threading.Event()
        self._main = threading.get_ident()
        self._count = 0
        self._knows = False
        store = dist.TCPStore(*self.address, is_master=False, timeout=timedelta(seconds=seconds))
        self._store = dist.PrefixStore(f"mim/{attempt}", store)
        self._beat()

    def _beat(self) -> None:
        self._count += 1
        waits, place = self._place()
        told = (str(self._count), socket.gethostname(), "waits" if waits else "works", place)
        self._store.set(str(self.rank), "\n".join(told))

    def _place(self) -> tuple[bool, str]:
        """Whether the main thread waits for others, and the line of mim or a plugin it is at."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return False, "its end"
        waits = _WAITING.search(Path(frame.f_code.co_filename).as_posix()) is not None
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        return waits, f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"

    def run(self) -> None:
        failed = False
        try:
            while not failed:
                if self._stopped.wait(self.interval):
                    return
                self._beat()
                failed = self._store.check([_FAILED])
            self.told = self._store.get(_FAILED).decode()
            self._know()
        except (dist.DistError, RuntimeError):
            self.told = self._no_store()
        # The main thread notices by itself, where it waits for the others.
        if self._stopped.wait(4 * self.interval) or self.ending.is_set():
            return
        self._end(f"{self.told}; rank {self.rank} was at {self._place()[1]}")

    def _end(self, reason: str) -> NoReturn:
        """End the process from beside its main thread, which hangs."""
        sys.stderr.write(f"mim: error: rank {self.rank}: {reason}\n")
        sys.stderr.flush()
        os._exit(LostProcess.code)

    def stop(self) -> None:
        self._stopped.set()
        self.join(self.interval)

    def tell(self, reason: str) -> str:
        """Let the others know why this process ends; returns the reason that was told first."""
        told = _within(_ANSWER, lambda: self._store.compare_set(_FAILED, "", reason))
        return reason if told is None else told.decode()

    def linger(self) -> None:
        """Let the others read why: the store ends with rank 0."""
        _within(3 * self.interval, self._until_all_know)

    def _know(self) -> int:
        """How many processes know that the run ends."""
        if not self._knows:
            self._knows = True
            return self._store.add(_KNOW, 1)
        return self._store.add(_KNOW, 0)

    def _until_all_know(self) -> bool:
        while self._know() < self.world and self.rank == 0:
            time.sleep(self.interval / 10)
        return True

    def _no_store(self) -> str:
        address = "{}:{}".format(*self.address)
        return f"nobody answers at {address}, where rank 0 runs: it, or its machine, is gone"

    def explain(self, error: BaseException) -> str:
        """Who is missing, in a line, after an operation of all processes has failed."""
        if self.told:
            return self.told
        limit = 3 * self.interval + _ANSWER
        found = _within(limit, self._look)
        if found is None:
            return self._no_store()
        told, before, after = found
        if told:
            return told
        others = [rank for rank in range(self.world) if rank != self.rank]
        silent = [rank for rank in others if after[rank] == before[rank]]
        lines = [f"rank {r} on {after[r][1]} no longer answers" for r in silent]
        if not silent:
            working = [rank for rank in others if after[rank][2] == "works"] or others
            lines = [f"rank {r} on {after[r][1]} hangs at {after[r][3]}" for r in working]
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        return self.tell("; ".join(lines[:4]) + f"{more} (after: {_text(error)[:200]})")

    def _look(self) -> tuple[str, list[list[str]], list[list[str]]]:
        """What another has told, if any has; and the beats, some time apart."""
        before = self._beats()
        for _ in range(3):
            time.sleep(self.interval)
            if self._store.check([_FAILED]):
                return self._store.get(_FAILED).decode(), before, before
        return "", before, self._beats()

    def _beats(self) -> list[list[str]]:
        """What each rank told last: a count, its host, whether it waits, and its place."""
        keys = [str(rank) for rank in range(self.world)]
        unknown = ["0", "?", "", "?"]
        return [
            self._store.get(key).decode().split("\n") if self._store.check([key]) else unknown
            for key in keys
        ]


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """The store's answer; None where it gives none, which torch does not bound in all cases."""
    answers: list[T] = []

    def run() -> None:
        with suppress(dist.DistError, RuntimeError):  # the store has gone
            answers.append(ask())

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None
