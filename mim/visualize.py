"""Pictures of masks over real images, and of what a run reconstructs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mim import checkpoint
from mim.api import load
from mim.backbone import build_backbone, grid_of, patch_size_of
from mim.checkpoint import write_atomic
from mim.config import Config
from mim.data import eval_loader, open_source
from mim.errors import UserError
from mim.masks import sample_masks
from mim.pictures import picture, reconstruct, spread_indices

_GRAY = 127


def _save(image: Image.Image, output: Path) -> None:
    write_atomic(output, lambda temporary: image.save(temporary, format="PNG"))


def draw_masks(config: Config, output: Path, images: int = 8, epochs: int = 4) -> Path:
    """A sheet: a row an image, a column an epoch, as training would hide the patches.

    Args:
        config: of a run.
        output: the PNG file.
        images: rows.
        epochs: columns after the original.
    """
    source = open_source(config.data, "train")
    indices = spread_indices(len(source), images)
    (batch,) = eval_loader(source, config.data, batch_size=len(indices), indices=indices)
    with torch.device("meta"):
        vit = build_backbone(config.model, config.data.size, config.data.channels)
    grid, patch = grid_of(vit), patch_size_of(vit)
    pixels = batch.images.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
    columns = [pixels]
    for epoch in range(epochs):
        mask = sample_masks(
            config.mask, grid, seed=config.seed, epoch=epoch, sample_ids=batch.sample_ids
        )
        flags = mask.is_masked.view(-1, *grid).numpy()
        flags = flags.repeat(patch[0], axis=1).repeat(patch[1], axis=2)[..., None]
        columns.append(np.where(flags, np.uint8(_GRAY), pixels))
    height, width = pixels.shape[1:3]
    factor, gap = max(1, -(-96 // height)), 4
    high, wide = height * factor, width * factor
    size = (len(columns) * (wide + gap) - gap, len(pixels) * (high + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for x, column in enumerate(columns):
        for y, tile in enumerate(column):
            shown = tile if tile.shape[-1] == 3 else tile[..., :1].repeat(3, axis=-1)
            enlarged = Image.fromarray(np.ascontiguousarray(shown)).resize(
                (wide, high), Image.Resampling.NEAREST
            )
            sheet.paste(enlarged, (x * (wide + gap), y * (high + gap)))
    _save(sheet, output)
    return output


def draw_reconstructions(run: Path, output: Path, images: int = 8) -> Path:
    """A sheet of held-out images: original, masked, prediction, composite.

    Args:
        run: a run folder.
        output: the PNG file.
        images: rows.

    Raises:
        UserError: if the run was imported without a decoder.
    """
    config = checkpoint.read_config(run)
    if not checkpoint.read_result(run).get("imported", {}).get("decoder", True):
        raise UserError(
            f"visualize reconstruct: {str(run)!r} was imported from a file without a decoder, so "
            "it predicts nothing yet; go on training it, or draw masks"
        )
    source = open_source(config.data, "val")
    arrays = reconstruct(load(run), config, source, spread_indices(len(source), images))
    _save(picture(arrays), output)
    return output
