"""The Python entry points."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mim import checkpoint
from mim.backbone import family_of
from mim.model import MaskedImageModel, build_model
from mim.patches import Images, Patches


def load(path: str | Path) -> MaskedImageModel:
    """The model of a run folder or of one of its checkpoints, in eval mode, on the CPU.

    Args:
        path: a run folder, or ``RUN/checkpoints/step_N.pt``.

    Raises:
        UserError: if there is no run or no checkpoint there.
    """
    path = Path(path)
    run = path if path.is_dir() else path.parent.parent
    model = build_model(checkpoint.read_config(run))
    model.load_state_dict(checkpoint.model_state(path))
    return model.eval()


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
