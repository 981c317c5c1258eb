"""Steps whose loss or gradient is not finite, and spikes of the loss.

A non-finite step never reaches the weights: the fused AdamW reads ``found_inf`` on the device, as
it does for a gradient scaler, so that nothing waits for the device. Whether the run then stops is
decided where the losses are read.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
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
"""In the run folder: the weights before that step, if they were unchanged when it was read."""
WINDOW = 100
"""Number of earlier losses that a spike is measured against."""
LEAST = 30
"""Least number of them."""
_LOWERED = 0.5  # fp16: the gradient overflowed, and the scale was lowered


def strict(loss: Tensor) -> Tensor:
    """Returns 1, or NaN if the loss is not finite: times it, the gradient is not finite either.

    An infinite loss can have a finite gradient. Processes average gradients, so all of them see
    what one has met.
    """
    return 1 + 0 * loss.detach()


def not_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns () float, 1 if any gradient has a value that is not finite, else 0.

    Uses the operation of torch's gradient scaler, which is one pass and agrees over FSDP's shards.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    found = torch.zeros((), device=grads[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(found))
    return found


class Guard:
    """Takes optimizer steps; one whose gradient is not finite changes nothing.

    After ``limit`` such steps in a row nothing changes any more, so that the host, which reads
    the losses later, finds the weights of the last of them.

    Args:
        limit: non-finite steps in a row that end the training; 0 guards nothing.
        in_a_row: such steps just before.
        device: of the weights.
    """

    def __init__(self, limit: int, in_a_row: int, device: torch.device) -> None:
        self.limit = limit
        self.in_a_row = torch.full((), float(in_a_row), device=device)

    def step(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Takes a step if the gradient is finite.

        Args:
            optimizer: fused, unless there is a scaler or nothing is guarded.
            scaler: of the gradients in fp16.

        Returns:
            () float, 0: taken; 1: not finite; between: the gradient overflowed in fp16 and the
            scale was lowered, which does not count towards ``limit``.
        """
        flag = torch.zeros_like(self.in_a_row)
        if self.limit:
            flag = not_finite(p for group in optimizer.param_groups for p in group["params"])
        if scaler is not None:  # it skips the same steps
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
    """Finds losses more than ``deviations`` robust standard deviations above the median.

    The median and the deviation (1.4826 times the median distance from it) are those of the last
    ``LEAST`` to ``WINDOW`` finite losses.

    Args:
        deviations: 0 finds none.
        before: losses so far.
    """

    def __init__(self, deviations: float, before: Sequence[float] = ()) -> None:
        self.deviations = deviations
        self.window: deque[float] = deque(before, WINDOW)

    def look(self, loss: float) -> str | None:
        """Describes a spike, or returns None; the loss joins the window either way."""
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
    """One step of this process, until its loss is read."""

    step: int
    """Counted from 0."""
    epoch: int
    lr: float
    sample_ids: Tensor
    """(B,) of this process's share of the batch."""
    names: tuple[str, ...] = ("loss",)
    """Of what was reported."""


class Watch:
    """Judges losses that were read: counts skipped steps and spikes, records or stops the run.

    Args:
        model: its weights are saved for ``mim debug``.
        accelerator: of the training.
        limit: as the guard's.
        diverged: builds the error that ends the training, from the step, what was wrong, and the
            number of such steps in a row.
        spike_deviations: see :class:`Spikes`.
        folder: where a non-finite step is recorded; None records nothing.
        seed: the run's, from which the keys of the images follow.
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
        """Restores :meth:`state_dict`; an early version saved nothing."""
        self.in_a_row, self.total = state.get("in_a_row", 0), state.get("total", 0)
        self._skipped, self._spikes = state.get("skipped", 0), state.get("spikes", 0)
        self._leaping = state.get("leaping", False)
        self.spikes = Spikes(self.spikes.deviations, state.get("losses", ()))

    def counts(self) -> dict[str, float]:
        """Returns ``skipped`` and ``spikes`` since the last call, those that are not 0."""
        found = {"skipped": self._skipped, "spikes": self._spikes}
        self._skipped = self._spikes = 0
        return {name: count for name, count in found.items() if count}

    def look(self, steps: Sequence[StepRecord], read: Sequence[tuple[float, float]]) -> None:
        """Judges steps in their order; all processes call it with the same losses.

        Args:
            steps: those that were not judged yet.
            read: for each its loss over all processes, and what :meth:`Guard.step` returned.

        Raises:
            Exception: what ``diverged`` builds, when ``limit`` is reached.
        """
        if not self.limit:
            return
        began_here = False  # whether the current row of non-finite steps began among these
        newest = None
        for index, (record, (loss, flag)) in enumerate(zip(steps, read, strict=True)):
            self._skipped += flag > 0
            self.total += flag > 0
            if flag < 1 and math.isfinite(loss):
                if flag == 0:
                    self.in_a_row = 0
                    self._note_spike(record.step, loss)
                continue
            self.in_a_row += 1
            began_here |= self.in_a_row == 1
            newest = index
            problem = "the gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
            if self.in_a_row >= self.limit:
                self._record(record, loss, began_here, True)
                raise self.diverged(record, problem, self.limit)
            if self.accelerator.is_main_process:
                named = f"; {RECORD} names the images" if self.folder is not None else ""
                note(
                    f"step {record.step + 1}: {problem}; the step is skipped "
                    f"({self.in_a_row} in a row, {self.limit} stop the run{named})"
                )
        if newest is not None:
            untouched = self.in_a_row > 0 and all(flag > 0 for _, flag in read[newest:])
            self._record(steps[newest], read[newest][0], began_here, untouched)

    def _note_spike(self, step: int, loss: float) -> None:
        spike = self.spikes.look(loss)
        self._spikes += spike is not None
        if spike is not None and not self._leaping and self.accelerator.is_main_process:
            note(f"step {step + 1}: {spike}")
        self._leaping = spike is not None

    def _record(self, record: StepRecord, loss: float, began_here: bool, untouched: bool) -> None:
        """Writes ``nonfinite.json`` and the weights for ``mim debug``; all processes call it.

        Args:
            record: the step.
            loss: of all processes.
            began_here: whether its row of non-finite steps began since the last call. Otherwise
                the weights before the row have been written already.
            untouched: whether the weights are still those before the step.
        """
        if self.folder is None:
            return
        ids = [int(i) for i in gather_object(record.sample_ids.tolist())]
        writes = untouched and began_here
        weights = gather_full(self.model.state_dict()) if writes else {}
        if not self.accelerator.is_main_process:
            return
        has_weights = untouched and (self.folder / WEIGHTS).is_file()
        if writes:
            content = {"format": checkpoint.FORMAT, "step": record.step, "model": weights}
            save = partial(torch.save, content)
            has_weights = _succeeds(WEIGHTS, partial(write_atomic, self.folder / WEIGHTS, save))
        details = {
            "step": record.step + 1,
            "epoch": record.epoch,
            "lr": record.lr,
            "loss": str(loss),
            "in_a_row": self.in_a_row,
            "processes": self.accelerator.num_processes,
            "weights": WEIGHTS if has_weights else None,
            "sample_ids": ids,
        }
        for purpose in ("mask", "augment"):
            keys = image_keys(self.seed, record.epoch, ids, purpose=purpose)
            details[f"{purpose}_keys"] = keys.tolist()
        _succeeds(RECORD, partial(write_json_atomic, self.folder / RECORD, details))

    def check_weights(self, last: StepRecord) -> None:
        """Checks weights before a save, since a finite gradient may overflow in the optimizer.

        Raises:
            Exception: what ``diverged`` builds, naming the first weight that is not finite.
        """
        if not self.limit:
            return
        names, weights = zip(*self.model.named_parameters(), strict=True)
        finite = torch.stack([gather_full(w.detach()).isfinite().all() for w in weights])
        for name, is_finite in zip(names, finite.tolist(), strict=True):  # waits once
            if not is_finite:
                self._record(last, math.nan, False, False)
                raise self.diverged(last, f"{name} is not finite", 1)


def _succeeds(name: str, write: Callable[[], None]) -> bool:
    """Writes a file; notes why if that fails."""
    try:
        write()
    except (OSError, RuntimeError) as error:  # torch's writer hides that the disk is full
        note(f"{name} cannot be written: {str(error).splitlines()[0]}")
        return False
    return True
