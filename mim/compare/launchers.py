"""The runs of a comparison as jobs of a cluster (submitit)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mim.core.errors import UserError

if TYPE_CHECKING:
    import submitit

T = TypeVar("T")
_SECONDS = 1.0
_LEAVE = 60.0
"""Seconds that jobs which are stopped have to save and leave. SLURM's own limit is KillWait."""
_CANCEL = 10.0
"""Seconds more, once they are killed."""
FOLDER = "submitit"
"""In the comparison's folder: what jobs were told and wrote."""


class Job(Generic[T]):
    """One run as a job; called again after a pre-emption it goes on from its checkpoint.

    Args:
        work: computes a run; returns its exit code.
        item: the run.
    """

    def __init__(self, work: Callable[[T], int], item: T) -> None:
        self.work, self.item = work, item

    def __call__(self) -> int:
        """Computes it."""
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            # submitit ignores SIGTERM, which SLURM sends before a pre-emption. Here it is a stop;
            # what trains saves first.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self.work(self.item)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit puts into the queue when SLURM takes the machine away."""
        import submitit

        return submitit.helpers.DelayedSubmission(Job(self.work, self.item))


class SubmittedJobs(Generic[T]):
    """A job of the cluster for each run; this process waits for them.

    Args:
        work: computes a run; returns its exit code.
        output: the comparison's folder.
        parameters: of submitit's AutoExecutor; ``cluster`` names another one than SLURM.

    Raises:
        UserError: if submitit is not there, or refuses a parameter.
    """

    def __init__(self, work: Callable[[T], int], output: Path, parameters: dict[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            reason = "needs submitit: pip install -e '.[slurm]'"
            raise UserError(f"--launcher: 'submitit' {reason}") from error
        given = dict(parameters)
        cluster = given.pop("cluster", "slurm")
        self._local = cluster == "local"
        try:
            self._executor = submitit.AutoExecutor(output / FOLDER, cluster=cluster)
            self._executor.update_parameters(name=output.name, **given)
        except (RuntimeError, NameError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--launcher: submitit refuses {parameters}: {reason}") from error
        self.work = work
        self.running: dict[str, tuple[submitit.Job[int], T]] = {}

    def start(self, item: T) -> None:
        """Submit a run."""
        job = self._executor.submit(Job(self.work, item))
        self.running[job.job_id] = (job, item)

    def wait(self) -> list[tuple[T, int]]:
        """Those that have ended, one at least, each with its exit code."""
        while True:
            ended = [name for name, (job, _) in self.running.items() if job.done()]
            if ended:
                return [self._code(*self.running.pop(name)) for name in ended]
            time.sleep(_SECONDS)

    def _code(self, job: submitit.Job[int], item: T) -> tuple[T, int]:
        error = job.exception()  # of the cluster: the run notes its own
        return item, 1 if error is not None else job.result()

    def stop(self) -> list[tuple[T, int | None]]:
        """Let all jobs save and leave, for a bounded time.

        Returns:
            Each run and the exit code of its job; None where it does not leave.
        """
        for job, _ in self.running.values():
            self._ask(job)
        ended = self._left(_LEAVE)
        if self.running:
            for job, _ in self.running.values():
                job.cancel()
            ended += self._left(_CANCEL)
        return [*ended, *((item, None) for _, item in self.running.values())]

    def _ask(self, job: submitit.Job[int]) -> None:
        """Send SIGTERM; a job that still waits in the queue leaves it."""
        if self._local:
            # Its cancel() kills after a second; a local job's number is that of its process.
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)
        else:
            job.cancel()

    def _left(self, seconds: float) -> list[tuple[T, int | None]]:
        """Those that have ended by then, each with its exit code."""
        ended: list[tuple[T, int | None]] = []
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            for name, (job, _) in list(self.running.items()):
                if job.done(force_check=True):
                    ended.append(self._code(*self.running.pop(name)))
            if self.running:
                time.sleep(_SECONDS)
        return ended
