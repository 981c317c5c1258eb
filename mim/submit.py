"""The runs of a comparison as jobs of a cluster (submitit)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mim.errors import UserError

if TYPE_CHECKING:
    import submitit

T = TypeVar("T")
_SECONDS = 1.0
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
            reason = "needs submitit: pip install 'mim[slurm]'"
            raise UserError(f"--launcher: 'submitit' {reason}") from error
        given = dict(parameters)
        try:
            cluster = given.pop("cluster", "slurm")
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

    def stop(self) -> None:
        """Cancel all jobs; what they saved stays."""
        for job, _ in self.running.values():
            job.cancel()
