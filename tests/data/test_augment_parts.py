"""Crops and colours beside torchvision, whose transforms the published protocols name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.data import crop_parameters, eval_transform, train_transform
from mim.data.images.batched import crop_resize
from mim.data.images.transforms import jitter, resize

KEYS = image_keys(0, 0, torch.arange(4000), purpose="augment")


def picture(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    planes = [rows * 5 + columns * 3, rows * columns // 7, 255 - (rows // 3) * (columns // 5)]
    return Image.fromarray((np.stack(planes, 2) % 256).astype(np.uint8))


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (224, 224), (300, 299)])
def test_evaluation_cuts_224_of_256_as_torchvision_does(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    theirs = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])(image)
    (ours,) = eval_transform([image], DataConfig(resize="pil"))  # the default size and crop
    assert (ours.permute(1, 2, 0).numpy() == np.asarray(theirs)).all()


@pytest.mark.parametrize(
    ("size", "given", "share"),
    [
        *((224, None, 0.875), (128, None, 0.875), (96, None, 1.0)),
        *((224, 1.0, 1.0), (32, 0.875, 0.875)),
    ],
)
def test_the_share_that_evaluations_see(size: int, given: Any, share: float) -> None:
    config = DataConfig(image_size=size, eval_crop=given)
    assert config.eval_share == share
    (seen,) = eval_transform([picture(size, size)], config)
    is_whole = (seen.permute(1, 2, 0).numpy() == np.asarray(picture(size, size))).all()
    assert is_whole == (share == 1.0)


@pytest.mark.parametrize("library", ["pil", "torch"])
def test_bilinear_is_the_librarys_own(library: str) -> None:
    images, how = [picture(61, 47), picture(61, 47).rotate(180)], f"{library} bilinear"
    stacked = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)
    boxes = torch.tensor([[5, 3, 50, 41], [0, 0, 20, 30]])
    cut = crop_resize(stacked, boxes, torch.zeros(2, dtype=torch.bool), (32, 32), how)
    for image, (top, left, height, width), row in zip(images, boxes.tolist(), cut, strict=True):
        box = image.crop((left, top, left + width, top + height))
        alone = resize(box, (32, 32), how)
        assert (row.permute(1, 2, 0).numpy() == alone).all()
        theirs = np.asarray(box.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(theirs - alone).max() <= (0 if library == "pil" else 2)


def test_clamped_crops_are_larger() -> None:
    side = torch.full((len(KEYS),), 200)
    areas = {}
    for clamp in (False, True):
        boxes, _ = crop_parameters(KEYS, side, side, scale=(0.08, 1.0), clamp=clamp)
        assert (boxes[:, :2] + boxes[:, 2:] <= 200).all() and (boxes[:, 2:] >= 1).all()
        areas[clamp] = float((boxes[:, 2] * boxes[:, 3]).double().mean()) / 200**2
    # The area of the clamped crop, integrated: sides sqrt(a r) and sqrt(a / r), at most 1.
    area = torch.linspace(0.08, 1, 2001, dtype=torch.float64)[:, None]
    ratio = torch.exp(torch.linspace(np.log(3 / 4), np.log(4 / 3), 2001, dtype=torch.float64))
    exact = ((area * ratio).sqrt().clamp(max=1) * (area / ratio).sqrt().clamp(max=1)).mean()
    assert areas[True] == pytest.approx(float(exact), abs=0.015)
    assert areas[False] < areas[True] - 0.05


def test_a_padded_crop_is_a_window_of_the_reflected_image() -> None:
    config = DataConfig(image_size=24, augment="padded_crop", flip=False)
    image, keys = picture(24, 24), KEYS[:200]
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {
        padded[top : top + 24, left : left + 24].tobytes() for top in range(9) for left in range(9)
    }
    seen = train_transform([image] * 200, keys, config)
    cut = {row.permute(1, 2, 0).contiguous().numpy().tobytes() for row in seen}
    assert cut <= windows and len(cut) > 60  # of 81: on average 74 are drawn
    mirrored = train_transform([image] * 200, keys, dataclasses.replace(config, flip=True))
    flipped = [bool((a.flip(-1) == b).all()) for a, b in zip(seen, mirrored, strict=True)]
    assert 60 < sum(flipped) < 140


def test_the_jitter_is_torchvisions_with_the_factors_of_the_key() -> None:
    pixels = torch.from_numpy(np.asarray(picture(40, 30)).copy()).permute(2, 0, 1)
    seen = set()
    for key in KEYS[:50]:
        changed = torch.from_numpy(jitter(picture(40, 30), key, 0.4)).permute(2, 0, 1)
        assert not torch.equal(changed, pixels)
        seen.add(round(float(changed.float().mean() / pixels.float().mean()), 3))
    assert min(seen) < 0.75 and max(seen) > 1.1 and len(seen) > 30
    assert (jitter(picture(40, 30), KEYS[0], 1e-9) == np.asarray(picture(40, 30))).mean() > 0.99
    config = DataConfig(image_size=40, augment="none", color_jitter=0.4)
    one, same = (train_transform([picture(40, 40)], KEYS[:1], config) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, eval_transform([picture(40, 40)], config))


@pytest.mark.parametrize(
    "given",
    [
        *({"color_jitter": 0.4, "channels": 1}, {"color_jitter": 0.4, "cache": "device"}),
        *({"aspect": "keep", "color_jitter": 0.4}, {"aspect": "keep", "augment": "padded_crop"}),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs data"):
        DataConfig(**given)
