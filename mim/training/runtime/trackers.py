"""TensorBoard and wandb, through Accelerate's trackers; wandb is imported only if configured.

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
"""Number of waiting calls at which a tracker is dropped."""


def tracker_names(config: Config) -> list[str]:
    """Lists the trackers that a config enables."""
    names = ["tensorboard"] if config.log.tensorboard else []
    return [*names, "wandb"] if config.log.wandb != "disabled" else names


def _tags(config: Config) -> list[str]:
    """Lists the tags that runs are filtered by; wandb allows 64 characters each."""
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
def _wandb_errors(config: Config) -> Iterator[None]:
    """Turns what wandb refuses (no key, no network) into a UserError."""
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
    """The trackers of a run, none of which can stop it or make it wait.

    A thread calls each of them, in order. A tracker that fails, or that takes too long for a
    call, is dropped with a note: ``metrics.jsonl`` has everything.

    Args:
        trackers: of Accelerate.
        seconds: how long one may take for a call, and for all remaining calls at the end.
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
                if error := _error(tracker.name, calls, done, self._seconds):
                    _note_failure(tracker.name, error)
        finally:
            self._trackers.clear()
            threading.excepthook = self._hook

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own and raises the same error in the next call.
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
            _note_failure(tracker.name, error)

    def log(self, values: dict[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step=step))

    def picture(self, path: Path, step: int) -> None:
        """Shows a picture as ``reconstructions``."""
        self._each(lambda tracker: track_picture([tracker], path, step))


def _no_answer(name: str, seconds: float) -> TimeoutError:
    """Builds the error for a tracker that hangs, and keeps it from delaying Python's exit."""
    if name == "wandb":
        atexit.register(_leave_wandb)
    return TimeoutError(f"no answer for {seconds:g} s, see log.timeout")


def _error(name: str, calls: BackgroundWriter, done: bool, seconds: float) -> BaseException | None:
    return calls.error or (None if done else _no_answer(name, seconds))


def _within(seconds: float, name: str, act: Callable[[], object]) -> None:
    """Calls a tracker; raises what it raises, or TimeoutError if it takes longer."""
    calls = BackgroundWriter(f"mim-{name}")
    calls.ask(act)
    done = calls.wait(seconds)
    calls.end()
    if error := _error(name, calls, done, seconds):
        raise error


def _note_failure(
    name: str,
    error: BaseException,
    loses: str = "gets nothing more of this run",
    then: str = "; training continues",
) -> None:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    cause = " ".join(reason.split())[:200] or type(error).__name__
    note(f"log: {name} has failed and {loses} ({cause}){then}")


def _leave_wandb() -> None:
    """Ends wandb's service, for which wandb would wait for ever when Python exits."""
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
    """Opens the trackers of a run and gives them its config, name, group and tags.

    A tracker that cannot start is left out when a run resumes.

    Raises:
        UserError: if a new run cannot reach wandb, has no key for it, or cannot write
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
        # Into a copy, so that Accelerate closes none, not even one that starts too late.
        own = copy.copy(accelerator)
        own.log_with, own.trackers = [name], []
        start = partial(own.init_trackers, config.log.project, config=scalars, init_kwargs=options)
        try:
            with _wandb_errors(config):
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
            _note_failure(called, error)
        else:
            started += own.trackers
    return Trackers(started, seconds)


def track_picture(trackers: Sequence[GeneralTracker], path: Path, step: int) -> None:
    """Shows a picture as ``reconstructions``."""
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
    """Gives a comparison's report to the trackers; notes those that fail or take too long.

    Args:
        config: the base config; its ``log`` names the trackers.
        name: of the comparison.
        folder: of the comparison.
        files: of the report, given as an artifact.
        table: (heads, rows), logged as ``results``.
        text: Markdown, shown as ``report`` where a tracker shows text.
    """
    names = tracker_names(config)
    if not names:
        return
    PartialState(cpu=True)  # which the trackers need; touches no GPU

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
            _note_failure(called, error, "does not get the report", "")
