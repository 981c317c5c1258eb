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
from mim.core.errors import UserError
from mim.core.patches import Images, Patches, patchify, unpatchify
from mim.core.rng import image_keys
from mim.data import ImageSource, denormalize, eval_loader, normalize
from mim.masks import PatchMask
from mim.masks.generators import build_mask_generator
from mim.model import MaskedImageModel
from mim.training.checkpoint import write_atomic

# Held-out losses and pictures use one fixed mask an image, the same in every run and epoch.
FIXED_SEED, FIXED_EPOCH = 0, -1
COLUMNS = ("original", "masked", "prediction", "composite")
RATIOS = (0.25, 0.5, 0.75, 0.9)
"""Shares of hidden patches under which a finished run is pictured besides its own."""
Pixels = NDArray[np.uint8]


def fixed_masks(
    model: MaskedImageModel, images: Images, sample_ids: Tensor, epoch: int = FIXED_EPOCH
) -> PatchMask:
    """The masks under which held-out images (B, C, H, W), normalised, are always seen.

    Another ``epoch`` shows a ratio that moves as it is then.
    """
    keys = image_keys(FIXED_SEED, epoch, sample_ids, purpose="mask")
    return model.draw_mask(images, keys, epoch=epoch, sample_ids=sample_ids)


def spread_indices(count: int, images: int) -> list[int]:
    """Indices of ``images`` images spread evenly over ``count``."""
    return torch.linspace(0, count - 1, min(images, count)).round().long().tolist()


def as_rgb(pixels: Pixels) -> Pixels:
    """(..., C) of any channels as (..., 3): the first three, or the first alone in gray."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)


def _to_uint8(images: Tensor, source: ImageSource) -> Pixels:
    shown = denormalize(images.float().cpu(), source.mean, source.std).clamp(0, 1)
    return (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


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
        return _on_canvas(images.with_values(content), model.patch_size, source)
    return _to_uint8(unpatchify(content, model.patch_size, model.grid), source)


def masked_pixels(
    model: MaskedImageModel, images: Images, mask: PatchMask, source: ImageSource
) -> tuple[Pixels, Pixels]:
    """Images as they are and under their masks, hidden patches in gray.

    Args:
        model: that they are for.
        images: (B, C, H, W), normalised, or patches of several sizes.
        mask: (B, N).
        source: of the images.

    Returns:
        uint8 (B, H, W, C) each, white around images smaller than the largest.
    """
    patches = _patches(model, images)
    gray = torch.zeros_like(patches)  # the mean colour
    hidden = torch.where(mask.is_masked[..., None], gray, patches)
    return _pixels(model, images, patches, source), _pixels(model, images, hidden, source)


def _read(
    model: MaskedImageModel, config: Config, source: ImageSource, indices: list[int]
) -> tuple[Any, Tensor]:
    """Images as the model takes them, on its device, and their ids."""
    patch, count = model.patch_size, len(indices)
    (batch,) = eval_loader(source, config.data, batch_size=count, indices=indices, patch_size=patch)
    images = batch.images.to(next(model.parameters()).device)
    return normalize(images, source.mean, source.std), batch.sample_ids


@torch.no_grad()
def reconstruct(
    model: MaskedImageModel,
    config: Config,
    source: ImageSource,
    indices: list[int],
    mask: PatchMask | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Original, masked, predicted and composed images.

    Args:
        model: the model; its mode is left as it was.
        config: of the run.
        source: held-out images.
        indices: which of them.
        mask: (n, N), other masks than the fixed ones of the model's own generator.

    Returns:
        ``original``, ``masked``, ``prediction`` and ``composite`` (the prediction with the visible
        patches pasted), uint8 (n, H, W, C), white around images smaller than the largest;
        ``is_masked`` bool (n, rows, columns).
    """
    images, sample_ids = _read(model, config, source, indices)
    training = model.training
    model.eval()
    mask = fixed_masks(model, images, sample_ids) if mask is None else mask.to(images.device)
    output = model(images, mask)
    predicted = model.target.to_pixels(output.prediction, images, output.target)  # (B, N, P)
    model.train(training)
    own = images if isinstance(images, Patches) else None
    original, masked = masked_pixels(model, images, mask, source)
    arrays: dict[str, NDArray[np.generic]] = {"original": original, "masked": masked}
    patches = _patches(model, images)
    composite = torch.where(mask.is_masked[..., None], predicted, patches)
    for name, content in (("prediction", predicted), ("composite", composite)):
        arrays[name] = _pixels(model, images, content, source)
    if own is None:
        arrays["is_masked"] = mask.is_masked.view(-1, *model.grid).cpu().numpy()
    else:
        flags = own.with_values(mask.is_masked[..., None])
        arrays["is_masked"] = _spread(flags.images((1, 1)), False)[:, 0].numpy()
    return arrays


def reconstruct_ratios(
    model: MaskedImageModel,
    config: Config,
    source: ImageSource,
    indices: list[int],
    ratios: tuple[float, ...] = RATIOS,
) -> dict[str, NDArray[np.generic]]:
    """Predictions under the model's own generator, trained as it is, at other ratios.

    A ratio that hides nothing or everything on this grid, or that changes nothing (masks from a
    file), is left out.

    Returns:
        ``ratio`` float (R,), ``prediction`` uint8 (R, n, H, W, C), ``is_masked`` bool
        (R, n, rows, columns).
    """
    images, sample_ids = _read(model, config, source, indices)
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


def _spread(images: list[Tensor], fill: float) -> Tensor:
    """Images (C, H_i, W_i) on canvases of one size, top left: (n, C, H, W)."""
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    sheet = images[0].new_full((len(images), images[0].shape[0], height, width), fill)
    for canvas, image in zip(sheet, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return sheet.cpu()


def _on_canvas(images: Patches, patch_size: tuple[int, int], source: ImageSource) -> Pixels:
    """(n, H, W, C) uint8, white around the smaller images."""
    shown = [
        torch.from_numpy(_to_uint8(image[None], source)[0]).permute(2, 0, 1)
        for image in images.images(patch_size)
    ]
    return _spread(shown, 255).permute(0, 2, 3, 1).numpy()


def sheet(columns: Sequence[Pixels], side: int = 96, gap: int = 4) -> Image.Image:
    """A row an image, and its versions side by side.

    Args:
        columns: (n, H, W, C) each.
        side: least height of an image in the sheet, in pixels; small ones are enlarged.
        gap: white pixels between images.
    """
    count, height, width = columns[0].shape[:3]
    factor = max(1, -(-side // height))
    height, width = height * factor, width * factor
    size = (len(columns) * (width + gap) - gap, count * (height + gap) - gap)
    drawn = Image.new("RGB", size, "white")
    for place, column in enumerate(columns):
        for row, pixels in enumerate(column):
            tile = Image.fromarray(np.ascontiguousarray(as_rgb(pixels)))
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            drawn.paste(tile, (place * (width + gap), row * (height + gap)))
    return drawn


def picture(arrays: dict[str, NDArray[np.generic]]) -> Image.Image:
    """A sheet of what :func:`reconstruct` gives: original, masked, prediction, composite."""
    return sheet([np.asarray(arrays[name], dtype=np.uint8) for name in COLUMNS])


def save_reconstructions(run: Path, arrays: dict[str, NDArray[np.generic]], name: str) -> Path:
    """Write ``pictures/NAME.png``, and ``reconstructions.npz`` with the same content."""
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.png"
    sheet = picture(arrays)
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))
    save_arrays(run / "reconstructions.npz", arrays)
    return path


def save_arrays(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Write an ``.npz``, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_atomic(path, write)
