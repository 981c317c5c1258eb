"""What must be predicted, and the loss that counts masked patches."""

from mim.model.targets.base import (
    TARGETS,
    Target,
    TargetContext,
    build_target,
    per_image_loss,
)
from mim.model.targets.clusters import Clusters
from mim.model.targets.codes import Codes
from mim.model.targets.features import EmaFeatures, FrozenFeatures
from mim.model.targets.frequency import Frequency
from mim.model.targets.hog import Hog
from mim.model.targets.pixels import LowPass, NormalizedPixels, Pixels
from mim.model.teacher import Teacher

__all__ = [
    "TARGETS",
    "Clusters",
    "Codes",
    "EmaFeatures",
    "Frequency",
    "FrozenFeatures",
    "Hog",
    "LowPass",
    "NormalizedPixels",
    "Pixels",
    "Target",
    "TargetContext",
    "Teacher",
    "build_target",
    "per_image_loss",
]
