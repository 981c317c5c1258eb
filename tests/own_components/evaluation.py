"""Nearest class mean."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mim.core.fields import Positive
from mim.evaluate.base import EVALUATIONS, Evaluation, Features, ProbeSettings, labels_of


@dataclass(frozen=True)
class NearestMeanSettings(ProbeSettings):
    """Settings of the evaluation nearest_mean."""

    power: Positive = 2.0
    """Of the distance."""


@EVALUATIONS.register("nearest_mean", NearestMeanSettings)
class NearestMean(Evaluation):
    """Each image belongs to the class whose mean is nearest."""

    def run(self, train: Features, val: Features) -> dict[str, float]:
        labels = labels_of(train)
        means = torch.stack([train.values[labels == c].mean(0) for c in labels.unique()])
        found = torch.cdist(
            F.normalize(val.values), F.normalize(means), p=float(self.settings.power)
        )
        return {"accuracy": float((found.argmin(1) == labels_of(val)).double().mean())}
