"""Reconstructions as arrays and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim.core.config import Config, MaskScheduleConfig
from mim.core.device import to_device
from mim.core.errors import UserError
from mim.core.patches import Images, Patches, patchify, unpatchify
from mim.core.rng import image_keys
from mim.data import ImageSource, eval_loader, normalize
from mim.data.images.deep import PERCENTILES
from mim.data.images.transforms import restore
from mim.masks import PatchMask
from mim.masks.generators import build_mask_generator
from mim.model import MaskedImageModel
from mim.training.checkpoint import write_atomic

# Held-out losses and pictures use one fixed mask an image, the same in every run and epoch.
FIXED_SEED, FIXED_EPOCH = 0, -1
COLUMNS = ("original", "masked", "prediction", "composite")
RATIOS = (0.25, 0.5, 0.75, 0.9)
"""Mask ratios of the pictures of a finished run, besides its own."""
Pixels = NDArray[np.uint8]


def fixed_masks(
    model: MaskedImageModel, images: Images, sample_ids: Tensor, epoch: int = FIXED_EPOCH
) -> PatchMask:
    """Draws the fixed masks of held-out images (B, C, H, W), normalised.

    ``epoch`` matters only for a mask ratio that changes during training.
    """
    keys = image_keys(FIXED_SEED, epoch, sample_ids, purpose="mask")
    return model.draw_mask(images, keys, epoch=epoch, sample_ids=sample_ids)


def as_rgb(pixels: Pixels) -> Pixels:
    """Turns (..., C) into (..., 3): the first three channels, or the first one in gray."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)


def _to_uint8(images: Tensor, content: Tensor, source: ImageSource) -> Pixels:
    """Shows ``content``, what stands in the place of normalised ``images``; (B, C, H, W) each."""
    whole, part = (
        restore(values.float().cpu(), source.mean, source.std) for values in (images, content)
    )
    return _shown(whole, part, source)


def _shown(images: Tensor, content: Tensor, source: ImageSource) -> Pixels:
    """Returns (B, H, W, C) of ``content``, which is from 0 to 1 like the ``images`` it changes.

    What is NaN is gray.
    Of images of more than 8 bits black and white are the 0.5th and the 99.5th percentile of the
    image, of each channel unless there are three.
    """
    if source.show is not None:
        images, content = images[:, source.show], content[:, source.show]
    if source.deep and len(images):
        one = images.shape[1] == 3
        flat = images.flatten(1) if one else images.flatten(2)  # (B, n) or (B, C, n)
        ends = np.percentile(flat.numpy(), PERCENTILES, axis=-1)
        low, high = (torch.from_numpy(end).float()[..., None, None] for end in ends)
        low, high = (end[:, None] if one else end for end in (low, high))
        content = (content - low) / (high - low).clamp_min(1e-6)
    whole = (content.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return whole.permute(0, 2, 3, 1).numpy()


def shown_pixels(images: Tensor, source: ImageSource) -> Pixels:
    """Shows images (B, C, H, W) of a batch, not normalised, as uint8 (B, H, W, C)."""
    values = images.float() / 255 if images.dtype == torch.uint8 else images
    return _shown(values, values, source)


def _patches(model: MaskedImageModel, images: Images) -> Tensor:
    """(B, N, P)."""
    if isinstance(images, Patches):
        return images.values
    return patchify(images, model.patch_size)


def _pixels(
    model: MaskedImageModel, images: Images, content: Tensor, source: ImageSource
) -> Pixels:
    """(B, H, W, C) of images whose patches are ``content`` (B, N, P)."""
    if isinstance(images, Patches):
        return _on_canvas(images, images.with_values(content), model.patch_size, source)
    return _to_uint8(images, unpatchify(content, model.patch_size, model.grid), source)


def masked_pixels(
    model: MaskedImageModel, images: Images, mask: PatchMask, source: ImageSource
) -> tuple[Pixels, Pixels]:
    """Draws images as they are and under their masks, hidden patches in gray.

    Args:
        model: that they are for.
        images: (B, C, H, W), normalised, or patches of several sizes.
        mask: (B, N).
        source: of the images.

    Returns:
        uint8 (B, H, W, C) each, white around images smaller than the largest.
    """
    patches = _patches(model, images)
    gray = torch.full_like(patches, torch.nan)  # see _shown
    hidden = torch.where(mask.is_masked[..., None], gray, patches)
    return _pixels(model, images, patches, source), _pixels(model, images, hidden, source)


def read_images(
    model: MaskedImageModel, config: Config, source: ImageSource, indices: list[int]
) -> tuple[Any, Tensor]:
    """Reads images as the model takes them, on its device, and their sample ids."""
    patch, count = model.patch_size, len(indices)
    (batch,) = eval_loader(source, config.data, batch_size=count, indices=indices, patch_size=patch)
    images = to_device(batch.images, next(model.parameters()).device)
    return normalize(images, source.mean, source.std), batch.sample_ids


@torch.no_grad()
def reconstruct(
    model: MaskedImageModel,
    config: Config,
    source: ImageSource,
    indices: list[int],
    mask: PatchMask | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Predicts the hidden patches of held-out images.

    Args:
        model: to predict with.
        config: of the run.
        source: of the images.
        indices: of n images.
        mask: (n, N); None takes the fixed masks of the model's own generator.

    Returns:
        ``original``, ``masked``, ``prediction`` and ``composite`` (the prediction with the visible
        patches pasted), uint8 (n, H, W, C), white around images smaller than the largest;
        ``is_masked`` bool (n, rows, columns).
    """
    images, sample_ids = read_images(model, config, source, indices)
    training = model.training
    model.eval()
    mask = fixed_masks(model, images, sample_ids) if mask is None else mask.to(images.device)
    output = model(images, mask)
    predicted = model.target.to_pixels(output.prediction, images, output.target)  # (B, N, P)
    model.train(training)
    original, masked = masked_pixels(model, images, mask, source)
    composite = torch.where(mask.is_masked[..., None], predicted, _patches(model, images))
    if isinstance(images, Patches):
        flags = images.with_values(mask.is_masked[..., None]).images((1, 1))
        is_masked = _on_one_size(flags, False)[:, 0]
    else:
        is_masked = mask.is_masked.view(-1, *model.grid).cpu()
    return {
        "original": original,
        "masked": masked,
        "prediction": _pixels(model, images, predicted, source),
        "composite": _pixels(model, images, composite, source),
        "is_masked": is_masked.numpy(),
    }


def reconstruct_ratios(
    model: MaskedImageModel,
    config: Config,
    source: ImageSource,
    indices: list[int],
    ratios: tuple[float, ...] = RATIOS,
) -> dict[str, NDArray[np.generic]]:
    """Predicts under masks of the model's own generator at other ratios.

    Leaves out a ratio that hides nothing or everything on this grid, or that changes nothing.

    Returns:
        ``ratio`` float (R,), ``prediction`` uint8 (R, n, H, W, C), ``is_masked`` bool
        (R, n, rows, columns).
    """
    images, sample_ids = read_images(model, config, source, indices)
    own = model.mask_generator
    seen = {fixed_masks(model, images, sample_ids).is_masked.cpu().numpy().tobytes()}
    found: list[tuple[float, dict[str, NDArray[np.generic]]]] = []
    for ratio in ratios:
        settings = replace(config.mask, ratio=ratio, schedule=MaskScheduleConfig())
        try:
            model.mask_generator = build_mask_generator(settings, model.grid, model.patch_size)
            mask = fixed_masks(model, images, sample_ids)
        except UserError:  # this grid has no such mask
            continue
        finally:
            model.mask_generator = own
        content = mask.is_masked.cpu().numpy().tobytes()
        if content not in seen:
            seen.add(content)
            found.append((ratio, reconstruct(model, config, source, indices, mask)))
    if not found:
        return {}
    arrays = {
        key: np.stack([item[key] for _, item in found]) for key in ("prediction", "is_masked")
    }
    return {"ratio": np.array([ratio for ratio, _ in found]), **arrays}


def _on_one_size(images: list[Tensor], fill: float) -> Tensor:
    """Puts images (C, H_i, W_i) at the top left of canvases of one size: (n, C, H, W)."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    sheet = images[0].new_full((len(images), images[0].shape[0], height, width), fill)
    for canvas, image in zip(sheet, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return sheet.cpu()


def _on_canvas(
    images: Patches, content: Patches, patch_size: tuple[int, int], source: ImageSource
) -> Pixels:
    """Returns (n, H, W, C) uint8, white around the smaller images."""
    shown = [
        torch.from_numpy(_to_uint8(image[None], shown[None], source)[0]).permute(2, 0, 1)
        for image, shown in zip(images.images(patch_size), content.images(patch_size), strict=True)
    ]
    return _on_one_size(shown, 255).permute(0, 2, 3, 1).numpy()


def sheet(columns: Sequence[Pixels], side: int = 96, gap: int = 4) -> Image.Image:
    """Draws one row an image, and its versions side by side.

    Args:
        columns: (n, H, W, C) each.
        side: least height of an image in the sheet; small ones are enlarged.
        gap: white pixels between images.
    """
    count, height, width = columns[0].shape[:3]
    factor = max(1, -(-side // height))
    height, width = height * factor, width * factor
    size = (len(columns) * (width + gap) - gap, count * (height + gap) - gap)
    drawn = Image.new("RGB", size, "white")
    for position, column in enumerate(columns):
        for row, pixels in enumerate(column):
            tile = Image.fromarray(np.ascontiguousarray(as_rgb(pixels)))
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            drawn.paste(tile, (position * (width + gap), row * (height + gap)))
    return drawn


def save_reconstructions(run: Path, arrays: dict[str, NDArray[np.generic]], name: str) -> Path:
    """Writes ``pictures/NAME.png``, and ``reconstructions.npz`` with the same content."""
    path = run / "pictures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    picture = sheet([np.asarray(arrays[column], dtype=np.uint8) for column in COLUMNS])
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))
    save_arrays(run / "reconstructions.npz", arrays)
    return path


def save_arrays(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Writes an ``.npz`` atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_atomic(path, write)
