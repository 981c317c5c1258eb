"""TensorBoard and wandb, through Accelerate's trackers; wandb is imported only where asked for.

Names are an interface, see docs/howto/trackers.md.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from mim.config import Config
from mim.errors import UserError, setting_error
from mim.progress import note
from mim.settings import flatten, to_dict


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
    """The trackers of a run, none of which can stop it.

    One that fails (its server, its disk, its process) is told in a line, and left out from then on:
    ``metrics.jsonl`` has everything.

    Args:
        trackers: of Accelerate.
    """

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._trackers = list(trackers)

    def __enter__(self) -> Trackers:
        self._hook = threading.excepthook
        threading.excepthook = self._in_thread
        return self

    def __exit__(self, *details: object) -> None:
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()
        threading.excepthook = self._hook

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread of its own, and raises the same in the next call here.
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)

    def _each(self, act: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # theirs are of any kind
                self._trackers.remove(tracker)
                _tell(tracker.name, error)

    def log(self, values: dict[str, float], step: int) -> None:
        """Give numbers."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def picture(self, path: Path, step: int) -> None:
        """Show a picture as ``reconstructions``."""
        self._each(lambda tracker: track_picture([tracker], path, step))


def _tell(name: str, error: Exception) -> None:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    cause = " ".join(reason.split())[:200] or type(error).__name__
    note(f"log: {name} has failed and gets nothing more of this run ({cause}); training goes on")


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
    if not accelerator.log_with:
        return Trackers([])
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
    names, started = list(accelerator.log_with), []
    for name in names:  # one by one, so that each can fail alone
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            with _one_line(config):
                accelerator.init_trackers(config.log.project, config=scalars, init_kwargs=options)
        except (UserError, OSError) as error:
            called = str(getattr(name, "value", name))
            if step == 0 and isinstance(error, OSError):
                reason = f"cannot write in {config.output!r}: {error.strerror or error}"
                raise UserError(f"log.{called}: {reason}") from error
            if step == 0:
                raise
            _tell(called, error)
        else:
            started += accelerator.trackers
    accelerator.log_with = names
    accelerator.trackers = []  # they are closed here, not by Accelerate
    return Trackers(started)


def track_picture(trackers: Sequence[GeneralTracker], path: Path, step: int) -> None:
    """Show a picture as ``reconstructions``."""
    for tracker in trackers:
        with Image.open(path) as image:
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

    Args:
        config: the base config; its ``log`` says where to.
        name: of the comparison.
        folder: of the comparison.
        files: of the report.
        table: (heads, rows), logged as ``results``.
        text: Markdown, shown as ``report`` where a tracker shows text.

    Raises:
        UserError: as :func:`start_trackers`.
    """
    if not tracker_names(config):
        return
    PartialState(cpu=True)  # the trackers ask it who is the main process; no GPU is touched
    heads, rows = table
    if config.log.tensorboard:
        board = TensorBoardTracker("report", folder / "logs")
        board.start()
        board.writer.add_text("report", text)
        board.finish()
    if config.log.wandb != "disabled":
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
        with _one_line(config):
            tracker.start()
        tracker.log_table("results", columns=heads, data=rows)
        safe = re.sub(r"[^\w.-]+", "-", name)[:100] or "comparison"
        artifact = wandb.Artifact(f"report-{safe}", type="report")
        for path in files:
            artifact.add_file(str(path))
        tracker.run.log_artifact(artifact)
        tracker.finish()
