"""Where the runs of a comparison are computed: processes of this machine, or jobs of a cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mim.core.errors import UserError, choice_error, setting_error
from mim.core.signals import between_imports, hear, start_server

if TYPE_CHECKING:
    import submitit

    from mim.compare.plan import Planned

    Work = Callable[[Planned], int]

LAUNCHERS = ("local", "submitit")
# Imported once; the process of each run starts with them. The last two are what the probes and the
# small sets import when they are used.
SERVER_MODULES = [
    "mim.training.pretrain",
    "mim.evaluate",
    "sklearn.linear_model",
    "sklearn.datasets",
]


@dataclass(frozen=True)
class Launch:
    """Where and how the runs of a comparison are computed; it changes no number.

    Attributes:
        jobs: how many at once. Of several on one machine, speed and memory tell little.
        launcher: local, or submitit (SLURM; needs ``mim[slurm]``).
        slurm: submitit's parameters: timeout_min, slurm_partition, gpus_per_node, ...
    """

    jobs: int = 1
    launcher: str = "local"
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise setting_error("--jobs", self.jobs, "must be at least 1")
        if self.launcher not in LAUNCHERS:
            raise choice_error("--launcher", self.launcher, LAUNCHERS)
        if self.slurm and self.launcher != "submitit":
            raise setting_error("--slurm", self.slurm, "is for --launcher submitit")


class LocalJobs:
    """A process of this machine for each run; ``running`` are those that have not ended.

    Args:
        work: computes a run; returns its exit code.
        count: how many run at once; they share GPUs, or the cores.
    """

    def __init__(self, work: Work, count: int) -> None:
        self.work, self.count = work, count
        self.running: dict[Any, tuple[Any, Planned, int]] = {}
        self._context = server_context()

    def start(self, item: Planned) -> None:
        """Start a run."""
        place = min(set(range(self.count)) - {place for _, _, place in self.running.values()})
        arguments = (self.work, item, place, self.count)
        process = self._context.Process(target=_child, args=arguments)
        process.start()
        self.running[process.sentinel] = (process, item, place)

    def wait(self) -> list[tuple[Planned, int]]:
        """Those that have ended, one at least, each with its exit code."""
        ended = []
        for sentinel in multiprocessing.connection.wait(list(self.running)):
            process, item, _ = self.running.pop(sentinel)
            process.join()
            ended.append((item, int(process.exitcode)))
        return ended

    def stop(self) -> list[tuple[Planned, int | None]]:
        """Let all save, and wait for them; each with its exit code."""
        for process, _, _ in self.running.values():
            process.terminate()
        for process, _, _ in self.running.values():
            process.join()
        return [(item, int(process.exitcode)) for process, item, _ in self.running.values()]


def _child(work: Work, item: Planned, place: int, count: int) -> None:
    """One run in a process of its own: its memory is its own, and its failure too."""
    _take_share(place, count)
    # A fork server's children inherit its start method; loader workers started by it would not
    # notice when the run is killed.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with between_imports():
            hear()
            code = work(item)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _end_with_parent() -> None:
    """Save and stop when the comparison was killed: a second call shall find the folder free."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _take_share(place: int, count: int) -> None:
    """Of ``count`` runs at once, this one takes its GPU in turn, and its part of the cores."""
    if count == 1:
        return
    # What the launcher of this comparison was given, not what the machine has.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))


def server_context() -> Any:
    """Processes that start with the libraries loaded and no threads running, where possible."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    start_server()
    return context


_SECONDS = 1.0
_LEAVE = 60.0
"""Seconds that stopped jobs have to save and leave. SLURM's own limit is KillWait."""
_CANCEL = 10.0
"""Seconds more, once they are killed."""
FOLDER = "submitit"
"""In the comparison's folder: the jobs' inputs and logs."""


class Job:
    """One run as a job; after a pre-emption it is called again and resumes from its checkpoint.

    Args:
        work: computes a run; returns its exit code.
        item: the run.
    """

    def __init__(self, work: Work, item: Planned) -> None:
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


class SubmittedJobs:
    """A job of the cluster for each run; this process waits for those in ``running``.

    Args:
        work: computes a run; returns its exit code.
        output: the comparison's folder.
        parameters: of submitit's AutoExecutor; ``cluster`` names another one than SLURM.

    Raises:
        UserError: if submitit is not there, or refuses a parameter.
    """

    def __init__(self, work: Work, output: Path, parameters: dict[str, Any]) -> None:
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
        self.running: dict[str, tuple[submitit.Job[int], Planned]] = {}

    def start(self, item: Planned) -> None:
        """Submit a run."""
        job = self._executor.submit(Job(self.work, item))
        self.running[job.job_id] = (job, item)

    def wait(self) -> list[tuple[Planned, int]]:
        """Those that have ended, one at least, each with its exit code."""
        while True:
            ended = [name for name, (job, _) in self.running.items() if job.done()]
            if ended:
                return [self._code(*self.running.pop(name)) for name in ended]
            time.sleep(_SECONDS)

    def _code(self, job: submitit.Job[int], item: Planned) -> tuple[Planned, int]:
        error = job.exception()  # of the cluster: the run notes its own
        return item, -1 if error is not None else job.result()

    def stop(self) -> list[tuple[Planned, int | None]]:
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

    def _left(self, seconds: float) -> list[tuple[Planned, int | None]]:
        """Those that have ended by then, each with its exit code."""
        ended: list[tuple[Planned, int | None]] = []
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            for name, (job, _) in list(self.running.items()):
                if job.done(force_check=True):
                    ended.append(self._code(*self.running.pop(name)))
            if self.running:
                time.sleep(_SECONDS)
        return ended
