"""Images at their own aspect ratio: sizes, the augmentation, batches."""

from __future__ import annotations

import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.patches import Patches, patchify
from mim.data import Batch, ImageSource, eval_loader, normalize, open_source, train_loader
from mim.data.images.own_sizes import own_grid

SIZES = [(40, 60), (64, 32), (33, 47), (120, 24), (32, 32), (90, 91), (24, 200), (50, 75)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        small = generator.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((width, height)).save(path)
    return DataConfig(
        source="imagefolder",
        path=str(tmp_path),
        aspect="keep",
        max_patches=24,
        batch_size=4,
        val_fraction=0.01,
    )


def loaded(config: DataConfig, patch: int = 8, **process: Any) -> list[Batch]:
    source = open_source(config, "train")
    size = (patch, patch)
    options = {"start_step": 0, "total_steps": 3, "patch_size": size, **process}
    return list(train_loader(source, config, 0, **options))


def test_sizes_follow_the_image() -> None:
    for height, width in ((224, 224), (375, 500), (500, 375), (64, 1000), (9, 8)):
        rows, columns = own_grid(height, width, (8, 8), 100)
        assert rows * columns <= 100
        whole = -(-height // 8), -(-width // 8)
        if whole[0] * whole[1] <= 100:  # never larger than its last patch needs
            assert (rows, columns) == whole
        else:  # as many patches as its shape allows
            assert (rows + 1) * (columns + 1) > 100
            assert abs(rows / columns - height / width) < 0.5 * max(rows, columns) / columns
    assert own_grid(16, 800, (16, 16), 10) == (1, 10)


def test_an_image_of_whole_patches_is_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (2, 16, 24, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    config = DataConfig(source="imagefolder", path=str(tmp_path), aspect="keep")
    source = open_source(config, "train")
    (batch,) = eval_loader(source, config, patch_size=(8, 8))
    assert batch.images.grids == ((2, 3),)
    image = torch.from_numpy(np.asarray(source.image(0))).permute(2, 0, 1)
    assert torch.equal(batch.images.values, patchify(image[None], (8, 8)))
    values = normalize(batch.images, source.mean, source.std).values
    expected = patchify(normalize(image[None], source.mean, source.std), (8, 8))
    assert torch.equal(values, expected)


def rows_of(batches: list[Batch]) -> dict[tuple[int, int], tuple[Any, Tensor]]:
    """(epoch, sample id) -> grid and patches."""
    return {
        (batch.epoch, sample): (grid, values[: grid[0] * grid[1]])
        for batch in batches
        for sample, grid, values in zip(
            batch.sample_ids.tolist(), batch.images.grids, batch.images.values, strict=True
        )
    }


def test_an_image_is_cut_alike_in_any_batch(config: DataConfig) -> None:
    config = replace(config, batch_size=6)
    whole = loaded(config, total_steps=3)
    shares = [b for rank in (0, 1) for b in loaded(config, total_steps=3, rank=rank, world=2)]
    several = loaded(replace(config, workers=1), total_steps=3)
    expected = rows_of(whole)
    assert len({grid for grid, _ in expected.values()}) > 3
    for other in (shares, several):
        found = rows_of(other)
        assert found.keys() == expected.keys()
        for key, (grid, values) in found.items():
            assert grid == expected[key][0] and torch.equal(values, expected[key][1])


def test_crops_keep_the_proportions_and_are_mirrored_by_half(config: DataConfig) -> None:
    config = replace(config, max_patches=10_000, crop_scale=(0.25, 0.25), batch_size=7)
    batches = loaded(config, patch=1, total_steps=9)
    source = open_source(config, "train")
    sizes = {
        int(source.sample_ids[i]): (source.image(i).height, source.image(i).width)  # type: ignore[union-attr]
        for i in range(len(source))
    }
    for batch in batches:
        for sample, grid in zip(batch.sample_ids.tolist(), batch.images.grids, strict=True):
            assert grid == tuple(round(side / 2) for side in sizes[sample])
    plain = loaded(replace(config, flip=False), patch=1, total_steps=9)
    same = mirrored = 0
    for batch, other in zip(batches, plain, strict=True):
        for one, two in zip(batch.images.images((1, 1)), other.images.images((1, 1)), strict=True):
            same += torch.equal(one, two)
            mirrored += torch.equal(one.flip(-1), two)
    assert same + mirrored == 63 and min(same, mirrored) > 15


def test_batches_are_moved_and_cut(config: DataConfig) -> None:
    images = loaded(config)[0].images
    assert images.values.dtype == torch.uint8 and len(images) == 4
    assert images.valid.sum(1).tolist() == images.lengths
    part = images[1:3]
    assert part.grids == images.grids[1:3] and len(part) == 2
    assert len(loaded(config)[0].to("cpu")) == 4
    normal = normalize(images, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    assert (normal.values[~images.valid] == 0).all() and normal.values.dtype == torch.float32
    joined = Patches.cat([part, images])
    assert joined.grids == (*part.grids, *images.grids)


def test_an_image_smaller_than_a_patch_is_refused(config: DataConfig) -> None:
    with pytest.raises(
        UserError, match=r"data.aspect: .* train/\w/\d.png has \d+ x \d+ pixels, less than a patch"
    ):
        loaded(config, patch=64)


def test_a_patch_size_is_needed(config: DataConfig) -> None:
    with pytest.raises(ValueError, match="pass patch_size"):
        loaded(config, patch_size=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aspect": "kept"}, r"data.aspect: 'kept' is not one of keep, square"),
        ({"batching": "ragged"}, "data.batching"),
        ({"max_patches": 0}, "data.max_patches: 0 must be at least 1"),
        ({"batching": "packed"}, "data.batching: 'packed' needs data.aspect=keep"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**change)


def test_real_photographs(tmp_path: Path) -> None:
    archive = Path(os.environ.get("MIM_TEST_DATA", "../shared/data")) / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()][:12]
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            path = tmp_path / member.name.replace("val/", "train/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
    config = DataConfig(
        source="imagefolder", path=str(tmp_path), aspect="keep", max_patches=64, batch_size=8
    )
    source: ImageSource = open_source(config, "train")
    (batch,) = train_loader(source, config, 0, start_step=0, total_steps=1, patch_size=(16, 16))
    grids = batch.images.grids
    assert len({*grids}) > 1 and all(32 <= rows * columns <= 64 for rows, columns in grids)
    assert batch.images.values[batch.images.valid].float().std() > 20
