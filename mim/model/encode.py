"""One vector an image, from the tokens of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from mim.core.patches import Images, Patches
from mim.model.backbones import family_of
from mim.model.model import MaskedImageModel


@torch.no_grad()
def encode(model: MaskedImageModel, images: Images) -> Tensor:
    """Encode full images, normalised as in training, to (B, D).

    It is the mean over the patch tokens, normed where the backbone does so.
    """
    family = family_of(model.backbone)
    tokens = model.encode(images)[:, family.num_prefix :]  # (B, N, D)
    if isinstance(images, Patches):
        valid = images.valid[..., None]  # (B, N, 1)
        return family.pool_norm(tokens.masked_fill(~valid, 0.0).sum(dim=1) / valid.sum(dim=1))
    return family.pool_norm(tokens.mean(dim=1))
