"""The Python entry points."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mim import checkpoint
from mim.model import MaskedImageModel, build_model


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
def encode(model: MaskedImageModel, images: Tensor) -> Tensor:
    """Features of full images: the mean over the patch tokens, and its norm where the ViT has one.

    Args:
        model: of :func:`load`.
        images: (B, C, H, W), normalised as in training.

    Returns:
        (B, D).
    """
    tokens = model.encode(images)
    return model.backbone.fc_norm(tokens[:, model.backbone.num_prefix_tokens :].mean(dim=1))
