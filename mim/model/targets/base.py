"""What a target is, and the loss that counts masked patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.core.config import TargetConfig
from mim.core.patches import Images, values_at
from mim.core.registry import Registry
from mim.masks import PatchMask
from mim.model.teacher import Teacher
from mim.model.terms import WithTerms


@dataclass(frozen=True)
class TargetContext:
    """What a target must know of the model, the images and the loss.

    Attributes:
        patch_size: (height, width) of a patch in pixels.
        channels: of the images.
        grid: (rows, columns) of patches.
        width: of the encoder's tokens, D.
        depth: the encoder's number of blocks.
        loss: ``model.target.loss``.
        smooth_l1_beta: ``model.target.smooth_l1_beta``.
        loss_on: ``model.target.loss_on``.
    """

    patch_size: tuple[int, int]
    channels: int
    grid: tuple[int, int]
    width: int
    depth: int
    loss: str = "auto"
    smooth_l1_beta: float = 2.0
    loss_on: str = "masked"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]


class Target(WithTerms, nn.Module, ABC):
    """Turns images into what the decoder must predict.

    Args:
        settings: its own, as registered with it; None where it has none.
        context: the model and images it serves.

    Attributes:
        name: as registered.
        dim: length of the vector to be predicted for a patch.
        needs_teacher: whether :meth:`forward` must be given a teacher.
        shows_pixels: whether a prediction holds an image, so that :meth:`to_pixels` shows it.
        takes_sizes: whether images may have several sizes (:class:`mim.core.patches.Patches`).
        own_loss: the loss of ``model.target.loss: auto``.
    """

    name: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = False
    shows_pixels: ClassVar[bool] = False
    takes_sizes: ClassVar[bool] = False
    own_loss: ClassVar[str] = "mse"
    dim: int

    def __init__(self, settings: Any, context: TargetContext) -> None:
        super().__init__()
        self.settings = settings
        self.context = context

    @abstractmethod
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        """(B, C, H, W) normalised images -> (B, N, dim), without gradient."""

    def at(self, images: Images, ids: Tensor, teacher: Teacher | None = None) -> Tensor:
        """What must be predicted at some patches: ``ids`` (B, M) int64 -> (B, M, dim).

        A target whose patches do not depend on each other need not compute the rest.
        """
        return values_at(self(images, teacher), ids)

    def to_pixels(self, prediction: Tensor, images: Tensor, target: Tensor | None = None) -> Tensor:
        """A prediction as patches of pixels that can be shown.

        Here, for vectors that are no pixels: each patch in one colour, the prediction's
        coordinates along the target's principal components over these images, scaled so that
        95 of 100 of the target's lie within 2 standard deviations of the images. A target of no
        variation is gray.

        Args:
            prediction: (B, N, dim).
            images: (B, C, H, W), normalised.
            target: (B, N, dim) of these images; computed anew where it is not given.

        Returns:
            (B, N, P), in the images' normalisation.
        """
        if target is None:
            target = self(images)
        channels, (height, width) = self.context.channels, self.context.patch_size
        colours = principal_colours(prediction, target, channels)  # (B, N, C)
        return colours.to(images.dtype).repeat(1, 1, height * width)  # (B, N, P)

    def distance(
        self,
        prediction: Tensor,
        target: Tensor,
        *,
        images: Images | None = None,
        ids: Tensor | None = None,
        mask: PatchMask | None = None,
    ) -> Tensor:
        """(..., dim) twice -> (...), the mean over a patch's values, in float32 at least.

        ``cosine`` is 1 minus the cosine similarity of the two vectors; of a zero vector, 1.

        Args:
            prediction: (B, M, dim).
            target: (B, M, dim).
            images: (B, C, H, W), normalised; this and what follows is for targets that weigh
                patches by what they show or where they lie.
            ids: (B, M) int64, which patches they are; None for all N in order.
            mask: (B, N), what is hidden.
        """
        if prediction.dtype.itemsize < 4:  # half precision loses the small differences
            prediction = prediction.float()
        target = target.to(prediction.dtype)
        kind = self.own_loss if self.context.loss == "auto" else self.context.loss
        if kind == "cosine":
            return 1 - F.cosine_similarity(prediction, target, dim=-1)
        if kind == "smooth_l1":
            beta = self.context.smooth_l1_beta
            each = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
        elif kind == "l1":
            each = F.l1_loss(prediction, target, reduction="none")
        else:
            each = F.mse_loss(prediction, target, reduction="none")
        return each.mean(dim=-1)


TARGETS: Registry[type[Target]] = Registry("model.target.name", TargetConfig)


@torch.no_grad()
def principal_colours(prediction: Tensor, target: Tensor, channels: int) -> Tensor:
    """Coordinates of predictions along the target's principal components, one a channel.

    Args:
        prediction: (B, N, dim).
        target: (B, N, dim), whose components, mean and scale are taken.
        channels: C; components beyond ``dim`` are 0.

    Returns:
        (B, N, C) float64, within -2 and 2.
    """
    vectors = target.double().flatten(0, 1)  # (B * N, dim)
    mean = vectors.mean(dim=0)
    centred = vectors - mean
    _, components = torch.linalg.eigh(centred.T @ centred)  # ascending
    axes = components.flip(-1)[:, :channels]  # (dim, C')
    largest = axes.abs().argmax(dim=0, keepdim=True)
    axes = axes * axes.gather(0, largest).sign()  # a component's sign is arbitrary: fix it
    spread = (centred @ axes).abs().quantile(0.95, dim=0)  # (C',)
    scale = torch.where(spread > 1e-9 * (1 + vectors.abs().max()), 2 / spread, 0)
    colours = ((prediction.double() - mean) @ axes * scale).clamp(-2, 2)
    return F.pad(colours, (0, channels - colours.shape[-1]))


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


def build_target(config: TargetConfig, context: TargetContext) -> Target:
    """The target that ``config`` names.

    Raises:
        UserError: if the name is unknown, or the target does not fit ``context``.
    """
    context = replace(
        context, loss=config.loss, smooth_l1_beta=config.smooth_l1_beta, loss_on=config.loss_on
    )
    return TARGETS.get(config.name)(TARGETS.chosen(config, config.name), context)
