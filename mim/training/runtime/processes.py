"""Processes of one run: none waits for another for ever, and a missing one is named.

torch ends a collective operation after a time-out, but does not say which process is missing, and
a process that hangs elsewhere never learns of it. So a thread of each process writes into the
store of torch's rendezvous that it is alive and where its main thread is, and reads there whether
another process has failed.
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
from typing import TypeVar

import torch.distributed as dist

from mim.core.errors import LostProcess
from mim.core.signals import Interrupted

T = TypeVar("T")
_FAILED, _KNOW = "failed", "know"
_ANSWER = 4.0
"""Seconds that the store may take to answer."""
_COLLECTIVE = re.compile(r"gloo|NCCL|nccl|[Cc]onnection (closed|reset|refused)|[Tt]imed? ?out")
# Where the main thread stands while it waits for the other processes.
_WAITING = re.compile(r"torch/(distributed|autograd|nn/parallel)/")
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


@contextmanager
def gathering(setting: str, seconds: float) -> Iterator[None]:
    """Wraps the start of the process group; ``setting`` has ``seconds`` as its time-out.

    Raises:
        LostProcess: if not all processes arrive in time.
    """
    try:
        yield
    except dist.DistError as error:
        reason = f"not all processes have come within {setting} ({seconds:g} s)"
        raise LostProcess(f"{reason}: {str(error).splitlines()[0]}") from error


@contextmanager
def together(rank: int, world: int, seconds: float) -> Iterator[None]:
    """Works with the other processes of a run; when one is lost, all end.

    Args:
        rank: of this process.
        world: number of processes; 1 changes nothing.
        seconds: the time-out of the process group.

    Raises:
        LostProcess: naming another process that died, hangs or failed.
    """
    if world == 1:
        yield
        return
    watch = _Watch(rank, world, seconds)
    watch.start()
    try:
        yield
    except Interrupted:  # all processes end after the same step
        raise
    except BaseException as error:
        watch.ending.set()
        if not _is_collective(error):
            interrupted = isinstance(error, KeyboardInterrupt)
            how = "was interrupted" if interrupted else f"failed: {_text(error)}"
            watch.tell(f"rank {rank} {how}")
            watch.linger()
            raise
        reason = watch.explain(error)
        watch.linger()
        raise LostProcess(reason) from error
    finally:
        watch.stop()


def _is_collective(error: BaseException) -> bool:
    """Tells whether an operation of all processes failed."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _COLLECTIVE.search(str(error)) is not None


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if type(error).__module__.startswith("mim") else f"{type(error).__name__}: {text}"


class _Watch(threading.Thread):
    """Tells the store that this process is alive, and ends it when another has failed.

    Attributes:
        ending: set when the main thread is already ending.
        reason: why all processes end, once another has said so.
    """

    reason = ""

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
        beat = (str(self._count), socket.gethostname(), "waits" if waits else "works", place)
        self._store.set(str(self.rank), "\n".join(beat))

    def _place(self) -> tuple[bool, str]:
        """Returns whether the main thread waits for others, and its line in mim or a plug-in."""
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
            self.reason = self._store.get(_FAILED).decode()
            self._know()
        except (dist.DistError, RuntimeError):
            self.reason = self._no_store()
        # If the main thread waits for the others, it notices by itself.
        if self._stopped.wait(4 * self.interval) or self.ending.is_set():
            return
        # It hangs elsewhere.
        where = f"rank {self.rank} was at {self._place()[1]}"
        sys.stderr.write(f"mim: error: rank {self.rank}: {self.reason}; {where}\n")
        sys.stderr.flush()
        os._exit(LostProcess.code)

    def stop(self) -> None:
        self._stopped.set()
        self.join(self.interval)

    def tell(self, reason: str) -> str:
        """Tells the others why this process ends; returns the reason that was told first."""
        first = _within(_ANSWER, lambda: self._store.compare_set(_FAILED, "", reason))
        return reason if first is None else first.decode()

    def linger(self) -> None:
        """Gives the others time to read the reason: the store ends with rank 0."""
        _within(3 * self.interval, self._until_all_know)

    def _know(self) -> int:
        """Returns how many processes know that the run ends, this one included."""
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
        """Names the missing process after an operation of all processes has failed."""
        if self.reason:
            return self.reason
        found = _within(3 * self.interval + _ANSWER, self._look)
        if found is None:
            return self._no_store()
        reason, before, after = found
        if reason:
            return reason
        others = [rank for rank in range(self.world) if rank != self.rank]
        silent = [rank for rank in others if after[rank] == before[rank]]
        lines = [f"rank {r} on {after[r][1]} no longer answers" for r in silent]
        if not silent:
            working = [rank for rank in others if after[rank][2] == "works"] or others
            lines = [f"rank {r} on {after[r][1]} hangs at {after[r][3]}" for r in working]
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        return self.tell("; ".join(lines[:4]) + f"{more} (after: {_text(error)[:200]})")

    def _look(self) -> tuple[str, list[list[str]], list[list[str]]]:
        """Returns the reason that another process gave, if any, and beats some time apart."""
        before = self._beats()
        for _ in range(3):
            time.sleep(self.interval)
            if self._store.check([_FAILED]):
                return self._store.get(_FAILED).decode(), before, before
        return "", before, self._beats()

    def _beats(self) -> list[list[str]]:
        """Returns the last beat of each rank: count, host, whether it waits, and place."""
        keys = [str(rank) for rank in range(self.world)]
        unknown = ["0", "?", "", "?"]
        return [
            self._store.get(key).decode().split("\n") if self._store.check([key]) else unknown
            for key in keys
        ]


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """Asks the store, with a time-out that torch does not always keep; None is no answer."""
    answers: list[T] = []

    def run() -> None:
        with suppress(dist.DistError, RuntimeError):  # the store has gone
            answers.append(ask())

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None
