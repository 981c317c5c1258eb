"""How measures are named, scaled and printed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mim.compare.statistics import is_share, more_is_better
from mim.report.collect import LOSSES, Comparison

MISSING = "\u2013"
# How an evaluation names what it chose or checked, as against what it found.
_CHOSEN = ("chosen_", "converged", "mean_k_", "mean_strength_", "mean_temperature_")
# What has no place among the results: the same quality of each class, layer or corruption.
_EACH = ("iou_", "map_class_", "mask_map_class_", "mended_", "layer_", "error_", "ce_")
_WORDS = {"miou": "mIoU", "map": "mAP", "mce": "mCE"}
# Sections whose measures need no section to be understood.
PLAIN = ("", "Loss", "Per image", "On this machine")
_EVALUATIONS = {
    "linear": "Linear probe",
    "linear_grid": "Linear probe (grid)",
    "linear_mae": "Linear probe (MAE)",
    "linear_online": "Linear probe (online)",
    "analysis": "Layers",
    "knn": "k-NN",
    "attentive": "Attentive probe",
    "finetune": "Fine-tuning",
    "robustness": "Robustness",
    "segment": "Segmentation",
    "detect": "Detection",
}


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one measure over the seeds of a group."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1 in the denominator); none with a single value."""
    n: int


def summarize(values: Iterable[float]) -> Summary | None:
    """Mean, sample standard deviation and count; none without values."""
    array = np.asarray(list(values), dtype=np.float64)
    if not array.size:
        return None
    sd = float(array.std(ddof=1)) if array.size > 1 else None
    return Summary(float(array.mean()), sd, int(array.size))


@dataclass(frozen=True)
class Measure:
    """How one measure is printed."""

    key: str
    section: str
    label: str
    scale: float = 1.0
    """Printed number over stored number."""
    unit: str = ""
    decimals: int = 1
    higher: bool = True
    """Whether more is better."""
    exact: bool = False
    """Whether seeds cannot change it, so that a spread of 0 says nothing."""

    @property
    def title(self) -> str:
        """Name that stands by itself: "Linear probe, accuracy (%)"."""
        return self.head if self.section in PLAIN else f"{self.section}, {self.head}"

    @property
    def head(self) -> str:
        """Name under its section's heading."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def plain(self) -> str:
        """The title without its unit, for sentences."""
        return self.label if self.section in PLAIN else f"{self.section}, {self.label}"

    @property
    def spoken(self) -> str:
        """The same as part of a sentence: "linear probe accuracy"."""
        words = self.plain.replace(", ", " ", 1)
        first = words.split(" ", maxsplit=1)[0]  # "k-NN" and "mAP" stay
        return words[0].lower() + words[1:] if first.istitle() else words

    def number(self, value: float | None, *, sign: bool = False) -> str:
        """A stored value as printed, without its unit."""
        if value is None:
            return MISSING
        scaled = round(value * self.scale, self.decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
        text = f"{scaled:{'+' if sign else ''},.{self.decimals}f}".replace(",", "\u202f")
        return text.replace("-", "\u2212")

    def summary(self, summary: Summary | None) -> str:
        """ "93.1 ± 0.4"; a dash without values."""
        if summary is None:
            return MISSING
        if summary.sd is None or (self.exact and summary.sd == 0):
            return self.number(summary.mean)
        return f"{self.number(summary.mean)}\u00a0±\u00a0{self.number(summary.sd)}"

    @property
    def points(self) -> str:
        """The unit of a difference, for sentences: " points" of per cents."""
        return " points" if self.unit == "%" else f" {self.unit}".rstrip()

    def interval(self, low: float | None, high: float | None) -> str:
        """ "0.4 to 2.0"; a dash where there is none.

        An end that would be printed as 0 and is not gets more decimals: whether the interval
        leaves out 0 is what it is read for.
        """
        if low is None or high is None:
            return MISSING
        ends = (low, high)
        fine = self
        for decimals in range(self.decimals, self.decimals + 4):
            fine = replace(self, decimals=decimals)
            if all(end == 0 or round(end * self.scale, decimals) for end in ends):
                break
        return " to ".join(map(fine.number, ends))


def evaluation_measures(comparison: Comparison) -> list[Measure]:
    """The evaluations' qualities; spreads over draws and what was chosen stand in the CSV."""
    measures = []
    for key in comparison.evaluation_keys:
        if key.endswith("_std") or key.partition(".")[2].startswith(_CHOSEN + _EACH):
            continue
        evaluation, _, name = key.partition(".")
        label = re.sub(r"_(\d+)_per_class$", r", \1 per class", name).replace("_", " ")
        label = re.sub(r"\bm(iou|ap|ce)\b", lambda word: _WORDS[word[0]], label)
        share = is_share(name)
        measures.append(
            Measure(
                key,
                _EVALUATIONS.get(evaluation, evaluation),
                label,
                scale=100.0 if share else 1.0,
                unit="%" if share else "",
                decimals=1 if share else _decimals(comparison, [key]),
                higher=more_is_better(name),
            )
        )
    # Columns of one evaluation stand together, in the order in which evaluations appear.
    order = list(dict.fromkeys(measure.section for measure in measures))
    return sorted(measures, key=lambda measure: order.index(measure.section))


def loss_measures(comparison: Comparison) -> list[Measure]:
    """Training and held-out loss."""
    decimals = _decimals(comparison, LOSSES, digits=4)
    return [
        Measure("train_loss", "Loss", "training loss", decimals=decimals, higher=False),
        Measure("val_loss", "Loss", "held-out loss", decimals=decimals, higher=False),
    ]


def cost_measures(comparison: Comparison) -> list[Measure]:
    """What a run costs, in units that suit the largest value."""
    seconds, unit = time_unit(_largest(comparison, ["wall_seconds"]))
    tokens = [run.measures.get("encoder_tokens", 0.0) for run in comparison.runs]
    whole = all(value == int(value) for value in tokens)
    flops = _decimals(comparison, ["flops_forward", "flops_backward"], digits=4, scale=1e-9)
    per_image = partial(Measure, section="Per image", higher=False, exact=True)

    def on_machine(key: str, label: str, scale: float, unit: str, higher: bool) -> Measure:
        decimals = _decimals(comparison, [key], scale=scale)
        return Measure(key, "On this machine", label, scale, unit, decimals, higher)

    per_flops, flops_name = flops_unit(_largest(comparison, ["train_flops"]))
    training = partial(Measure, section="Training", higher=False, exact=True)
    spent = _decimals(comparison, ["train_flops"], scale=1 / per_flops)
    return [
        training("epochs", label="epochs", decimals=_decimals(comparison, ["epochs"])),
        training("steps", label="steps", decimals=0),
        training("train_flops", label=flops_name, scale=1 / per_flops, decimals=spent),
        per_image("encoder_tokens", label="tokens in encoder", decimals=0 if whole else 1),
        per_image("flops_forward", label="forward GFLOPs", scale=1e-9, decimals=flops),
        per_image("flops_backward", label="backward GFLOPs", scale=1e-9, decimals=flops),
        on_machine("images_per_second", "images/s", 1.0, "", True),
        on_machine("peak_memory_bytes", "peak memory", 2.0**-20, "MiB", False),
        on_machine("wall_seconds", "wall time", 1 / seconds, unit, False),
    ]


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds in the unit, its sign) to print durations up to ``seconds``."""
    if seconds >= 7200:
        return 3600.0, "h"
    return (60.0, "min") if seconds >= 600 else (1.0, "s")


def flops_unit(largest: float) -> tuple[float, str]:
    """(FLOPs in the unit, its name) to print numbers of operations up to ``largest``."""
    for scale, unit in ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs")):
        if largest >= scale:
            return scale, unit
    return 1e6, "MFLOPs"


def _largest(comparison: Comparison, keys: Sequence[str]) -> float:
    values = [abs(run.measures.get(key, 0.0)) for run in comparison.runs for key in keys]
    return max(values, default=0.0)


def _decimals(
    comparison: Comparison, keys: Sequence[str], digits: int = 3, scale: float = 1.0
) -> int:
    """Decimals that show ``digits`` digits of the largest value."""
    largest = _largest(comparison, keys) * scale
    return 1 if largest <= 0 else min(max(digits - 1 - math.floor(math.log10(largest)), 0), 6)


def p_text(p: float) -> str:
    """ "p = 0.012"."""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.2g}"
