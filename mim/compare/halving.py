"""Successive halving: which settings are tried for how long, and which go on.

Every rung gives the same work to all candidates that are left, and the better half goes on to the
next (Karnin et al. 2013, "Almost optimal exploration in multi-armed bandits").
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mim.core.errors import setting_error
from mim.core.fields import Between, NonNegative, Settings

VAL_LOSS = "val_loss"


def check_values(setting: str, values: Any, hint: str = "") -> None:
    """Refuse what is no list of values, each named once."""
    if not isinstance(values, list) or not values:
        raise setting_error(setting, values, f"must be a list of values{hint}")
    if len({json.dumps(value) for value in values}) < len(values):
        raise setting_error(setting, values, "names a value twice")


@dataclass(frozen=True)
class TuneRule(Settings, where="tune"):
    """How each group's settings are chosen: ``tune`` in a comparison's config."""

    grid: dict[str, Any]
    """Dotted keys and the values that are tried, in all combinations."""
    budget: NonNegative = 0.0
    """Work for each group, in runs of full length; 0 is as many as there are candidates."""
    by: str = ""
    """What decides: a number of a probe (linear.accuracy) or val_loss, on ``holdout``; by default
    the primary measure."""
    over: list[str] | None = None
    """Axes whose values each get a setting of their own; by default all. Along the others the first
    value is tuned, and its setting holds for all."""
    holdout: Between = 0.2
    """Share of the training images on which ``by`` is measured; the test images are not read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.grid:
            raise setting_error("tune", {}, "names no setting, as optim.base_lr: [1e-3, 4e-3] does")
        for key, values in self.grid.items():
            check_values(f"tune.{key}", values)
        if len(self.candidates) < 2:
            raise setting_error("tune", dict(self.grid), "leaves nothing to choose")

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """All combinations, as dotted keys and values."""
        combined = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, values, strict=True)) for values in combined]

    @property
    def rungs(self) -> list[Rung]:
        """The rungs, each with the same share of the budget."""
        return rungs(len(self.candidates), self.budget or len(self.candidates))


def is_end(value: Any, tried: Sequence[Any]) -> bool:
    """Whether a number is the least or the most of more than two that were tried."""
    numbers = [n for n in tried if isinstance(n, (int, float)) and not isinstance(n, bool)]
    return len(numbers) == len(tried) > 2 and value in (min(numbers), max(numbers))


def tune_rule(given: Mapping[str, Any]) -> TuneRule:
    """The rule that a config describes: its own settings, and dotted keys for the grid."""
    own = {key: value for key, value in given.items() if "." not in key and key != "seed"}
    for key in own:
        if key not in ("budget", "by", "over", "holdout"):
            reason = "is neither a dotted setting nor one of budget, by, over, holdout"
            raise setting_error("tune", key, reason)
    return TuneRule({key: value for key, value in given.items() if key not in own}, **own)


@dataclass(frozen=True)
class Rung:
    """Candidates that are compared under the same conditions."""

    candidates: int
    length: float
    """Share of the steps of a full run."""
    seeds: int = 1


def rungs(candidates: int, budget: float) -> list[Rung]:
    """Halves the candidates until one is left.

    Args:
        candidates: 2 at least.
        budget: in runs of full length; it is never exceeded, but that each run has a step.
    """
    counts = [candidates]
    while counts[-1] > 2:
        counts.append(math.ceil(counts[-1] / 2))
    shares = [budget / (len(counts) * count) for count in counts]
    return [
        Rung(count, min(share, 1.0), max(1, math.floor(share + 1e-9)))
        for count, share in zip(counts, shares, strict=True)
    ]


def best_first(scores: Mapping[int, Sequence[float | None]], higher: bool) -> list[int]:
    """Candidates by their mean; those with a run that failed last, ties in their order.

    Args:
        scores: candidate -> a value a seed, None of a failed run.
        higher: whether more is better.
    """

    def loss(candidate: int) -> float:
        values = [math.nan if value is None else value for value in scores[candidate]]
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            return math.inf
        return -mean if higher else mean

    return sorted(scores, key=lambda candidate: (loss(candidate), candidate))
