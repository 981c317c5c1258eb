"""Steps whose loss or gradient is not finite, and losses that leap.

A step that is not finite never reaches the weights: the fused AdamW is told on the device that
there is an infinity, as a gradient scaler tells it, so that nothing waits for the device. What
happens then (stop, or go on) is decided where the losses are read anyway.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mim.core.files import write_atomic, write_json_atomic
from mim.core.progress import note
from mim.core.rng import image_keys
from mim.training import checkpoint
from mim.training.runtime.sharding import gather_full

RECORD = "nonfinite.json"
"""In the run folder: the newest step that was not finite."""
WEIGHTS = "nonfinite.pt"
"""In the run folder: the weights before that step, where they were still there when it was seen."""
WINDOW = 100
"""A spike is measured against so many losses before it."""
LEAST = 30
"""With fewer losses nothing is called a spike."""
_LOWERED = 0.5  # fp16: the gradient overflowed, and a lower scale may mend it


def strict(loss: Tensor) -> Tensor:
    """1, or NaN where the loss is not finite: a factor that makes its gradient say so too.

    An infinite loss can have a finite gradient. By the gradients, which the processes average
    anyway, all of them see what one has met.
    """
    return 1 + 0 * loss.detach()


def not_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """() float, 1 where a gradient has a value that is not finite, else 0.

    It is the operation by which torch's gradient scaler looks: one pass, and FSDP's shards agree.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    found = torch.zeros((), device=grads[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(found))
    return found


class Guard:
    """Takes optimizer steps; one whose gradient is not finite changes nothing.

    From the ``limit``-th such step in a row on nothing changes any more, so that the weights with
    which it happened are still there when the host hears of it.

    Args:
        limit: steps in a row that end the training; 1 where the first one does, 0 guards nothing.
        in_a_row: such steps just before.
        device: of the weights.
    """

    def __init__(self, limit: int, in_a_row: int, device: torch.device) -> None:
        self.limit = limit
        self.in_a_row = torch.full((), float(in_a_row), device=device)

    def step(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Takes a step where the gradient is finite.

        Args:
            optimizer: fused, unless there is a scaler or nothing is guarded.
            scaler: of the gradients in fp16.

        Returns:
            () float, 0: taken; 1: not finite; between: the gradient overflowed in fp16, and the
            scale was lowered. Then, and only then, a step that is not taken is none of the
            ``limit``.
        """
        flag = torch.zeros_like(self.in_a_row)
        if self.limit:
            flag = not_finite(p for group in optimizer.param_groups for p in group["params"])
        if scaler is not None:  # it does the same, by the same gradients
            can_fall = scaler.scale(torch.ones_like(flag)) > 1
            scaler.step(optimizer)
            scaler.update()
            return torch.where(can_fall, flag * _LOWERED, flag)
        if not self.limit:
            optimizer.step()
            return flag
        flag = torch.maximum(flag, (self.in_a_row >= self.limit).float())
        self.in_a_row = (self.in_a_row + 1) * flag
        guarded: Any = optimizer
        guarded.found_inf = flag
        try:
            optimizer.step()
        finally:
            del guarded.found_inf
        return flag


class Spikes:
    """Which losses leap: ``deviations`` robust standard deviations above the running median.

    The median and the deviation (1.4826 times the median distance from it) are those of the last
    ``WINDOW`` finite losses, of ``LEAST`` at the least.

    Args:
        deviations: see ``train.spike_deviations``; 0 finds none.
        before: losses so far, of a run that goes on.
    """

    def __init__(self, deviations: float, before: Sequence[float] = ()) -> None:
        self.deviations = deviations
        self.window: deque[float] = deque(before, WINDOW)

    def look(self, loss: float) -> str | None:
        """How far a loss leaps, in words, or None; it then counts among the last ones."""
        found = None
        if self.deviations and len(self.window) >= LEAST:
            middle = statistics.median(self.window)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in self.window)
            if loss > middle + self.deviations * spread and spread > 0:
                far = (loss - middle) / spread
                found = (
                    f"loss {loss:.4g} is {far:.0f} robust deviations above {middle:.4g}, the "
                    f"median of the last {len(self.window)} steps"
                )
        self.window.append(loss)
        return found


@dataclass(frozen=True)
class StepRecord:
    """One step of this process, until its loss is read.

    Attributes:
        step: counted from 0.
        epoch: see :class:`mim.data.Batch`.
        lr: the learning rate.
        sample_ids: (B,) of this process's share of the batch.
        names: of what was reported.
    """

    step: int
    epoch: int
    lr: float
    sample_ids: Tensor
    names: tuple[str, ...] = ("loss",)


class Watch:
    """Reads the losses of steps that were taken, or not taken, and says what is wrong.

    Args:
        model: whose weights are kept for a look later.
        accelerator: of the training.
        limit: as the guard's.
        spike_deviations: see :class:`Spikes`.
        diverged: builds the error that ends the training, from the step, what was wrong, and how
            many such steps there were in a row.
        folder: where a step that is not finite is written down; None writes nothing.
        seed: from which the keys of its images follow.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        limit: int,
        diverged: Callable[[StepRecord, str, int], Exception],
        spike_deviations: float = 0.0,
        folder: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.accelerator, self.limit = model, accelerator, limit
        self.diverged, self.folder, self.seed = diverged, folder, seed
        self.in_a_row, self.total = 0, 0
        self._skipped, self._spikes, self._leaping = 0, 0, False
        self.spikes = Spikes(spike_deviations)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {
            "in_a_row": self.in_a_row,
            "total": self.total,
            "skipped": self._skipped,
            "spikes": self._spikes,
            "leaping": self._leaping,
            "losses": list(self.spikes.window),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`; an early version kept nothing."""
        self.in_a_row, self.total = state.get("in_a_row", 0), state.get("total", 0)
        self._skipped, self._spikes = state.get("skipped", 0), state.get("spikes", 0)
        self._leaping = state.get("leaping", False)
        self.spikes = Spikes(self.spikes.deviations, state.get("losses", ()))

    def counts(self) -> dict[str, float]:
        """For a line of metrics: ``skipped`` and ``spikes`` since the last, where there are any."""
        found = {"skipped": self._skipped, "spikes": self._spikes}
        self._skipped = self._spikes = 0
        return {name: count for name, count in found.items() if count}

    def look(self, steps: Sequence[StepRecord], read: Sequence[tuple[float, float]]) -> None:
        """Judges steps in their order; all processes call it with the same losses.

        Args:
            steps: those that were not judged yet.
            read: for each its loss over all processes, and what :meth:`Guard.step` returned.

        Raises:
            Exception: what ``diverged`` builds, at the last step of a row that is too long.
        """
        if not self.limit:
            return
        started = None  # where the row that is still going on began, if among these
        newest = None
        for place, (taken, (loss, flag)) in enumerate(zip(steps, read, strict=True)):
            self._skipped += flag > 0
            self.total += flag > 0
            if flag < 1 and math.isfinite(loss):
                if flag == 0:
                    self.in_a_row = 0
                    self._note_spike(taken.step, loss)
                continue
            self.in_a_row += 1
            if self.in_a_row == 1:
                started = place
            newest = place
            if self.in_a_row >= self.limit:
                self._record(taken, loss, started is not None, True)
                raise self.diverged(taken, _what(loss), self.limit)
            if self.accelerator.is_main_process:
                named = f"; {RECORD} names the images" if self.folder is not None else ""
                note(
                    f"step {taken.step + 1}: {_what(loss)}; the step is skipped "
                    f"({self.in_a_row} in a row, {self.limit} stop the run{named})"
                )
        if newest is not None:
            going_on = self.in_a_row > 0 and all(flag > 0 for _, flag in read[newest:])
            self._record(steps[newest], read[newest][0], started is not None, going_on)

    def _note_spike(self, step: int, loss: float) -> None:
        leap = self.spikes.look(loss)
        self._spikes += leap is not None
        if leap is not None and not self._leaping and self.accelerator.is_main_process:
            note(f"step {step + 1}: {leap}")
        self._leaping = leap is not None

    def _record(self, taken: StepRecord, loss: float, began: bool, untouched: bool) -> None:
        """Write down a step for a look later; all processes take part.

        Args:
            taken: the step.
            loss: of all processes.
            began: whether the row of such steps began since the last look: else the weights of
                before it are on the disk already.
            untouched: whether the weights are still those of before it.
        """
        if self.folder is None:
            return
        ids = [int(i) for i in gather_object(taken.sample_ids.tolist())]
        starts = untouched and began
        weights = gather_full(self.model.state_dict()) if starts else {}
        if not self.accelerator.is_main_process:
            return
        run, kept = self.folder, untouched and (self.folder / WEIGHTS).is_file()
        if starts:
            content = {"format": checkpoint.FORMAT, "step": taken.step, "model": weights}
            kept = _kept(run / WEIGHTS, content)
        details = {
            "step": taken.step + 1,
            "epoch": taken.epoch,
            "lr": taken.lr,
            "loss": str(loss),
            "in_a_row": self.in_a_row,
            "processes": self.accelerator.num_processes,
            "weights": WEIGHTS if kept else None,
            "sample_ids": ids,
        }
        for purpose in ("mask", "augment"):
            keys = image_keys(self.seed, taken.epoch, ids, purpose=purpose)
            details[f"{purpose}_keys"] = keys.tolist()
        try:
            write_json_atomic(run / RECORD, details)
        except OSError as error:
            note(f"{RECORD} cannot be written: {error.strerror or error}")

    def check_weights(self, last: StepRecord) -> None:
        """Never save weights that are not finite: a finite gradient may overflow in the optimizer.

        Raises:
            Exception: what ``diverged`` builds, naming the first of them.
        """
        if not self.limit:
            return
        names, weights = zip(*self.model.named_parameters(), strict=True)
        finite = torch.stack([gather_full(w.detach()).isfinite().all() for w in weights])
        for name, is_finite in zip(names, finite.tolist(), strict=True):  # waits once
            if not is_finite:
                self._record(last, math.nan, False, False)
                raise self.diverged(last, f"{name} is not finite", 1)


def _kept(path: Path, content: dict[str, Any]) -> bool:
    """Writes weights; returns whether that worked, and says so where it did not."""
    try:
        write_atomic(path, lambda temporary: torch.save(content, temporary))
    except (OSError, RuntimeError) as error:  # torch's writer hides that the disk is full
        note(f"{path.name} cannot be written: {str(error).splitlines()[0]}")
        return False
    return True


def _what(loss: float) -> str:
    return "the gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
