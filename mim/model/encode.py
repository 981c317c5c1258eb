"""One vector an image, from the tokens of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from mim.core.patches import Images, Patches
from mim.model.backbones import family_of
from mim.model.model import MaskedImageModel


@torch.no_grad()
def encode(model: MaskedImageModel, images: Images) -> Tensor:
    """Features of full images: the mean over the patch tokens, normed where the backbone does so.

    Args:
        model: of :func:`load`.
        images: (B, C, H, W), normalised as in training.

    Returns:
        (B, D).
    """
    family = family_of(model.backbone)
    tokens = model.encode(images)[:, family.num_prefix :]  # (B, N, D)
    if isinstance(images, Patches):
        valid = images.valid
        mean = tokens.masked_fill(~valid[..., None], 0.0).sum(dim=1) / valid.sum(1, keepdim=True)
        return family.pool_norm(mean)
    return family.pool_norm(tokens.mean(dim=1))
