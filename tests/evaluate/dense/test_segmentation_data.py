"""Images with masks: pairing, labels, void, torchvision's sets, and every bad input."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import BatchLoader
from mim.evaluate.dense.segmentation_data import (
    VOID,
    MaskedBatch,
    SegmentationBatches,
    SegmentationSpec,
    SegmentationSubset,
    open_segmentation,
    pair,
)

CLASSES = ("left", "right")


def scene(root: Path, part: str, name: str, labels: np.ndarray, ending: str = "png") -> None:
    """An image whose red channel is 100 times its label, and its mask."""
    for kind in ("images", "masks"):
        (root / kind / part).mkdir(parents=True, exist_ok=True)
    red = (np.where(labels == 9, 0, labels) * 100).astype(np.uint8)
    image = Image.fromarray(np.stack([red, red * 0, red * 0], axis=2))
    image.save(root / "images" / part / f"{name}.{ending}")
    Image.fromarray(labels.astype(np.uint8)).save(root / "masks" / part / f"{name}.png")


def halves(height: int = 12, width: int = 16, void: bool = True) -> np.ndarray:
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 1
    if void:
        labels[0] = 9
    return labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 6), ("val", 3)):
        for number in range(count):
            scene(tmp_path, part, f"scene_{number}", halves())
    return tmp_path


def spec(folder: Path, **changes: object) -> SegmentationSpec:
    settings = {"path": str(folder), "classes": CLASSES, "void": 9, **changes}
    return SegmentationSpec(**settings)  # type: ignore[arg-type]


def test_folders(folder: Path) -> None:
    train, val = (open_segmentation(spec(folder), part) for part in ("train", "val"))  # type: ignore[arg-type]
    assert (len(train), len(val)) == (6, 3)
    assert not set(train.sample_ids.tolist()) & set(val.sample_ids.tolist())
    expected = halves().astype(np.int32)
    expected[0] = VOID
    assert (train.mask(4) == expected).all()
    few = SegmentationSubset(train, torch.tensor([4, 1]))
    assert few.sample_ids.tolist() == train.sample_ids[[4, 1]].tolist()
    assert few.describe(0).endswith("scene_4.png") and (few.mask(0) == expected).all()


def test_stems_are_the_same_in_either_spelling(folder: Path) -> None:
    for kind, form in (("images", "NFC"), ("masks", "NFD")):
        path = next((folder / kind / "train").glob("scene_4.*"))
        path.rename(path.with_stem(unicodedata.normalize(form, "B\u00e4r")))
    assert len(open_segmentation(spec(folder), "train")) == 6


def test_a_palette_counts_by_index(folder: Path) -> None:
    path = folder / "masks/train/scene_2.png"
    palette = Image.fromarray(halves()).convert("P")
    indices = Image.new("P", palette.size)
    indices.putpalette([255, 0, 0, 0, 255, 0] + [7] * 762)
    indices.putdata(halves().flatten().tolist())
    indices.save(path)
    assert (open_segmentation(spec(folder), "train").mask(2)[1:] == halves()[1:]).all()


def test_views_keep_image_and_mask_together(folder: Path) -> None:
    source = open_segmentation(spec(folder), "train")
    data = DataConfig(image_size=(12, 12), batch_size=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = SegmentationBatches(source, data, 0, 0, (0.5, 2.0), (0, 200, 0))
    assert batches.per_epoch == 2
    for step in range(8):
        batch = batches.batch(step)
        assert batch.images.shape == (3, 3, 12, 12) and batch.masks.shape == (3, 12, 12)
        padded = batch.images[:, 1] == 200  # green is 0 in the images
        assert (batch.masks[padded] == VOID).all()
        counted = batch.masks != VOID
        red = batch.images[:, 0].float() / 100
        wrong = ((red - batch.masks).abs() > 0.5) & counted
        assert wrong.float().mean() < 0.05  # where the two halves meet


def test_batches_do_not_depend_on_workers_or_batch_size(folder: Path) -> None:
    source = open_segmentation(spec(folder), "train")

    def drawn(batch_size: int, workers: int) -> dict[tuple[int, int], MaskedBatch]:
        data = DataConfig(image_size=8, batch_size=batch_size, workers=workers)
        batches = SegmentationBatches(source, data, 3, 0, (0.5, 2.0), (0, 0, 0))
        found = {}
        for batch in BatchLoader(batches, range(12 // batch_size), workers=workers):
            assert isinstance(batch, MaskedBatch)
            for row, sample in enumerate(batch.sample_ids.tolist()):
                found[batch.epoch, sample] = batch.images[row], batch.masks[row]
        return found

    one, other = drawn(2, 0), drawn(3, 1)
    assert one.keys() == other.keys() and len(one) == 12
    for key, (image, mask) in one.items():
        assert torch.equal(image, other[key][0]) and torch.equal(mask, other[key][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "evaluations.segment.path: '' is needed"),
        ({"path": "nowhere"}, "has no folder"),
        ({"classes": ()}, "must name the classes in order; masks hold 0, 1, 9"),
        ({"classes": ("one",)}, "must name 2 classes at least"),
        ({"void": 1}, "is the label of the class 'right' too"),
        ({"classes": (*CLASSES, "sky")}, "no mask of train has a pixel of 'sky', whose label is 2"),
        ({"void": 255}, "has the label 9; known are 0 to 1, and 255 is void"),
        ({"source": "folder"}, "did you mean 'folders'?"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_segmentation(spec(folder, **changes), "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files(folder: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as caught:
            open_segmentation(spec(folder), "train")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    mask = folder / "masks/train/scene_1.png"
    good = mask.read_bytes()
    labels = halves()
    labels[5, 5] = 7
    Image.fromarray(labels).save(mask)
    assert f"{mask} has the label 7; known are 0 to 1, and 9 is void" in message()
    Image.new("RGB", (16, 12)).save(mask)
    assert f"{mask} is an image of mode RGB; a mask holds one label a pixel" in message()
    Image.new("L", (15, 12)).save(mask)
    assert f"scene_1.png is 16 x 12 pixels, its mask {mask} 15 x 12" in message()
    mask.write_bytes(good[:40])
    assert f"{mask} cannot be read as an image" in message()
    mask.unlink()
    assert "scene_1.png but no mask of that stem" in message()
    mask.write_bytes(good)
    (folder / "images/train/scene_3.png").unlink()
    assert "scene_3.png but no image of that stem" in message()
    (folder / "images/train/scene_2.jpg").write_bytes(b"")
    assert "two files of one stem" in message()


def test_voc_and_pets_of_torchvision(tmp_path: Path) -> None:
    voc = tmp_path / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    (voc / "ImageSets/Segmentation/train.txt").write_text("a\n")
    labels = halves(void=False)
    labels[:, 8:] = 15
    labels[0] = 255
    labels[2:4, 2:12].flat = range(1, 21)
    Image.new("RGB", (16, 12)).save(voc / "JPEGImages/a.jpg")
    Image.fromarray(labels).save(voc / "SegmentationClass/a.png")
    where = {"path": str(tmp_path), "download": False}
    source = open_segmentation(SegmentationSpec("torchvision/VOCSegmentation", **where), "train")  # type: ignore[arg-type]
    assert source.classes[15] == "person" and len(source.classes) == 21
    assert source.mask(0)[:, 0].tolist() == [VOID] + [0] * 11 and source.mask(0)[1, 9] == 15

    pets = tmp_path / "oxford-iiit-pet"
    (pets / "annotations/trimaps").mkdir(parents=True)
    (pets / "images").mkdir()
    (pets / "annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\n")
    Image.new("RGB", (16, 12)).save(pets / "images/Abyssinian_1.jpg")
    trimap = halves(void=False) + 1
    trimap[0] = 3
    Image.fromarray(trimap).save(pets / "annotations/trimaps/Abyssinian_1.png")
    source = open_segmentation(SegmentationSpec("torchvision/OxfordIIITPet", **where), "train")  # type: ignore[arg-type]
    assert source.mask(0)[1:].tolist() == halves()[1:].tolist()  # pet 0, background 1
    assert (source.mask(0)[0] == VOID).all()
    for changes, message in (
        ({"classes": ("cat", "dog")}, "do not match those of torchvision/OxfordIIITPet"),
        ({"path": str(tmp_path / "empty")}, "download is false"),
    ):
        given = SegmentationSpec("torchvision/OxfordIIITPet", **{**where, **changes})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            open_segmentation(given, "train")


def test_masks_of_0_and_255(folder: Path) -> None:
    """What is meant as the foreground is void, where 255 is."""
    for path in folder.glob("masks/*/*.png"):
        Image.fromarray(halves(void=False) * 255).save(path)
    with pytest.raises(UserError, match=r"no mask of train has a pixel of 'right'.*255 is void"):
        open_segmentation(spec(folder, void=255), "train")
    assert len(open_segmentation(spec(folder, void=255), "val")) == 3, "val may lack a class"
    for path in folder.glob("masks/val/*.png"):
        Image.new("L", (16, 12), 255).save(path)
    with pytest.raises(UserError, match=r"segment\.void: all pixels of the masks of val are void"):
        open_segmentation(spec(folder, void=255), "val")


@pytest.mark.parametrize(
    ("orientation", "on_stored"), [(1, True), (0, True), (3, True), (6, True), (6, False)]
)
def test_an_image_that_exif_turns(folder: Path, orientation: int, on_stored: bool) -> None:
    """A mask of the picture as stored is refused; one of the picture as seen is taken."""
    path = folder / "images/train/scene_1.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)
    if not on_stored:
        Image.fromarray(halves(16, 12)).save(folder / "masks/train/scene_1.png")
    if on_stored and orientation > 1:
        with pytest.raises(UserError, match=r"scene_1\.png is turned by its EXIF orientation"):
            open_segmentation(spec(folder), "train")
    else:
        image, mask = pair(open_segmentation(spec(folder), "train"), 1, 3)
        assert image.size == mask.size == ((16, 12) if on_stored else (12, 16))
