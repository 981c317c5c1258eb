"""Images of more than 8 bits: values kept, ranges, channels, pages, and one reader for all."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import eval_loader, normalize, open_source, train_loader
from mim.data.images.decode import UnreadableImage, decode, is_deep
from mim.data.images.deep import Depth, channels_last
from mim.training.loading import load

SIZE = 8


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(values: NDArray[Any], **arrays: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, values, **arrays) if arrays else np.save(file, values)
    return file.getvalue()


def ramp(top: float, dtype: Any) -> NDArray[Any]:
    return np.linspace(0, top, SIZE * SIZE).reshape(SIZE, SIZE).astype(dtype)


def twelve_bits(root: Path, count: int, folders: tuple[str, ...] = ("",)) -> Path:
    """One-channel 16-bit TIFFs of 12 bits, whose values span 400 to 4000."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / folders[number % len(folders)]
        folder.mkdir(parents=True, exist_ok=True)
        values = rng.integers(400, 4000, (SIZE, SIZE)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{number:03}.tif")
    return root


@pytest.mark.parametrize(
    ("data", "top"),
    [
        (saved(Image.fromarray(ramp(4095, np.uint16)), "PNG"), 4095),
        (saved(Image.fromarray(ramp(4095, np.uint16)), "TIFF"), 4095),
        (saved(Image.fromarray(ramp(1e6, np.int32)), "TIFF"), 1e6),
        (saved(Image.fromarray(ramp(7.5, np.float32)), "TIFF"), 7.5),
        (npy(ramp(7.5, np.float16)), 7.5),
        (npy(ramp(7.5, np.float64)), 7.5),
        (npy(ramp(60_000, np.uint16)), 60_000),
        (npy(ramp(3e9, np.uint32)), 3e9),
        (npy(ramp(1e6, np.int64), other=ramp(1, np.uint8)), 1e6),
    ],
)
def test_every_value_survives(data: bytes, top: float) -> None:
    """All 64 levels of a ramp come back, in proportion, whatever they are stored as."""
    assert is_deep(data, "x", 10**6, Depth())
    read = decode(data, "x", 10**6, depth=Depth((0.0, top)))
    assert isinstance(read, np.ndarray) and read.dtype == np.float32
    assert read.shape == (SIZE, SIZE, 1)
    wanted = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE, 1)
    assert np.abs(read - wanted).max() <= 0.6 / min(top, 2000.0) + 1e-6
    assert len(np.unique(read)) == (SIZE * SIZE if top > SIZE else 64)


def test_colour_of_16_bits_keeps_all_of_them() -> None:
    """PIL cuts 16-bit colour down to 8 bits; tifffile and torchvision do not."""
    colours = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3)).astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, colours, photometric="rgb")
    read = decode(file.getvalue(), "x", 10**6, depth=Depth((0.0, 65535.0)))
    assert np.array_equal(np.asarray(read), (colours / np.float32(65535)).astype(np.float32))
    bands = np.random.default_rng(0).normal(size=(SIZE, SIZE, 6)).astype(np.float32)
    file = io.BytesIO()
    tifffile.imwrite(file, np.moveaxis(bands, 2, 0), planarconfig="separate", photometric=1)
    read = decode(file.getvalue(), "x", 10**6, depth=Depth((-8.0, 8.0)))
    assert np.allclose(np.asarray(read), (bands + 8) / 16, atol=1e-6)


def test_eight_bits_stay_bytes() -> None:
    image = Image.fromarray(ramp(255, np.uint8))
    for data in (saved(image, "PNG"), saved(image, "TIFF"), npy(ramp(255, np.uint8))):
        assert not is_deep(data, "x", 10**6, Depth())
        plain, deep = (decode(data, "x", 10**6, depth=depth) for depth in (None, Depth((0, 4095))))
        assert np.asarray(deep).dtype == np.uint8
        assert np.array_equal(np.asarray(plain).squeeze(), np.asarray(deep).squeeze())


def test_a_range_cuts_and_a_percentile_stretches() -> None:
    values = np.array([[-100.0, 0.0], [50.0, 400.0]])
    read = decode(npy(values), "x", 100, depth=Depth((0.0, 100.0)))
    assert np.asarray(read)[:, :, 0].tolist() == [[0, 0], [0.5, 1]]
    ramped = np.asarray(decode(npy(ramp(1000, np.float32)), "x", 100, depth=Depth("percentile")))
    assert ramped.min() == 0 and ramped.max() == 1
    low, high = np.percentile(np.linspace(0, 1000, 64), (0.5, 99.5))
    assert ramped[4, 0, 0] == pytest.approx((1000 * 32 / 63 - low) / (high - low), abs=1e-5)
    with pytest.raises(UnreadableImage, match=r"need a data\.range"):
        decode(npy(values), "x", 100, depth=Depth())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_number_is_unreadable_unless_something_stands_in(bad: float) -> None:
    values = np.array([[0.0, bad], [1.0, 1.0]])
    with pytest.raises(UnreadableImage, match="1 of 4 values are NaN or infinite"):
        decode(npy(values), "x", 100, depth=Depth((0.0, 1.0)))
    read = decode(npy(values), "x", 100, depth=Depth((0.0, 1.0), nonfinite=0.5))
    assert np.asarray(read)[:, :, 0].tolist() == [[0, 0.5], [1, 1]]


def test_channels_are_told_from_rows() -> None:
    for shape, channels, wanted in (
        ((4, 64, 64), 4, (64, 64, 4)),
        ((64, 64, 4), 4, (64, 64, 4)),
        ((4, 64, 4), 4, (4, 64, 4)),
        ((4, 64, 64), None, (64, 64, 4)),
        ((64, 64), 1, (64, 64, 1)),
        ((1, 5, 64), 3, (5, 64, 1)),
    ):
        assert channels_last(np.zeros(shape), channels).shape == wanted


def test_pages_are_channels_or_images(tmp_path: Path) -> None:
    pages = [Image.fromarray(ramp(1000 * (n + 1), np.uint16)) for n in range(3)]
    for name in ("a", "b"):
        pages[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=pages[1:])
    config = DataConfig(source="flat", path=str(tmp_path), image_size=SIZE, range=(0, 3000))
    first = open_source(replace(config, channels=1), "train")
    assert len(first) + len(open_source(config, "val")) == 2
    assert np.asarray(first.image(0)).max() == pytest.approx(1 / 3)
    both = open_source(replace(config, pages="channels"), "train")
    assert np.asarray(both.image(0)).max((0, 1)) == pytest.approx([1 / 3, 2 / 3, 1])
    split = [open_source(replace(config, pages="images"), s) for s in ("train", "val")]
    tops = {
        s.describe(i): float(np.asarray(s.image(i)).max()) for s in split for i in range(len(s))
    }
    wanted = {f"{n}.tif#{p}": (p + 1) / 3 for n in "ab" for p in range(3)}
    assert tops == pytest.approx(wanted)


def test_the_range_is_measured_on_training_images_and_written_down(tmp_path: Path) -> None:
    root = twelve_bits(tmp_path / "set", 40)
    config = DataConfig(source="auto", path=str(root), channels=1, image_size=SIZE, batch_size=8)
    train = open_source(config, "train")
    assert train.measured.source == "flat" and train.measured.range == (0.0, 4095.0)
    pixels = np.concatenate([np.asarray(train.image(i)).ravel() for i in range(len(train))])
    assert train.mean == pytest.approx((pixels.mean(),), abs=1e-5)
    assert train.std == pytest.approx((pixels.std(),), abs=1e-5)
    val = open_source(config, "val")
    assert (val.mean, val.measured) == (train.mean, train.measured)
    # A run's config holds what was measured: the images it came from need not be there.
    alone = twelve_bits(tmp_path / "other", 4)
    again = open_source(replace(config, path=str(alone), measured=train.measured), "train")
    assert again.mean == train.mean and np.asarray(again.image(0)).max() <= 4000 / 4095


def test_batches_are_floats_by_any_way(tmp_path: Path) -> None:
    """Workers, caches and packing give the very values of the plain reader."""
    root = twelve_bits(tmp_path / "set", 24)
    base = DataConfig(source="flat", path=str(root), channels=1, image_size=SIZE, batch_size=8)
    found = []
    for changes in ({}, {"cache": "memory"}, {"cache": "mmap", "cache_path": str(tmp_path / "c")}):
        config = replace(base, **changes)
        source = open_source(config, "train")
        (batch,) = train_loader(source, config, 0, start_step=0, total_steps=1)
        assert batch.images.dtype == torch.float32 and batch.images.min() >= 0
        assert batch.images.max() <= 1 and len(batch.images.unique()) > 256
        found.append(normalize(batch.images, source.mean, source.std))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with pytest.raises(UserError, match=r"data\.cache: 'device' holds 8-bit images alone"):
        open_source(replace(base, cache="device"), "train")


def test_a_batch_of_both_kinds_is_on_one_scale(tmp_path: Path) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 51, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((SIZE, SIZE), 13107, np.uint16)).save(tmp_path / "b.png")
    for side in ("square", "keep"):
        config = DataConfig(
            source="flat", path=str(tmp_path), channels=1, image_size=SIZE, aspect=side,
            range=(0, 65535), val_fraction=0.1,
        )  # fmt: skip
        for split in ("train", "val"):
            source = open_source(config, split)
            (batch,) = eval_loader(source, config, patch_size=(4, 4))
            images = batch.images if side == "square" else batch.images.values
            scale = 255 if images.dtype == torch.uint8 else 1
            assert (images / scale).unique() == pytest.approx([0.2])


def test_old_runs_keep_the_high_byte(tmp_path: Path) -> None:
    root = twelve_bits(tmp_path, 4)
    config = DataConfig(source="flat", path=str(root), channels=1, image_size=SIZE)
    source = open_source(replace(config, range="high_byte"), "train")
    (batch,) = eval_loader(source, config)
    assert batch.images.dtype == torch.uint8 and len(batch.images.unique()) <= 16
    assert source.mean == pytest.approx((0.456,), abs=0.01)  # ImageNet's, as ever


def test_features_read_files_and_arrays_as_training_did(
    tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    from mim.sklearn import MIMFeatures

    root, run = twelve_bits(tmp_path / "set", 40), tmp_path / "run"
    settings = {"data.source": "auto", "data.path": str(root), "data.batch_size": 8}
    outcome = mim("pretrain", "--config", tiny(settings), "--output", run)
    assert outcome.code == 0, outcome.err
    written = yaml.safe_load((run / "config.yaml").read_text())["data"]["measured"]
    assert written["source"] == "flat" and written["range"] == [0.0, 4095.0]
    features = MIMFeatures(run, device="cpu").fit()
    file = root / "001.tif"
    values = np.asarray(Image.open(file))
    by_file, by_array = features.transform([file]), features.transform(values[None])
    assert np.array_equal(by_file, by_array)
    with torch.no_grad():
        mean, std = written["mean"][0], written["std"][0]
        images = (torch.from_numpy(values / np.float32(4095)) - mean) / std
        tokens = load(run).backbone.forward_features(images[None, None].float())
    assert np.allclose(by_file[0], tokens[0, 1:].mean(0).numpy(), atol=1e-4)


def test_dicom_is_rescaled_windowed_and_inverted(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="is the extra dicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    stored = np.arange(64, dtype=np.uint16).reshape(8, 8) * 10
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2", "1.2.3"
    item = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    item.Rows, item.Columns, item.SamplesPerPixel = 8, 8, 1
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 12, 11, 0
    item.PhotometricInterpretation, item.PixelData = "MONOCHROME2", stored.tobytes()
    item.RescaleSlope, item.RescaleIntercept = "2", "-100"
    item.WindowCenter, item.WindowWidth = "200.5", "401"

    def read(depth: Depth) -> NDArray[Any]:
        file = io.BytesIO()
        item.save_as(file, enforce_file_format=True)
        return np.asarray(decode(file.getvalue(), "x", 100, depth=depth))[:, :, 0]

    values = stored * 2.0 - 100
    assert np.allclose(read(Depth((-100.0, 1160.0))), (values + 100) / 1260, atol=1e-6)
    assert np.allclose(read(Depth("window")), (values / 400).clip(0, 1), atol=1e-6)
    item.PhotometricInterpretation = "MONOCHROME1"
    assert np.allclose(read(Depth("window")), 1 - (values / 400).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("text", ["[0,4095]", "percentile"])
def test_the_range_is_given_on_the_command_line(
    text: str, tiny: Callable[..., Path], mim: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(), "--output", run, "--data.range", text).code == 0
    written = yaml.safe_load((run / "config.yaml").read_text())["data"]["range"]
    assert written == (yaml.safe_load(text) if text[0] == "[" else text)
    refused = mim("pretrain", "--config", tiny(), "--output", run, "--data.range", "[5,1]")
    assert refused.code == 2 and "must be from low to high" in refused.err
