"""Values that move over training: learning rate, weight decay, teacher's decay, mask ratio.

A value is a pure function of the step, so that nothing of it is saved and a resume is exact.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from mim.core.fields import BelowOne, NonNegative, Positive, Settings, Share

Shape = Literal["constant", "linear", "cosine", "multistep"]


@dataclass(frozen=True)
class CourseSettings(Settings):
    """How a value moves."""

    shape: Shape = "constant"
    """constant, linear, cosine (half a period) or multistep (times ``factor`` at each of the
    ``milestones``)."""
    phase: Share = 1.0
    """Share of its way after which linear or cosine is cut short: 0.8 stops a cosine at 80 % of its
    half period, as in CAPI."""
    milestones: tuple[Positive, ...] = ()
    """Of multistep, in ascending order."""
    factor: Positive = 0.1
    """Of multistep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.milestones) != (self.shape == "multistep"):
            word = "are needed with" if self.shape == "multistep" else "need"
            raise self.error("milestones", f"{word} {self.where}.shape=multistep")
        if list(self.milestones) != sorted(self.milestones):
            raise self.error("milestones", "must be in ascending order")
        if self.phase < 1 and self.shape not in ("linear", "cosine"):
            raise self.error("phase", f"needs {self.where}.shape linear or cosine")


@dataclass(frozen=True)
class ScheduleSettings(CourseSettings):
    """How a value moves over training."""

    to: NonNegative | None = None
    """Where linear, cosine and a cool-down end; needed with them."""
    cooldown: BelowOne = 0.0
    """Share of training, its last, in which a constant value falls in a line (Hägele et al. 2024,
    https://arxiv.org/abs/2405.18392)."""
    length: Positive | None = None
    """How long they take from the first step on, warm-up included; then the value stays. By default
    all of training. A longer length is cut short by the end of training, as in I-JEPA."""
    warmup: NonNegative | None = None
    """How long the value first moves to its own in a line; at most a half of training."""
    warmup_from: NonNegative | None = None
    """What it has in the first step; by default, with W steps of warm-up, 1 / (W + 1) of its
    own."""
    counts_warmup: bool = False
    """Whether linear and cosine begin with the first step, so that the value is on their way
    already when the warm-up ends, as in SimMIM; else they begin after the warm-up."""
    unit: Literal["epochs", "steps"] = "epochs"
    """What length, warmup and milestones count in; epochs may be fractional."""

    def __post_init__(self) -> None:
        super().__post_init__()
        moves = self.shape in ("linear", "cosine")
        if self.cooldown and self.shape != "constant":
            raise self.error("cooldown", f"needs {self.where}.shape=constant")
        if self.to is not None and not self.ends:
            raise self.error("to", f"needs {self.where}.shape linear or cosine, or a cooldown")
        if self.ends and self.to is None and not self.fills_in("to"):
            key = "cooldown" if self.cooldown else "shape"
            raise self.error("to", f"is needed with {self.where}.{key}={getattr(self, key)}")
        if self.length is not None and not moves:
            raise self.error("length", f"needs {self.where}.shape linear or cosine")
        if self.warmup_from is not None and not self.warmup and not self.fills_in("warmup"):
            raise self.error("warmup_from", f"needs {self.where}.warmup")

    def fills_in(self, name: str) -> bool:
        """Tell whether another setting says what None means here."""
        return False

    @property
    def ends(self) -> bool:
        """Whether the value ends at ``to``."""
        return self.shape in ("linear", "cosine") or self.cooldown > 0

    @property
    def moves(self) -> bool:
        """Whether the value ever changes."""
        return self.shape != "constant" or bool(self.warmup) or self.cooldown > 0

    def build(self, value: float, total: int, steps_per_epoch: int) -> Schedule:
        """Build the schedule of a value over ``total`` steps."""
        unit = 1 if self.unit == "steps" else steps_per_epoch
        warmup = min((self.warmup or 0) * unit, total / 2)
        return Schedule(
            value,
            value if self.to is None else self.to,
            warmup,
            total,
            self.shape,
            self.phase,
            self.warmup_from,
            self.counts_warmup,
            None if self.length is None else self.length * unit,
            tuple(milestone * unit for milestone in self.milestones),
            self.factor,
            min(round(self.cooldown * total), math.floor(total - warmup)),
        )


@dataclass(frozen=True)
class Schedule:
    """A value at each step: a linear warm-up, then by default a half cosine (MAE, 2111.06377)."""

    peak: float
    """The value after the warm-up."""
    low: float
    """The value at the end of linear, cosine and a cool-down."""
    warmup: float
    """Steps of warm-up."""
    total: int
    """Steps of the run."""
    shape: Shape = "cosine"
    phase: float = 1.0
    start: float | None = None
    """Value of the first step of a warm-up of W; by default 1 / (W + 1) of the peak."""
    counts_warmup: bool = False
    length: float | None = None
    """Steps, warm-up included, in which ``low`` is reached; by default all."""
    milestones: tuple[float, ...] = ()
    """Steps at which multistep falls."""
    factor: float = 0.1
    cooldown: int = 0
    """Last steps, in which a constant value falls to ``low``."""

    @property
    def cools_from(self) -> int | None:
        """The step with which the cool-down begins; None where there is none."""
        return self.total - self.cooldown if self.cooldown else None

    def __call__(self, step: int) -> float:
        """Return the value of a step, counted from 0."""
        if step < self.warmup:
            if self.start is None:
                return self.peak * (step + 1) / (self.warmup + 1)
            return self.start + (self.peak - self.start) * step / self.warmup
        if self.shape == "multistep":
            return self.peak * self.factor ** bisect_right(self.milestones, step)
        if self.cooldown:
            left = min((self.total - step) / self.cooldown, 1.0)
            return self.low + (self.peak - self.low) * left
        begin = 0.0 if self.counts_warmup else self.warmup
        length = self.total if self.length is None else self.length
        done = (step - begin) / max(length - begin, 1)
        return self.low + (self.peak - self.low) * remaining(self.shape, done, self.phase)


def remaining(shape: Shape, done: float, phase: float = 1.0) -> float:
    """Return the share of the way still ahead, 1 to 0, after the share ``done`` of the time."""
    if shape == "constant":
        return 1.0
    done = min(done, 1.0) * phase
    return 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
