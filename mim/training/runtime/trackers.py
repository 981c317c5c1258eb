"""TensorBoard and wandb, through Accelerate's trackers; wandb is imported only where asked for.

Names are an interface, see docs/howto/trackers.md.
"""

from __future__ import annotations

import atexit
import copy
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from mim.core.background_writer import BackgroundWriter
from mim.core.config import Config
from mim.core.errors import UserError, setting_error
from mim.core.progress import note
from mim.core.settings import flatten, to_dict

_MOST_WAITING = 1000
"""Calls that a tracker may be behind."""


def tracker_names(config: Config) -> list[str]:
    """The trackers that a config asks for."""
    names = ["tensorboard"] if config.log.tensorboard else []
    return [*names, "wandb"] if config.log.wandb != "disabled" else names


def _tags(config: Config) -> list[str]:
    """What runs are filtered by; wandb takes up to 64 characters each."""
    model = config.model
    tags = (
        f"regime:{model.regime.name}",
        f"mask:{config.mask.name}",
        f"ratio:{config.mask.ratio}",
        f"target:{model.target.name}",
        f"decoder:{model.decoder.name}",
        f"backbone:{model.backbone}",
        f"data:{config.data.source}",
        f"seed:{config.seed}",
    )
    return [tag[:64] for tag in tags]


@contextmanager
def _one_line(config: Config) -> Iterator[None]:
    """What wandb refuses (no key, no network) as a mistake in the settings."""
    if config.log.wandb == "disabled":
        yield
        return
    from wandb.errors import Error

    try:
        yield
    except Error as error:
        reason = f"cannot start: {' '.join(str(error).split())} (or set log.wandb to offline)"
        raise setting_error("log.wandb", config.log.wandb, reason) from error


class Trackers:
    """The trackers of a run, none of which can stop it or keep it waiting.

    Each is called by a thread of its own, in order. One that fails (its server, its disk, its
    process), or is busy with one call for too long, is told in a line and left out from then on:
    ``metrics.jsonl`` has everything. Leaving waits for them, so long at most.

    Args:
        trackers: of Accelerate.
        seconds: how long one may take for a call, and for all that is left at the end.
    """

    def __init__(self, trackers: Sequence[GeneralTracker], seconds: float) -> None:
        self._trackers = [
            (tracker, BackgroundWriter(f"mim-{tracker.name}")) for tracker in trackers
        ]
        self._seconds = seconds

    def __enter__(self) -> Trackers:
        self._hook = threading.excepthook
        threading.excepthook = self._in_thread
        return self

    def __exit__(self, *details: object) -> None:
        try:
            self._each(lambda tracker: tracker.finish())
            end = time.monotonic() + self._seconds
            for tracker, calls in list(self._trackers):
                done = calls.wait(max(0.0, end - time.monotonic()))
                calls.end()
                if error := calls.error or (
                    None if done else _no_answer(tracker.name, self._seconds)
                ):
                    _tell(tracker.name, error)
        finally:
            self._trackers.clear()
            threading.excepthook = self._hook

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own, and raises the same in the next call here.
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)

    def _each(self, act: Callable[[GeneralTracker], None]) -> None:
        for pair in list(self._trackers):
            tracker, calls = pair
            error = calls.error
            if calls.busy > self._seconds:
                error = _no_answer(tracker.name, self._seconds)
            elif calls.behind >= _MOST_WAITING:
                error = TimeoutError(f"it is {calls.behind} calls behind")
            if error is None:
                calls.ask(partial(act, tracker))
                continue
            self._trackers.remove(pair)
            calls.end()
            _tell(tracker.name, error)

    def log(self, values: dict[str, float], step: int) -> None:
        """Give numbers."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def picture(self, path: Path, step: int) -> None:
        """Show a picture as ``reconstructions``."""
        self._each(lambda tracker: track_picture([tracker], path, step))


def _no_answer(name: str, seconds: float) -> TimeoutError:
    """The error for a tracker that hangs; the end of the process does not wait for it either."""
    if name == "wandb":
        atexit.register(_leave_wandb)
    return TimeoutError(f"no answer for {seconds:g} s, see log.timeout")


def _within(seconds: float, name: str, act: Callable[[], object]) -> None:
    """Do something with a tracker.

    Raises:
        TimeoutError: where that takes longer; what it itself raises.
    """
    calls = BackgroundWriter(f"mim-{name}")
    calls.ask(act)
    done = calls.wait(seconds)
    calls.end()
    if error := calls.error or (None if done else _no_answer(name, seconds)):
        raise error


def _tell(
    name: str,
    error: BaseException,
    loses: str = "gets nothing more of this run",
    then: str = "; training goes on",
) -> None:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    cause = " ".join(reason.split())[:200] or type(error).__name__
    note(f"log: {name} has failed and {loses} ({cause}){then}")


def _leave_wandb() -> None:
    """Before wandb waits for its service, at the end of Python, for ever."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith("wandb-core"):
                child.kill()
    hook = sys.unraisablehook

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        trace = args.exc_traceback
        if trace is None or not trace.tb_frame.f_globals["__name__"].startswith("wandb."):
            hook(args)

    sys.unraisablehook = unraisable


def start_trackers(accelerator: Accelerator, config: Config, step: int) -> Trackers:
    """Open the trackers of a run: its config, its name, group and tags.

    Args:
        accelerator: of the run.
        config: of the run.
        step: where it goes on; then a tracker that cannot start is left out, as one that fails
            later.

    Raises:
        UserError: if a run that begins cannot reach wandb, has no key for it, or cannot write
            TensorBoard's files.
    """
    seconds = config.log.timeout
    if not accelerator.log_with:
        return Trackers([], seconds)
    wandb = {
        "mode": config.log.wandb,
        "dir": config.output,
        "name": Path(config.output).name,
        "group": f"{config.model.regime.name}-{config.mask.name}",
        "job_type": "pretrain",
        "tags": _tags(config),
    }
    scalars = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in flatten(to_dict(config)).items()
    }
    options = {"wandb": wandb, "tensorboard": {"purge_step": step + 1}}
    started = []
    for name in accelerator.log_with:  # one by one, so that each can fail alone
        called = str(getattr(name, "value", name))
        # One that comes too late comes to a copy: none is closed by Accelerate.
        its = copy.copy(accelerator)
        its.log_with, its.trackers = [name], []
        start = partial(its.init_trackers, config.log.project, config=scalars, init_kwargs=options)
        try:
            with _one_line(config):
                if sys.stdin is not None and sys.stdin.isatty():
                    start()  # wandb may ask for a key
                else:
                    _within(seconds, called, start)
        except (UserError, OSError) as error:
            if step == 0 and isinstance(error, TimeoutError):
                reason = f"does not start: {error}"
                raise setting_error(f"log.{called}", getattr(config.log, called), reason) from error
            if step == 0 and isinstance(error, OSError):
                reason = f"cannot write in {config.output!r}: {error.strerror or error}"
                raise UserError(f"log.{called}: {reason}") from error
            if step == 0:
                raise
            _tell(called, error)
        else:
            started += its.trackers
    return Trackers(started, seconds)


def track_picture(trackers: Sequence[GeneralTracker], path: Path, step: int) -> None:
    """Show a picture as ``reconstructions``."""
    for tracker in trackers:
        with Image.open(path, formats=["PNG"]) as image:
            if tracker.name == "tensorboard":
                pixels = np.asarray(image)
                tracker.writer.add_image("reconstructions", pixels, step, dataformats="HWC")
            elif tracker.name == "wandb":
                tracker.log_images({"reconstructions": [image]}, step=step)


def track_report(
    config: Config,
    name: str,
    folder: Path,
    files: Sequence[Path],
    table: tuple[list[str], list[list[str]]],
    text: str,
) -> None:
    """Give a comparison's report to the trackers: a table, and the files as an artifact.

    One that fails, or takes longer than ``log.timeout``, is told in a line.

    Args:
        config: the base config; its ``log`` says where to.
        name: of the comparison.
        folder: of the comparison.
        files: of the report.
        table: (heads, rows), logged as ``results``.
        text: Markdown, shown as ``report`` where a tracker shows text.
    """
    names = tracker_names(config)
    if not names:
        return
    PartialState(cpu=True)  # the trackers ask it who is the main process; no GPU is touched

    def to_tensorboard() -> None:
        board = TensorBoardTracker("report", folder / "logs")
        board.start()
        board.writer.add_text("report", text)
        board.finish()

    def to_wandb() -> None:
        import wandb

        tracker = WandBTracker(
            config.log.project,
            mode=config.log.wandb,
            dir=str(folder),
            name=f"{folder.name} report",
            group=folder.name,
            job_type="report",
            tags=["report"],
        )
        tracker.start()
        heads, rows = table
        tracker.log_table("results", columns=heads, data=rows)
        safe = re.sub(r"[^\w.-]+", "-", name)[:100] or "comparison"
        artifact = wandb.Artifact(f"report-{safe}", type="report")
        for path in files:
            artifact.add_file(str(path))
        tracker.run.log_artifact(artifact)
        tracker.finish()

    give = {"tensorboard": to_tensorboard, "wandb": to_wandb}
    for called in names:
        try:
            _within(config.log.timeout, called, give[called])
        except (Exception, SystemExit) as error:  # theirs are of any kind
            _tell(called, error, "does not get the report", "")
