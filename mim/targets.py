"""What must be predicted, and the loss that counts masked patches."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from mim.config import TargetConfig
from mim.masks import PatchMask
from mim.patches import patchify
from mim.registry import Registry


class Target(nn.Module, ABC):
    """Turns images into what the decoder must predict.

    Args:
        config: the settings under ``model.target``.
        patch_size: (height, width) of a patch in pixels.
        channels: of the images.
    """

    def __init__(self, config: TargetConfig, patch_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.config = config
        self.patch_size = patch_size
        self.dim = patch_size[0] * patch_size[1] * channels

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised images -> (B, N, dim)."""

    @abstractmethod
    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """A prediction (B, N, dim) as patches of pixels (B, N, P), in the images' normalisation."""

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(..., dim) twice -> (...), the mean over a patch's values, in float32 at least."""
        if prediction.dtype.itemsize < 4:  # half precision loses the small differences
            prediction = prediction.float()
        kind = F.mse_loss if self.config.loss == "mse" else F.l1_loss
        return kind(prediction, target.to(prediction.dtype), reduction="none").mean(dim=-1)


TARGETS: Registry[type[Target]] = Registry("model.target.name")


@TARGETS.register("pixels")
class Pixels(Target):
    """The pixels themselves."""

    def forward(self, images: Tensor) -> Tensor:
        """Patches of pixels; see :class:`Target`."""
        return patchify(images, self.patch_size)

    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """The prediction as it is; see :class:`Target`."""
        return prediction


@TARGETS.register("normalized_pixels")
class NormalizedPixels(Target):
    """Each patch brought to mean 0 and variance 1 (MAE, arXiv:2111.06377).

    The variance is the unbiased one, with 1e-6 added before the root, as in MAE's code.
    """

    epsilon = 1e-6

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = patchify(images, self.patch_size)
        mean = patches.mean(dim=-1, keepdim=True)
        deviation = (patches.var(dim=-1, keepdim=True) + self.epsilon).sqrt()
        return patches, mean, deviation

    def forward(self, images: Tensor) -> Tensor:
        """Normalised patches; see :class:`Target`."""
        patches, mean, deviation = self._statistics(images)
        return (patches - mean) / deviation

    def to_pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Un-normalised with the true patch's mean and deviation, which a viewer must know."""
        _, mean, deviation = self._statistics(images)
        return prediction * deviation + mean


def per_image_loss(distance: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over each image's counted patches.

    Args:
        distance: (B, M).
        valid: (B, M) bool, False for padding; None where all count.

    Returns:
        (B,); 0 for an image without a counted patch.
    """
    if distance.shape[1] == 0:  # nothing is masked anywhere; a mean would be NaN
        return distance.sum(dim=1)
    if valid is None:
        return distance.mean(dim=1)
    counted = distance.masked_fill(~valid, 0.0)
    return counted.sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def loss_positions(config: TargetConfig, mask: PatchMask) -> tuple[Tensor | None, Tensor | None]:
    """(ids (B, M), valid) of the patches that count; ids None means all patches in order."""
    if config.loss_on == "all":
        return None, None
    return mask.masked_ids, mask.masked_valid


def build_target(config: TargetConfig, patch_size: tuple[int, int], channels: int) -> Target:
    """The target that ``config`` names.

    Raises:
        UserError: if the name is unknown.
    """
    return TARGETS.get(config.name)(config, patch_size, channels)
