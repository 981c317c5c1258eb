"""Odd and damaged files: a rule for each; who stands in for what cannot be read; the limit."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError, WorkerError
from mim.core.rng import image_keys, uniforms
from mim.data import (
    ImageSource,
    UnreadableImage,
    eval_loader,
    eval_transform,
    open_source,
    train_loader,
    worker_deaths,
)
from mim.data.images.decode import decode
from mim.data.images.transforms import prepare

SIDE = 6
COLOUR = (200, 40, 90)
LIMIT = 89_478_485


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def plain(
    mode: str = "RGB", colour: object = COLOUR, size: tuple[int, int] = (8, 4)
) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def pixels(data: bytes, channels: int = 3, name: str = "x") -> np.ndarray:
    image = prepare(decode(data, name, LIMIT), channels)
    return np.asarray(image)


# ---- images that are odd and still images


def test_grayscale_and_black_and_white() -> None:
    assert (pixels(encoded(plain("L", 77))) == 77).all()
    assert (pixels(encoded(plain("1", 1))) == 255).all()
    assert pixels(encoded(plain("L", 77)), channels=1).shape == (4, 8)


def test_cmyk_is_turned_to_rgb() -> None:
    ink = plain("CMYK", (255, 0, 0, 0))  # cyan alone
    red, green, blue = pixels(encoded(ink, "TIFF"))[0, 0].tolist()
    assert red < 60 and green > 150 and blue > 200
    assert pixels(encoded(ink, "JPEG")).shape == (4, 8, 3)


def test_palette_with_and_without_transparency() -> None:
    image = plain("P", 1)
    image.putpalette([0, 0, 0, *COLOUR])
    assert (pixels(encoded(image)) == COLOUR).all()
    assert (pixels(encoded(image, transparency=1)) == COLOUR).all()


def test_alpha_is_left_out_and_kept_with_four_channels() -> None:
    data = encoded(plain("RGBA", (*COLOUR, 30)))
    assert (pixels(data) == COLOUR).all()
    assert (pixels(data, channels=4) == (*COLOUR, 30)).all()
    assert (pixels(encoded(plain()), channels=4) == (*COLOUR, 255)).all()
    assert pixels(encoded(plain("CMYK", 9), "TIFF"), channels=4).shape == (4, 8, 4)


def test_sixteen_bits_keep_the_upper_eight() -> None:
    deep = np.full((4, 8), 0x9ABC, dtype=np.uint16)
    assert (pixels(encoded(Image.fromarray(deep)), channels=1) == 0x9A).all()
    file = io.BytesIO()
    np.save(file, deep)
    assert (pixels(file.getvalue(), channels=1) == 0x9A).all()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation(orientation: int) -> None:
    scene = np.zeros((4, 8, 3), dtype=np.uint8)
    scene[0, 0] = 255  # the corner tells how it was turned
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = pixels(encoded(Image.fromarray(scene), exif=exif.tobytes()))
    turns = {3: 2, 6: 3, 8: 1}[orientation]
    assert np.array_equal(upright, np.rot90(scene, turns))


def test_damaged_exif_leaves_the_image_as_stored() -> None:
    data = encoded(plain(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a" + b"\xff" * 40)
    assert pixels(data).shape == (4, 8, 3)


def test_tiny_misnamed_and_animated() -> None:
    one = decode(encoded(plain(size=(1, 1))), "dot.jpg", LIMIT)  # a PNG by its content
    cut = eval_transform([one], DataConfig(image_size=SIDE))
    assert (cut == torch.tensor(COLOUR)[:, None, None]).all()
    frames = [plain(), plain(colour=(0, 0, 0))]
    film = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(film).astype(int) - COLOUR).max() < 4


def test_arrays_of_many_channels() -> None:
    bands = np.arange(4 * 8 * 6, dtype=np.uint8).reshape(4, 8, 6)
    file = io.BytesIO()
    np.save(file, bands)
    assert np.array_equal(pixels(file.getvalue(), channels=6), bands)
    with pytest.raises(UserError, match=r"data\.channels: 3 does not fit images of 6 channels"):
        pixels(file.getvalue(), channels=3)


# ---- files that are none


def truncated() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "JPEG")[:1500]


def huge() -> bytes:
    """A PNG that says it has 100,000 x 100,000 pixels."""
    data = bytearray(encoded(plain()))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def floats() -> bytes:
    return encoded(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF")


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([[{}]], dtype=object), allow_pickle=True)
    return file.getvalue()


BAD = {
    "zero-byte": (b"", "the file is empty"),
    "no image": (b"not an image", "the file holds no image"),
    "truncated": (truncated(), "truncated"),
    "huge": (huge(), ""),
    "float": (floats(), "pixels of mode F have no range"),
    "pickle": (objects(), "of object is no image"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_files(case: str) -> None:
    data, reason = BAD[case]
    with pytest.raises(UnreadableImage, match=f"^unreadable image some/file.jpg: .*{reason}") as e:
        decode(data, "some/file.jpg", LIMIT)
    assert "\n" not in str(e.value)


def test_the_limit_of_pixels_is_a_setting() -> None:
    data = encoded(plain(size=(20, 10)))
    with pytest.raises(UnreadableImage, match=r"20 x 10 pixels are more .*data\.max_pixels=199"):
        decode(data, "x", 199)
    decode(data, "x", 200)


# ---- in a source


def images(root: Path, count: int, damaged: dict[int, bytes]) -> Path:
    """``count`` images, each of its own gray, some of them damaged."""
    for number in range(count):
        path = root / "train" / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damaged.get(number, encoded(plain("L", number))))
    (root / "val" / "class0").mkdir(parents=True)
    for number in range(3):
        (root / "val" / "class0" / f"{number}.png").write_bytes(encoded(plain("L", 200 + number)))
    return root


def at(path: Path, **settings: object) -> DataConfig:
    given = {"augment": "none", "max_unreadable": 0.1, "batch_size": 8, **settings}
    return DataConfig(source="imagefolder", path=str(path), image_size=4, channels=1, **given)  # type: ignore[arg-type]


def epoch(source: ImageSource, config: DataConfig, **options: object) -> list[object]:
    steps = len(source) // config.batch_size
    loader = train_loader(source, config, 7, start_step=0, total_steps=steps, **options)  # type: ignore[arg-type]
    return list(loader)


def test_a_keyed_neighbour_stands_in(tmp_path: Path) -> None:
    """Every batch is that of the whole set, but for the image whose place is taken."""
    whole = images(tmp_path / "whole", 40, {})
    broken = images(tmp_path / "broken", 40, {10: b"", 25: truncated()})
    folder = tmp_path / "run"
    folder.mkdir()
    good, bad = open_source(at(whole), "train"), open_source(at(broken), "train", folder)
    by_gray = {int(np.asarray(good.image(i))[0, 0]): i for i in range(len(good))}
    stand_in = {}
    for number in (10, 25):
        key = image_keys(0, -1, good.sample_ids[by_gray[number]][None], purpose="replace")
        first = int(uniforms(key, 1)[0, 0] * 40)
        stand_in[number] = int(np.asarray(good.image(first))[0, 0])
    assert set(stand_in.values()).isdisjoint(stand_in)

    for expected, found in zip(epoch(good, at(whole)), epoch(bad, at(broken)), strict=True):
        grays = [stand_in.get(g, g) for g in expected.images[:, 0, 0, 0].tolist()]
        assert found.images[:, 0, 0, 0].tolist() == grays
        assert found.sample_ids.tolist() == good.sample_ids[[by_gray[g] for g in grays]].tolist()
        assert found.labels.tolist() == [g % 2 for g in grays]

    assert bad.ledger is not None and len(bad.ledger) == 2
    lines = (folder / "unreadable.txt").read_text().splitlines()
    assert sorted(line.split("\t")[:2] for line in lines) == [
        ["train", "train/class0/010.png"],
        ["train", "train/class1/025.png"],
    ]
    again = open_source(at(broken), "train", folder)  # a resume counts and writes nothing twice
    epoch(again, at(broken))
    assert again.ledger is not None and len(again.ledger) == 2
    assert (folder / "unreadable.txt").read_text().splitlines() == lines


def test_workers_and_processes_see_the_same_stand_in(tmp_path: Path) -> None:
    config = at(images(tmp_path, 40, {10: b"", 25: truncated()}))
    source = open_source(config, "train")
    alone = epoch(source, config)
    shares = [epoch(source, at(tmp_path, workers=1), rank=rank, world=2) for rank in (0, 1)]
    for batch, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
    assert source.ledger is not None and len(source.ledger) == 2  # told across processes


def test_an_evaluation_leaves_it_out_and_repeats_nothing(tmp_path: Path) -> None:
    config = at(images(tmp_path, 40, {10: b"", 11: b"x", 12: b"y"}))
    source = open_source(config, "train")
    batches = list(eval_loader(source, config, batch_size=1))  # a batch may be left out as a whole
    grays = [int(batch.images[0, 0, 0, 0]) for batch in batches]
    assert sorted(grays) == [n for n in range(40) if n not in (10, 11, 12)]
    shown = [int(n) for n in range(40)]
    (batch,) = eval_loader(source, config, batch_size=40, indices=shown)
    assert len(batch) == 40  # chosen ones are shown: a neighbour stands in


@pytest.mark.parametrize("when", ["opening", "reading"])
def test_too_many_stop_the_run_with_the_list(tmp_path: Path, when: str) -> None:
    damaged = dict.fromkeys((3, 4, 5, 6, 7), b"" if when == "opening" else truncated())
    config = at(images(tmp_path, 40, damaged))
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(UserError, match=r"data\.max_unreadable: 0\.1 allows 4 unreadable of 40"):
        epoch(open_source(config, "train", folder), config)
    assert len((folder / "unreadable.txt").read_text().splitlines()) == 5
    several = at(tmp_path, max_unreadable=0.2)
    assert len(epoch(open_source(several, "train"), several)) == 5


def test_nothing_readable_is_an_error_not_a_loop(tmp_path: Path) -> None:
    config = at(images(tmp_path, 8, dict.fromkeys(range(8), truncated())), max_unreadable=0.999)
    source = open_source(config, "train")
    assert source.ledger is not None
    source.ledger.limit = 1.0
    with pytest.raises(UserError, match="32 images in its place are unreadable"):
        epoch(source, config)


class Deadly(ImageSource):
    """Kills the worker that reads image 20."""

    name, labels, classes = "deadly", None, []
    mean, std = (0.5,), (0.5,)

    def __init__(self) -> None:
        self.sample_ids = torch.arange(64)

    def image(self, index: int) -> np.ndarray:
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full((4, 4, 1), index, dtype=np.uint8)


def test_a_torn_pipe_is_told_as_the_dead_worker_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a finalizer has swallowed what torch raises."""
    monkeypatch.setattr("mim.data.loader._SIGNAL_SECONDS", 0.0)
    context = multiprocessing.get_context("fork")
    dead, alive = (context.Process(target=time.sleep, args=(seconds,)) for seconds in (0, 60))
    for process in (dead, alive):
        process.start()
    dead.join()
    told = rf"pid {dead.pid}\) exited unexpectedly.*--resume auto"
    with pytest.raises(WorkerError, match=told), worker_deaths(lambda: [alive, dead]):
        raise ConnectionResetError
    with pytest.raises(ConnectionResetError), worker_deaths(lambda: [alive]):
        raise ConnectionResetError
    alive.kill()


def test_a_killed_worker_is_told_in_one_line() -> None:
    config = DataConfig(image_size=4, channels=1, batch_size=8, workers=1, augment="none")
    loader = train_loader(Deadly(), config, 0, start_step=0, total_steps=8)
    with pytest.raises(WorkerError, match=r"killed|exited unexpectedly") as caught:
        list(loader)
    assert "\n" not in str(caught.value) and "--resume auto" in str(caught.value)
