"""The number of the nearest entry of a codebook as target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mim.core.patches import Images, patchify
from mim.masks import PatchMask
from mim.model.targets.base import TARGETS, Classes, TargetContext, principal_colours
from mim.model.targets.features import FeaturesSettings, FrozenFeatures
from mim.model.targets.pixels import normalized
from mim.model.teacher import Teacher


@dataclass(frozen=True)
class CodesSettings(FeaturesSettings):
    """Numbers of codebook entries (BEiT's form).

    The settings of a frozen model, as in model.target.features, count with ``of: features``.
    """

    codebook: str | None = None
    """A safetensors file with one matrix, ``codebook`` (entries x values); must be given."""
    of: Literal["pixels", "normalized_pixels", "features"] = "pixels"
    """What the entries are of: pixels of a patch, as the data settings normalise them, in the order
    row, column, channel; the same with each patch at mean 0 and variance 1; or layer-normalised
    features of a frozen timm model."""


def _codebook(settings: CodesSettings, width: int) -> Tensor:
    """Read the entries (K, width)."""
    if settings.codebook is None:
        raise settings.error("codebook", "must be given: a safetensors file with a codebook")
    path = Path(settings.codebook)
    if not path.is_file():
        raise settings.error("codebook", "does not exist")
    try:
        entries = load_file(path).get("codebook")
    except (SafetensorError, OSError) as error:
        raise settings.error("codebook", f"cannot be read as safetensors: {error}") from error
    if entries is None or entries.ndim != 2 or not entries.isfinite().all():
        raise settings.error("codebook", "must hold one finite matrix named codebook")
    if entries.shape[1] != width:
        reason = f"has entries of {entries.shape[1]} values where a patch has {width}"
        raise settings.error("codebook", reason)
    return entries.float()


@TARGETS.register("codes", CodesSettings)
class Codes(Classes):
    """Which entry of a frozen codebook is nearest to a patch (BEiT's form, arXiv:2106.08254).

    The prediction is a logit for each entry, and the loss is the cross-entropy. The target itself
    is the entry's number, (B, N, 1). BEiT's tokens are those of DALL-E's tokenizer; here they are
    entries of a codebook given as a file, such as k-means centres of patches or of a frozen
    model's features.
    """

    settings: CodesSettings
    _entries: Tensor

    def __init__(self, settings: CodesSettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        width = context.channels * context.patch_size[0] * context.patch_size[1]
        self._features: FrozenFeatures | None = None
        if settings.of == "features":
            self._features = FrozenFeatures(settings, context)
            width = self._features.dim
        self.register_buffer("_entries", _codebook(settings, width), persistent=False)
        self.dim = len(self._entries)

    @torch.no_grad()
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        if self._features is not None:
            values = self._features(images)
        else:
            values = patchify(images, self.context.patch_size)
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if self.settings.of == "normalized_pixels":
                values = normalized(values)
        entries = self._entries.to(values.dtype)  # (K, P)
        with torch.autocast(images.device.type, enabled=False):
            nearness = values @ entries.T - entries.square().sum(dim=1) / 2  # (B, N, K)
        return nearness.argmax(dim=-1, keepdim=True)

    def distance(
        self,
        prediction: Tensor,
        target: Tensor,
        *,
        images: Images | None = None,
        ids: Tensor | None = None,
        mask: PatchMask | None = None,
    ) -> Tensor:
        """Compute the cross-entropy (...) of logits (..., K) and numbers (..., 1)."""
        return -self.log_shares(prediction).gather(-1, target).squeeze(-1)

    def to_pixels(self, prediction: Tensor, images: Tensor, target: Tensor | None = None) -> Tensor:
        """Show the most likely entry: its pixels, or, of features, a colour of its own."""
        numbers = prediction if prediction.shape[-1] == 1 else prediction.argmax(-1, keepdim=True)
        entries = self._entries.to(images.dtype)
        if self.settings.of == "features":
            channels, (height, width) = self.context.channels, self.context.patch_size
            colours = principal_colours(entries[None], entries[None], channels)[0]
            entries = colours.to(images.dtype).repeat(1, height * width)  # (K, P)
        return F.embedding(numbers.long().squeeze(-1), entries)
