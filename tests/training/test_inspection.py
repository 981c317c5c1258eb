"""The doctor of a folder never stops at the first fault, and its last line is true."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIZE = 8
rng = np.random.default_rng(0)


def gray(path: Path, top: int = 255, dtype: Any = np.uint8, size: int = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, top, (size, size)).astype(dtype)).save(path)


def fill(root: Path, folders: tuple[str, ...], count: int = 12, **options: Any) -> None:
    for folder in folders:
        for number in range(count):
            gray(root / folder / f"{number:02}.png", **options)


def plain(root: Path) -> None:
    fill(root, ("train/a", "train/b", "val/a", "val/b"))


def no_labels(root: Path) -> None:
    fill(root, (".",), 20)


def deep(root: Path) -> None:
    fill(root, (".",), 20, top=4000, dtype=np.uint16)


def too_few(root: Path) -> None:
    fill(root, (".",), 1)


def nothing(root: Path) -> None:
    (root / "notes.txt").write_text("no image")


def empty_classes(root: Path) -> None:
    fill(root, ("a", "b"))
    (root / "c").mkdir()
    (root / "d").mkdir()


def only_val(root: Path) -> None:
    fill(root, ("val/a", "val/b", "other"))


def other_class_in_val(root: Path) -> None:
    fill(root, ("train/a", "train/b", "val/a", "val/z"))


def some_broken(root: Path) -> None:
    fill(root, (".",), 40)
    (root / "x.png").write_bytes(b"")


def most_broken(root: Path) -> None:
    fill(root, (".",), 10)
    for number in range(6):
        (root / f"x{number}.png").write_bytes(b"no image")


def cut_short(root: Path) -> None:
    """Whole headers, half pixels: the faults show only when they are decoded."""
    fill(root, (".",), 20, size=64)
    for number in range(6):
        path = root / f"{number:02}.png"
        path.write_bytes(path.read_bytes()[:2000])


def four_channels(root: Path) -> None:
    for number in range(20):
        np.save(root / f"{number}.npy", rng.normal(size=(4, SIZE, SIZE)).astype(np.float32))


def not_finite(root: Path) -> None:
    for number in range(10):
        values = rng.normal(size=(SIZE, SIZE))
        values[0, 0] = np.nan if number < 5 else 0
        np.save(root / f"{number}.npy", values)


def shard(root: Path) -> None:
    with tarfile.open(root / "train.tar", "w") as tar:
        for number in range(20):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (SIZE, SIZE), np.uint8)).save(file, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)


def cut_shard(root: Path) -> None:
    shard(root)
    path = root / "train.tar"
    path.write_bytes(path.read_bytes()[:5000])


FOLDERS = [
    *(plain, no_labels, deep, too_few, nothing, empty_classes, only_val, other_class_in_val),
    *(some_broken, most_broken, cut_short, four_channels, not_finite, shard, cut_shard),
]
WOULD = {plain, no_labels, deep, some_broken, four_channels, shard}


@pytest.mark.parametrize("make", FOLDERS)
def test_the_last_line_is_what_pretrain_does(
    make: Callable[[Path], None], tiny: Callable[..., Path], mim: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "set"
    root.mkdir()
    make(root)
    batch = 64 if make in WOULD else 4  # what is too large is said, with what would do
    given = {"train.epochs": 3, "train.max_steps": None, "data.batch_size": batch}
    config = tiny({**given, "data.source": "auto"})
    sheet = tmp_path / "sheet.png"
    found = mim("data", "inspect", str(root), "--config", config, "--output", sheet)
    assert found.code == 0, found.err
    last = found.out.strip().splitlines()[-1]
    would = last.startswith("mim pretrain would start: ")
    assert would == (make in WOULD), found.out
    words = shlex.split(last.partition("mim pretrain would start: mim ")[2]) or [
        *("pretrain", str(root), "--config", str(config))
    ]
    ran = mim(*words, "--output", tmp_path / "run")
    assert ran.code == (0 if would else 2), (last, ran.err)
    assert sheet.is_file() == would
    if not would:
        reason = last.removeprefix("mim pretrain would not run: ").partition(":")[0]
        said = ran.err.strip().splitlines()[-1].removeprefix("mim: error: ")
        unreadable = reason == "data.max_unreadable" and "unreadable" in said
        assert reason == said.partition(":")[0] or unreadable


def test_all_faults_are_told_at_once(
    tiny: Callable[..., Path], mim: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "set"
    empty_classes(root)
    twin = (root / "a/00.png").read_bytes()
    (root / "b/twin.png").write_bytes(twin)
    (root / "b/broken.png").write_bytes(b"no image")
    (root / "a/stack.czi").write_bytes(b"")
    numbers = tmp_path / "numbers.json"
    found = mim(
        "data", "inspect", str(root), "--config", tiny({"data.source": "auto"}), "--json", numbers
    )
    assert found.code == 0
    for words in ("2 empty classes", "b/broken.png: the file holds no image", "1 .czi", "twin.png"):
        assert words in found.out, words
    tree = json.loads(numbers.read_text())
    assert tree["train"]["images"] + tree["val"]["images"] == 26
    assert any("a/00.png" in " ".join(names) for names in tree["duplicates"])


def test_a_shard_with_wrong_labels_is_looked_at_all_the_same(
    tiny: Callable[..., Path], mim: Callable[..., Any], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number in range(20):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (SIZE, SIZE), np.uint8)).save(file, "PNG")
            labelled = {f"{number}.cls": b"1"} if number else {"bad.png": b"no image"}
            for name, data in {f"{number}.png": file.getvalue(), **labelled}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = mim("data", "inspect", str(tmp_path), "--config", tiny({"data.source": "auto"}))
    assert found.code == 0, found.err
    assert "bad.png: the file holds no image" in found.out
    last = found.out.strip().splitlines()[-1]
    assert last.startswith("mim pretrain would not run: ") and "2 images without .cls" in last


def test_few_levels_and_cut_values_are_warned_of(
    tiny: Callable[..., Path], mim: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "set"
    fill(root, (".",), 20, top=4000, dtype=np.uint16, size=32)
    words = (
        "data",
        "inspect",
        str(root),
        "--config",
        tiny({"data.source": "auto", "data.batch_size": 8}),
    )
    for more, said in (
        ((), ""),
        (("--data.range", "high_byte"), "no image has more than 16 different values"),
        (("--data.range", "[0,2000]"), "data.range cuts off 5"),
    ):
        found = mim(*words, "--output", tmp_path / "sheet.png", *more)
        assert found.code == 0, found.err
        assert ("warning" in found.out) == bool(said) and said in found.out


def test_a_class_folder_names_its_parent(
    tiny: Callable[..., Path], mim: Callable[..., Any], tmp_path: Path
) -> None:
    fill(tmp_path / "set", ("a", "b"), 4)
    given = {"data.source": "imagefolder", "data.path": str(tmp_path / "set/a")}
    refused = mim("pretrain", "--config", tiny(given), "--output", tmp_path / "run")
    assert refused.code == 2 and f"one class of {tmp_path / 'set'}" in refused.line
