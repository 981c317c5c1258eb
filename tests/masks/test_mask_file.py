"""Masks from files: how they are read, reduced to patches, given to images, and refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim import load_config
from mim.core.config import DataConfig, FileMaskConfig, MaskConfig
from mim.core.errors import UserError
from mim.core.rng import image_keys, name_to_int
from mim.data.sources.folder import ImageFolder
from mim.masks import PatchMask, build_mask_generator, sample_masks
from mim.model import build_model

GRID = (2, 3)
MASK = np.array([[1, 0, 0], [0, 1, 1]])
FLAT = [True, False, False, False, True, True]


def config(path: Path | str | None, share: float = 0.5, **other: Any) -> MaskConfig:
    file = FileMaskConfig(None if path is None else str(path), share)
    return MaskConfig(name="file", file=file, **other)


def draw(path: Path, ids: list[int], share: float = 0.5, **other: Any) -> PatchMask:
    return sample_masks(config(path, share, **other), GRID, seed=0, epoch=0, sample_ids=ids)


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        with path.open("wb") as stream:
            np.save(stream, values)
    else:
        Image.fromarray(values).save(path, format="PNG")
    return path


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_true_and_one_hide(tmp_path: Path, dtype: type) -> None:
    mask = draw(save(tmp_path / "a.npy", MASK.astype(dtype)), [5, -7, 2**60])
    assert mask.is_masked.tolist() == [FLAT] * 3
    assert mask.is_equal and mask.num_masked == 3


def pictures() -> dict[str, Image.Image]:
    gray = Image.fromarray((MASK * 255).astype(np.uint8))
    return {
        "gray": gray,
        "two_levels": gray.convert("1"),
        "colour": gray.convert("RGB"),
        "palette": gray.convert("P"),
        "ones": Image.fromarray(MASK.astype(np.uint8)),
    }


@pytest.mark.parametrize("kind", pictures())
def test_white_hides(tmp_path: Path, kind: str) -> None:
    pictures()[kind].save(tmp_path / "a.png")
    assert draw(tmp_path / "a.png", [0, 1]).is_masked.tolist() == [FLAT] * 2


def test_pixels_are_reduced_by_the_share(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12), dtype=bool)  # patches of 2 x 4
    pixels[0, :4] = True  # patch 0: a half
    pixels[0, 4:7] = True  # patch 1: three eighths
    pixels[2:, 8:] = True  # patch 5: all
    for path in (
        save(tmp_path / "a.npy", pixels),
        save(tmp_path / "a.png", pixels.astype(np.uint8) * 255),
    ):
        for share, hidden in ((0.5, [0, 5]), (0.375, [0, 1, 5]), (0.51, [5]), (1.0, [5])):
            mask = draw(path, [0], share)
            assert mask.masked_ids.tolist() == [hidden], share


def test_the_ratio_and_the_keys_play_no_part(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", MASK)
    for ratio in (0.001, 0.999, (0.1, 0.2)):
        assert draw(path, [0], ratio=ratio).is_masked.tolist() == [FLAT]
    generator = build_mask_generator(config(path), GRID)
    one, two = (generator(GRID, image_keys(seed, seed, [1, 2])) for seed in (0, 1))
    assert torch.equal(one.is_masked, two.is_masked)
    with pytest.raises(TypeError, match="keys"):
        generator(GRID)  # type: ignore[call-arg]


def test_a_mask_for_each_position(tmp_path: Path) -> None:
    stack = np.stack([MASK, 1 - MASK, np.eye(2, 3)])
    path = save(tmp_path / "a.npy", stack)
    mask = draw(path, [2, 0, 1, 0])
    assert mask.is_masked.int().tolist() == stack[[2, 0, 1, 0]].reshape(4, 6).astype(int).tolist()
    assert not mask.is_equal
    one = save(tmp_path / "one.npy", MASK[None])  # three dimensions are per image, even if one
    assert draw(one, [0]).is_masked.tolist() == [FLAT]
    for file, wrong in ((path, 3), (path, -1), (one, 1), (path, 2**62)):
        with pytest.raises(UserError, match=rf"mask\.file\.path: .* id {wrong}$"):
            draw(file, [0, wrong])
    generator = build_mask_generator(config(path), GRID)
    with pytest.raises(UserError, match=r"mask\.file\.path: .*sample_ids"):
        generator(GRID, image_keys(0, 0, [0]))


def test_a_stack_of_pixel_masks_is_reduced(tmp_path: Path) -> None:
    stack = np.stack([MASK, 1 - MASK]).repeat(4, axis=1).repeat(2, axis=2)
    path = save(tmp_path / "a.npy", stack)
    assert draw(path, [1, 0]).is_masked.tolist() == [[not flag for flag in FLAT], FLAT]


@pytest.mark.parametrize("divided", [True, False], ids=["train_and_val", "one_part"])
def test_a_folder_mirrors_the_image_folder(tmp_path: Path, divided: bool) -> None:
    """Whatever an image folder names its images by finds its mask."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    part = "train/" if divided else ""
    names = ["cat/one.jpg", "cat/deep/two.PNG", "dog/three.Jpeg", "dog/f.o.u.r.tiff"]
    flags = np.random.default_rng(0).permutation(np.eye(6, dtype=np.uint8))[:4].reshape(4, 2, 3)
    for number, name in enumerate(names):
        image = images / f"{part}{name}"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(image, format="PNG")
        stem = f"{part}{name.rpartition('.')[0]}"
        if number % 2:
            save(masks / f"{stem}.npy", flags[number])
        else:
            save(masks / f"{stem}.PNG", flags[number] * 255)
    (masks / "README.txt").write_text("no mask")
    if divided:
        (images / "val/cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(images / "val/cat/five.png")
    source = ImageFolder(DataConfig(source="imagefolder", path=str(images)), "train")
    assert len(source) == 4
    mask = draw(masks, source.sample_ids.tolist())
    for index in range(4):
        name = source.path(index).relative_to(images / part).as_posix()
        expected = flags[names.index(name)].flatten().tolist()
        assert mask.is_masked[index].int().tolist() == expected
    unknown = name_to_int("train/cat/none.jpg")
    with pytest.raises(UserError, match=rf"has no mask for the image with id {unknown}$"):
        draw(masks, [int(source.sample_ids[0]), unknown])


def test_files_are_read_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", MASK)
    generator = build_mask_generator(config(path), GRID)
    path.unlink()
    assert generator(GRID, image_keys(0, 0, [3])).is_masked.tolist() == [FLAT]


def refused(path: Path | str | None, message: str) -> None:
    """Refused when the config is read, and by a generator that was not checked."""
    with pytest.raises(UserError, match=message) as error:
        build_mask_generator(config(path), GRID)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        build_mask_generator(config(path))(GRID, image_keys(0, 0, [0]), sample_ids=torch.zeros(1))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    refused(None, r"mask\.file\.path: None is needed by mask\.name=file")
    refused(tmp_path / "none.npy", r"mask\.file\.path: '.*none\.npy' is no file or folder")
    refused(tmp_path, r"mask\.file\.path: .* has no \.npy or \.png in it")
    (tmp_path / "a.jpg").touch()
    refused(tmp_path / "a.jpg", r"mask\.file\.path: .* neither a folder nor an \.npy or \.png")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((3, 3)), r"shape 3 x 3, whose sides are no multiples of the grid's 2 x 3"),
        (np.ones((2, 7)), r"shape 2 x 7, whose sides"),
        (np.ones((3, 2)), r"shape 3 x 2, whose sides"),
        (np.ones((1, 1)), r"shape 1 x 1, whose sides"),
        (np.ones((5, 3, 3)), r"shape 3 x 3, whose sides"),
        (np.ones(6), r"shape 6; a mask is \(rows, columns\) or \(images, rows, columns\)"),
        (np.ones((1, 2, 3, 1)), r"shape 1 x 2 x 3 x 1; a mask is"),
        (np.ones((0, 3)), r"shape 0 x 3; a mask is"),
        (np.array(1), r"shape \(\); a mask is"),
        (MASK * 2, r"holds the value 2; a mask holds 0 and 1$"),
        (MASK * 255, r"holds the value 255; a mask holds 0 and 1$"),
        (MASK * 0.5, r"holds the value 0\.5; a mask holds 0 and 1$"),
        (-MASK, r"holds the value -1"),
        (np.where(MASK, np.nan, 0), r"holds the value nan"),
        (MASK.astype(complex), r"holds complex128; a mask holds booleans, or 0 and 1"),
        (MASK.astype(str), r"holds <U\d+; a mask holds booleans"),
        (MASK.astype(object), r"cannot be read: Object arrays"),
        (np.zeros((2, 3)), r"hides no patch of a grid of 2 x 3"),
        (np.ones((2, 3)), r"hides every patch of a grid of 2 x 3"),
        (np.stack([MASK, MASK * 0]), r"\[1\]' hides no patch of a grid of 2 x 3"),
    ],
)
def test_an_array_that_is_no_mask_is_refused(
    tmp_path: Path, values: np.ndarray, message: str
) -> None:
    path = tmp_path / "a.npy"
    np.save(path, values, allow_pickle=True)
    refused(path, rf"mask\.file\.path: '{re.escape(str(path))}.*{message}")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("RGBA", (3, 2)), "cannot be read: it has transparency"),
        (Image.new("LA", (3, 2)), "cannot be read: it has transparency"),
        (Image.new("RGB", (3, 2), "red"), "cannot be read: it has colours"),
        (Image.new("L", (3, 2), 128), r"holds the value 128; a mask holds black and white"),
        (Image.new("L", (3, 2), 255), "hides every patch"),
        (Image.new("L", (3, 2), 0), "hides no patch"),
        (Image.new("L", (2, 3), 255), "has shape 3 x 2, whose sides are no multiples"),
    ],
)
def test_a_picture_that_is_no_mask_is_refused(
    tmp_path: Path, picture: Image.Image, message: str
) -> None:
    picture.save(tmp_path / "a.png")
    refused(tmp_path / "a.png", rf"mask\.file\.path: .*a\.png' {message}")


def test_black_white_and_one_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 1, 255]] * 2, dtype=np.uint8))
    refused(path, "holds the value 1; a mask holds black and white")


@pytest.mark.parametrize("content", [b"", b"no mask", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04."])
@pytest.mark.parametrize("ending", ["npy", "png"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    refused(path, r"mask\.file\.path: .* cannot be read: ")


def test_an_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", MASK)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    refused(tmp_path / "a.npy", "holds no array")


def test_a_bad_mask_of_a_folder_is_named(tmp_path: Path) -> None:
    save(tmp_path / "cat/one.npy", MASK)
    bad = save(tmp_path / "dog/two.npy", MASK * 0)
    refused(tmp_path, r"mask\.file\.path: '.*dog/two\.npy' hides no patch")
    save(bad, MASK[None])
    refused(tmp_path, r"'.*dog/two\.npy' has shape 1 x 2 x 3; a mask in a folder is")
    save(bad, MASK[:, :2])
    refused(tmp_path, r"'.*dog/two\.npy' has shape 2 x 2, whose sides are no multiples")
    save(bad, MASK)
    save(tmp_path / "dog/two.png", (MASK * 255).astype(np.uint8))
    refused(tmp_path, r"has two masks for one image, dog/two\.npy and dog/two\.png")


# --- Through a config ----------------------------------------------------------------------------


def test_masks_for_each_image_are_read_with_the_config(tmp_path: Path) -> None:
    flags = np.zeros((2000, 4, 4), dtype=bool)
    flags[:, :2] = True
    np.save(tmp_path / "each.npy", flags)
    small = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    settings = {
        "data.source": "digits",
        "data.image_size": 8,
        "data.channels": 1,
        "mask.name": "file",
        "mask.file.path": str(tmp_path / "each.npy"),
        "model.backbone_args": small,
    }
    config = load_config(None, settings)  # checked on the meta device
    model = build_model(config)
    ids = torch.tensor([3, 1000])
    mask = model.draw_mask(torch.zeros(2, 1, 8, 8), image_keys(0, 0, ids), sample_ids=ids)
    assert torch.equal(mask.is_masked, torch.from_numpy(flags[[3, 1000]]).flatten(1))
    missing = model.mask_generator.missing((4, 4), torch.tensor([5, 2000, 7, -1]))
    assert missing.tolist() == [1, 3]
    with pytest.raises(ValueError, match="2 keys and 3 sample_ids"):
        model.mask_generator((4, 4), image_keys(0, 0, ids), sample_ids=torch.arange(3))
