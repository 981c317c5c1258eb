"""Folders as people have them: names of splits, links, leftovers of systems, accents, odd files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.files import decode_text
from mim.data import ImageSource, Split, open_source
from mim.data.places.splits import find_splits, split_of_file


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))


def save(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (number, 0, 0)).save(path, "PNG")
    return root


def opened(
    root: Path, split: Split = "train", source: str = "imagefolder", **more: Any
) -> ImageSource:
    return open_source(DataConfig(source=source, path=str(root), **more), split)


def names(source: ImageSource) -> set[str]:
    return {source.describe(index) for index in range(len(source))}


@pytest.mark.parametrize("train", ["train", "Train", "training", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "Valid", "validation", "Test", "testing"])
@pytest.mark.parametrize("source", ["imagefolder", "flat"])
def test_splits_by_their_usual_names(tmp_path: Path, source: str, train: str, val: str) -> None:
    root = save(tmp_path / "set", f"{train}/cat/a.png", f"{train}/dog/b.png", f"{val}/dog/c.png")
    assert names(opened(root, "train", source)) == {f"{train}/cat/a.png", f"{train}/dog/b.png"}
    held_out = opened(root, "val", source)
    assert names(held_out) == {f"{val}/dog/c.png"}
    if source == "imagefolder":
        assert held_out.classes == ["cat", "dog"] and held_out.labels.tolist() == [1]


@pytest.mark.parametrize("source", ["imagefolder", "flat"])
@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("cat", "dog", "test"), "has 'test' but no 'train'; put the training images into"),
        (("cat", "validation"), "has 'validation' but no 'train'"),
        (("Test",), "has 'Test' but no 'train'"),
        (("train", "training"), "has both 'train' and 'training'"),
        (("train", "val", "validation"), "has both 'val' and 'validation'"),
    ],
)
def test_names_that_do_not_tell_are_refused(
    tmp_path: Path, source: str, folders: tuple[str, ...], message: str
) -> None:
    root = save(tmp_path / "set", *(f"{name}/x/{n}.png" for name in folders for n in range(3)))
    with pytest.raises(UserError, match=f"^data.path: .*{message}"):
        opened(root, source=source)


def test_val_comes_before_test() -> None:
    assert find_splits(["test", "train", "val"]) == ("train", "val")
    assert find_splits(["cats", "dogs"]) == (None, None)
    assert split_of_file("imagenet1k-validation-07.tar") == "val"
    assert split_of_file("Training_0.parquet") == "train"
    assert split_of_file("valley-3.tar") is split_of_file("contest.tar") is None


def test_leftovers_of_systems_are_no_classes_and_no_images(tmp_path: Path) -> None:
    root = save(
        tmp_path / "set",
        *("cat/a.png", "cat/b.png", "dog/c.png", "__MACOSX/cat/._a.png", "@eaDir/x/y.png"),
        *("cat/@eaDir/a.png/thumb.png", "cat/__MACOSX/b.png", ".git/z.png", "cat/._a.png"),
    )
    source = opened(root, val_fraction=0.34)
    assert source.classes == ["cat", "dog"]
    assert names(source) | names(opened(root, "val", val_fraction=0.34)) == {
        *("cat/a.png", "cat/b.png", "dog/c.png")
    }


def test_files_that_are_left_out_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save(tmp_path / "set", *(f"train/cat/{n}.png" for n in range(3)), "val/cat/v.png")
    for name in ("a.heic", "b.heic", "c.psd", "IMG_0001", "notes.txt", "labels.csv"):
        (root / "train/cat" / name).write_bytes(b"x")
    save(root, "train/cat/x.jfif", "train/cat/Y.JFIF", "train/cat/z.avif")
    for _ in range(3):
        assert len(opened(root)) == 6
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("train: files left out: 2 .heic, 1 without ending, 1 .psd")


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("source", ["imagefolder", "flat"])
def test_links_to_folders_above_multiply_nothing(tmp_path: Path, source: str) -> None:
    root = save(tmp_path / "set", *(f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(6)))
    (root / "all").symlink_to(".")
    (root / "up").symlink_to(tmp_path)
    (root / "cat/up").symlink_to("..")
    (root / "cat/dogs").symlink_to("../dog/back")
    (root / "dog/back").symlink_to("../cat")
    (root / "dog/self").symlink_to(".")
    (root / "dog/here").symlink_to("there")  # a circle of two
    (root / "dog/there").symlink_to("here")
    (root / "round").symlink_to("round")
    deep = root / "dog"
    for _ in range(3):  # a tree of links, of which each doubles the way
        deep = deep / "d"
        deep.mkdir()
        (deep / "one").symlink_to("..")
        (deep / "two").symlink_to("../one")
    everything = [opened(root, split, source) for split in ("train", "val")]
    found = sorted(name for part in everything for name in names(part))
    if source == "flat":
        assert found == sorted(f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(6))
    else:
        assert everything[0].classes == ["cat", "dog"]
        # A link from one class to another is taken at its word, once.
        assert [name for name in found if name.count("/") == 1] == sorted(
            f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(6)
        )
        assert len(found) == 18 and not [name for name in found if "/up/" in name]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_folders_and_files_by_link_are_read(tmp_path: Path) -> None:
    store = save(tmp_path / "store", "pool/1.png", "pool/2.png", "one.png")
    root = save(tmp_path / "set", "train/cat/0.png", "val/cat/v.png")
    (root / "train/dog").symlink_to(store / "pool")
    (root / "train/cat/one.png").symlink_to(store / "one.png")
    source = opened(root)
    assert names(source) == {
        "train/cat/0.png",
        "train/cat/one.png",
        "train/dog/1.png",
        "train/dog/2.png",
    }
    assert source.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_are_unreadable_and_do_not_hang(tmp_path: Path) -> None:
    root = save(tmp_path / "set", *(f"cat/{n}.png" for n in range(4)))
    os.mkfifo(tmp_path / "pipe")
    (root / "cat/pipe.png").symlink_to(tmp_path / "pipe")
    (root / "cat/zero.jpg").symlink_to("/dev/zero")
    (root / "cat/gone.jpg").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError) as raised:
        opened(root)
    for name in ("cat/pipe.png", "cat/zero.jpg"):
        assert f"{name} (it is no regular file)" in str(raised.value)
    assert "cat/gone.jpg" in str(raised.value)


def test_masks_below_a_loop_of_links(tmp_path: Path) -> None:
    from mim.core.config import FileMaskConfig, MaskConfig
    from mim.masks.generators import build_mask_generator

    root = tmp_path / "masks"
    (root / "train/a").mkdir(parents=True)
    np.save(root / "train/a/0.npy", np.eye(4, dtype=bool))
    (root / "train/a/loop").symlink_to("../..")
    (root / "b").symlink_to(".")
    generator = build_mask_generator(
        MaskConfig(name="file", file=FileMaskConfig(str(root))), (4, 4)
    )
    generator.check((4, 4))
    masks = generator._masks((4, 4))  # type: ignore[attr-defined]
    assert len(masks.flags) == 1


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_class_in_two_spellings_is_one(
    tmp_path: Path, form: str, tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    there = {name: unicodedata.normalize(form, name) for name in ("Bär", "Ähre")}
    other = "NFD" if form == "NFC" else "NFC"
    val = unicodedata.normalize(other, "Bär")
    root = save(tmp_path / "set", *(f"train/{x}/{n}.png" for x in there.values() for n in range(2)))
    save(root, f"val/{val}/v.png")
    train, held_out = opened(root), opened(root, "val")
    composed = [unicodedata.normalize("NFC", name) for name in ("Bär", "Ähre")]
    assert train.classes == composed == held_out.classes
    assert train.labels.tolist() == [0, 0, 1, 1] and held_out.labels.tolist() == [0]
    # Lists, tables and class files name it in either, with a byte order mark or without.
    chosen = tmp_path / "classes.txt"
    chosen.write_bytes(f"\ufeff{val}\r\n".encode())
    from mim.core.config import SubsetConfig

    assert opened(root, subset=SubsetConfig(list=str(chosen))).classes == composed[:1]
    files = tmp_path / "files.txt"
    files.write_text(
        f"{val}/0.png\n{unicodedata.normalize(other, 'Ähre')}/1.png\n", encoding="utf-16"
    )
    assert len(opened(root, subset=SubsetConfig(files=str(files)))) == 2
    table = tmp_path / "weights.csv"
    lines = [
        f"train/{unicodedata.normalize(other, x)}/{n}.png,{n + 1}" for x in there for n in (0, 1)
    ]
    table.write_bytes("\n".join(["\ufeffimage,weight", *lines]).encode())
    from mim.data import open_weights

    config = DataConfig(source="imagefolder", path=str(root), weights=str(table))
    weigh = open_weights(train, config)
    assert weigh is not None and weigh(train, np.arange(4), 0).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_byte_order_marks(encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    assert decode_text(f"{mark}Bär\n".encode(encoding)) == "Bär\n"
