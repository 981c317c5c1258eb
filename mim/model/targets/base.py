"""What a target is, and the loss that counts masked patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.core.config import TargetConfig
from mim.core.errors import setting_error
from mim.core.patches import Images, values_at
from mim.core.registry import Registry
from mim.core.rng import seed_of
from mim.masks import PatchMask
from mim.model.teacher import Teacher
from mim.model.terms import WithTerms


@dataclass(frozen=True)
class TargetContext:
    """What a target must know of the model, the images and the loss (``model.target``)."""

    patch_size: tuple[int, int]
    """(height, width) of a patch in pixels."""
    channels: int
    grid: tuple[int, int]
    """(rows, columns) of patches."""
    width: int
    """D, of the encoder's tokens."""
    depth: int
    """Number of blocks of the encoder."""
    mean: tuple[float, ...] | None = None
    """Of each channel on the scale 0 to 1, where the settings give it; likewise ``std``."""
    std: tuple[float, ...] | None = None
    has_class_token: bool = False
    """Of the encoder."""
    loss: str = "auto"
    smooth_l1_beta: float = 2.0
    loss_on: str = "masked"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]


class Target(WithTerms, nn.Module, ABC):
    """Turns images into what the decoder must predict.

    Its ``settings`` are those registered with it; None without any.
    """

    name: ClassVar[str] = ""
    """As registered."""
    needs_teacher: ClassVar[bool] = False
    """Whether :meth:`forward` must be given a teacher."""
    needs_mlps: bool = False
    """Whether the teacher must show the output of its MLPs."""
    shows_pixels: ClassVar[bool] = False
    """Whether a prediction holds an image, so that :meth:`to_pixels` shows it."""
    takes_sizes: ClassVar[bool] = False
    """Whether image sizes may differ (:class:`mim.core.patches.Patches`)."""
    reads_batch: ClassVar[bool] = False
    """Whether, in training, the target of an image depends on the others of its batch."""
    own_loss: ClassVar[str] = "mse"
    """The loss of ``model.target.loss: auto``."""
    dim: int
    """Length of the vector to be predicted for a patch."""

    def __init__(self, settings: Any, context: TargetContext) -> None:
        super().__init__()
        self.settings = settings
        self.context = context

    @abstractmethod
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        """Map (B, C, H, W) normalised images to (B, N, dim), without gradient."""

    def at(self, images: Images, ids: Tensor, teacher: Teacher | None = None) -> Tensor:
        """Compute (B, M, dim) at the patches ``ids`` (B, M) int64, and the rest only if need be."""
        return values_at(self(images, teacher), ids)

    def build_head(self, width: int) -> nn.Module | None:
        """Build what a decoder ends in, given its width; None leaves its linear map."""
        return None

    def to_pixels(self, prediction: Tensor, images: Tensor, target: Tensor | None = None) -> Tensor:
        """Show a prediction (B, N, dim) as patches of pixels (B, N, P), normalised as the images.

        By default each patch has one colour: the prediction's coordinates along the principal
        components of the target (computed here where it is not given) over these images, scaled so
        that 95 % of the target's lie within 2 standard deviations of the images. A target without
        variation is gray.
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
        """Compare (..., dim) twice: (...), the mean over a patch's values, at least float32.

        ``cosine`` is 1 minus the cosine similarity of the two vectors; of a zero vector, 1. Targets
        that weigh patches by what they show or where they lie use the images, the mask and the
        ``ids`` (B, M) of the patches (None: all N in order).
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


class Classes(Target):
    """A target of classes for each patch, whose prediction is their logits."""

    own_loss = "cross_entropy"

    def __init__(self, settings: Any, context: TargetContext) -> None:
        super().__init__(settings, context)
        if context.loss != "auto":
            reason = f"must be auto with model.target.name={self.name}: that is cross-entropy"
            raise setting_error("model.target.loss", context.loss, reason)

    def log_shares(self, prediction: Tensor, temperature: float = 1.0) -> Tensor:
        """Compute the logarithm of the softmax of logits (..., K), at least float32."""
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        return (prediction / temperature).log_softmax(dim=-1)


TARGETS: Registry[type[Target]] = Registry(
    "model.target.name",
    TargetConfig,
    {
        "mae": "normalized_pixels",
        "maskfeat": "hog",
        "simmim": "pixels",
        "norm_pix": "normalized_pixels",
    },
)


@torch.no_grad()
def principal_colours(prediction: Tensor, target: Tensor, channels: int) -> Tensor:
    """Project predictions (B, N, dim) on the target's principal components, one for each channel.

    Returns:
        (B, N, C) float64, within -2 and 2; components beyond ``dim`` are 0.
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
    """Average (B, M) over each image's ``valid`` patches: (B,); 0 for an image without any."""
    if distance.shape[1] == 0:  # nothing is masked anywhere; a mean would be NaN
        return distance.sum(dim=1)
    if valid is None:
        return distance.mean(dim=1)
    counted = distance.masked_fill(~valid, 0.0)
    return counted.sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def build_target(config: TargetConfig, context: TargetContext, seed: int = 0) -> Target:
    """Build the target that ``config`` names; weights that it learns follow from ``seed`` alone.

    Raises:
        UserError: if the name is unknown, or the target does not fit ``context``.
    """
    context = replace(
        context, loss=config.loss, smooth_l1_beta=config.smooth_l1_beta, loss_on=config.loss_on
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "target"))
        return TARGETS.get(config.name)(TARGETS.chosen(config, config.name), context)
