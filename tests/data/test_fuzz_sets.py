"""Random folders, shards and tables of odd images and labels, of which the right answer is known.

What a source returns is right, or the error names what is wrong. ``MIM_FUZZ_EXAMPLES`` sets how
many sets of each kind are written, by default 25 in all.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import ImageSource, Split, UnreadableImage, open_source
from mim.data.images.transforms import prepare

EXAMPLES = max(1, int(os.environ.get("MIM_FUZZ_EXAMPLES", "25")) // 4)
CLASSES = ("a", "Bär", "c.d", "e f", "Ωmega")
SPLITS = {"train": ("train", "Train", "training"), "val": ("val", "validation", "Test", "testing")}
ENDINGS = (".png", ".PNG", ".jpg", ".JPEG", ".jfif", ".tif", ".bmp", ".webp")
JUNK = (
    "Thumbs.db",
    ".DS_Store",
    "__MACOSX/._x.png",
    "@eaDir/x.png",
    "notes.txt",
    "x.heic",
    "README",
)

FAULTS = ("negative", "null", "unknown", "huge", "list")


@dataclass
class Picture:
    split: str
    label: int
    value: int
    """Gray value of all its pixels; -1 where it cannot be read."""
    stem: str
    ending: str
    data: bytes


def encode(rng: np.random.Generator, value: int) -> tuple[bytes, int]:
    """A file of one of many odd kinds, and the gray value that it shows."""
    size = int(rng.integers(1, 20)), int(rng.integers(1, 20))
    kind = rng.choice(
        ["L", "RGB", "RGBA", "P", "CMYK", "16", "LA", "bmp", "gif", "npy", "npy16", "tif"]
    )
    if kind in ("16", "npy16"):  # at least one of the upper two bits: data.range is that of 16 bits
        value = max(value, 64)
    gray = Image.new("L", size, value)
    file = io.BytesIO()
    match str(kind):
        case "RGB" | "RGBA" | "P" | "LA":
            gray.convert(str(kind)).save(file, "PNG")
        case "CMYK":
            gray.convert("RGB").convert("CMYK").save(file, "TIFF")
        case "16":
            Image.fromarray(np.full(size, value << 8, np.uint16)).save(file, "PNG")
        case "npy" | "npy16":
            deep = str(kind) == "npy16"
            np.save(
                file, np.full(size, value << 8 if deep else value, np.uint16 if deep else np.uint8)
            )
        case "bmp" | "gif":
            gray.save(file, str(kind).upper())
        case "tif":
            gray.save(file, "TIFF", compression="tiff_lzw")
        case _:
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(1, 9))
            gray.save(file, "PNG", exif=exif)
    data = file.getvalue()
    if rng.random() < 0.1:
        broken = [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n", data[: len(data) // 2]]
        return broken[int(rng.integers(4))], -1
    return data, value


def pictures(rng: np.random.Generator) -> list[Picture]:
    found, stems = [], set()
    classes = int(rng.integers(2, len(CLASSES) + 1))
    for split, count in (("train", int(rng.integers(8, 20))), ("val", int(rng.integers(3, 8)))):
        for number in range(count):
            label = number % classes if split == "train" else int(rng.integers(classes))
            stem = str(rng.choice(["{}", "photo_1.{}", "IMG {}", "x.y.{}", "Ä{}"])).format(
                len(stems)
            )
            stems.add(stem)
            data, value = encode(rng, int(rng.integers(5, 250)))
            found.append(Picture(split, label, value, stem, str(rng.choice(ENDINGS)), data))
    return found


def seen(config: DataConfig) -> tuple[Counter[tuple[str, str, int]], ImageSource]:
    found: Counter[tuple[str, str, int]] = Counter()
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        source = open_source(config, split)
        assert len(set(source.sample_ids.tolist())) == len(source)
        for index in range(len(source)):
            assert source.labels is not None
            label = source.classes[int(source.labels[index])]
            try:
                pixels = np.asarray(prepare(source.image(index), 1))
            except UnreadableImage as error:
                assert error.name == source.describe(index) and error.reason
                found[split, label, -1] += 1
                continue
            # Colour spaces round; within an image all pixels are one.
            assert pixels.min() == pixels.max()
            value = float(pixels.flat[0])
            is_deep = pixels.dtype == np.float32  # more than 8 bits: from 0 to 1
            found[split, label, round(value * 65535 / 256 if is_deep else value)] += 1
    return found, source


def near(found: Counter[tuple[str, str, int]], expected: list[tuple[str, str, int]]) -> None:
    given = sorted(found.elements())
    assert len(given) == len(expected)
    for one, other in zip(given, sorted(expected), strict=True):
        assert one[:2] == other[:2] and abs(one[2] - other[2]) <= 1, (one, other)


def names(rng: np.random.Generator) -> dict[str, str]:
    return {split: str(rng.choice(known)) for split, known in SPLITS.items()}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))


def config(source: str, path: Path, **more: Any) -> DataConfig:
    return DataConfig(source=source, path=str(path), channels=1, max_unreadable=0.99, **more)


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_folders(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    root, chosen, given = tmp_path / "set", names(rng), pictures(rng)
    for picture in given:
        form = str(rng.choice(["NFC", "NFD"]))
        folder = root / chosen[picture.split] / unicodedata.normalize(form, CLASSES[picture.label])
        folder = folder / "deep" if rng.random() < 0.2 else folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{picture.stem}{picture.ending}").write_bytes(picture.data)
        if rng.random() < 0.2:
            junk = folder / str(rng.choice(JUNK))
            junk.parent.mkdir(exist_ok=True)
            junk.write_bytes(picture.data)
        if rng.random() < 0.1 and not (folder / "up").exists():
            (folder / "up").symlink_to("..")
    found, source = seen(config("imagefolder", root))
    near(found, [(p.split, CLASSES[p.label], p.value) for p in given])
    assert source.classes == sorted({CLASSES[p.label] for p in given if p.split == "train"})


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_shards(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    root, chosen, given = tmp_path / "set", names(rng), pictures(rng)
    (root).mkdir()
    layout = str(rng.choice(["folders", "cls", "json"]))
    members: dict[str, list[tuple[str, bytes]]] = {"train": [], "val": []}
    for picture in given:
        head = f"{CLASSES[picture.label]}/" if layout == "folders" else ""
        key = f"{head}{picture.stem}"
        here = members[picture.split]
        here.append((f"{key}{picture.ending}", picture.data))
        if layout == "cls":
            here.append((f"{key}{rng.choice(['.cls', '.CLS'])}", f"{picture.label}\n".encode()))
        if layout == "json":
            here.append((f"{key}.json", json.dumps({"label": picture.label, "x": [1]}).encode()))
        if rng.random() < 0.3:  # a mask, a caption, what a system left
            here.append((f"{key}.seg.png", given[0].data))
            here.append((f"{key}.txt", b"a caption"))
            here.append((f"__MACOSX/._{picture.stem}.png", b"x"))
    apart = bool(rng.random() < 0.5)
    if apart:
        for split, here in members.items():
            with tarfile.open(root / f"set-{chosen[split]}-0.tar", "w") as tar:
                for place in rng.permutation(len(here)):
                    add(tar, *here[place])
    else:
        head = str(rng.choice(["", "./", "whole/"]))
        both = [(f"{head}{chosen[s]}/{n}", data) for s, here in members.items() for n, data in here]
        with tarfile.open(root / "set.tar", "w") as tar:
            for place in rng.permutation(len(both)):
                add(tar, *both[place])
    found, _ = seen(config("shards", root))
    labels = [CLASSES[p.label] if layout == "folders" else str(p.label) for p in given]
    near(found, [(p.split, label, p.value) for p, label in zip(given, labels, strict=True)])


@pytest.mark.parametrize(
    ("seed", "fault"),
    [(seed, None) for seed in range(EXAMPLES)]
    + [(seed, fault) for fault in FAULTS for seed in range(2)],
)
def test_tables(tmp_path: Path, seed: int, fault: str | None) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    rng = np.random.default_rng([seed, 3])
    root, chosen, given = tmp_path / "set", names(rng), pictures(rng)
    root.mkdir()
    words = fault is None and bool(rng.random() < 0.5)
    wrong: dict[str, Any] = {
        "negative": -7,
        "null": None,
        "unknown": 77,
        "huge": 10**13,
        "list": [1],
    }
    for split in ("train", "val"):
        here = [picture for picture in given if picture.split == split]
        labels: list[Any] = [CLASSES[p.label] if words else p.label for p in here]
        if fault is not None and (split == "val" or fault == "list"):
            labels = (
                [[label] for label in labels] if fault == "list" else [*labels[:-1], wrong[fault]]
            )
        images = pa.array([p.data for p in here], pa.binary())
        table = pa.table({"image": images, "label": labels})
        pq.write_table(
            table, root / f"{chosen[split]}-0.parquet", row_group_size=int(rng.integers(1, 9))
        )
    told = config("huggingface", root, streaming=True)
    if fault is not None:
        with pytest.raises(UserError, match=r"data\.huggingface\.label"):
            seen(told)
        return
    found, _ = seen(told)
    near(found, [(p.split, CLASSES[p.label] if words else str(p.label), p.value) for p in given])
