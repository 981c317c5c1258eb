"""Shards as people pack them: dots in names, masks beside images, links, endings in capitals."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import ImageSource, Split, open_source
from mim.data.places.places import expand


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes | tuple[str, str]]) -> Path:
    """Members by name: content, or the kind and the target of a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type = tarfile.SYMTYPE if content[0] == "soft" else tarfile.LNKTYPE
                info.linkname = content[1]
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def opened(path: Path, split: Split = "train", **more: Any) -> ImageSource:
    return open_source(DataConfig(source="shards", path=str(path), channels=1, **more), split)


def found(path: Path, **more: Any) -> dict[str, tuple[int, int | None]]:
    """Name -> gray value and label, of both splits."""
    known: dict[str, tuple[int, int | None]] = {}
    for split in ("train", "val"):
        source = opened(path, split, **more)
        for index in range(len(source)):
            value = int(np.asarray(source.image(index)).flat[0])
            label = None if source.labels is None else int(source.labels[index])
            known[source.describe(index)] = value, label
    return known


@pytest.mark.parametrize("note", ["cls", "CLS", "json", "Json"])
def test_names_with_dots_keep_their_own_labels(tmp_path: Path, note: str) -> None:
    members: dict[str, Any] = {}
    for number in range(4):
        members[f"photo_1.{number}.JPG"] = png(number)
        text = f"\ufeff{number}\n" if note.lower() == "cls" else json.dumps({"label": number})
        members[f"photo_1.{number}.{note}"] = text.encode()
    members |= {"photo_1.JPG": png(9), f"photo_1.{note}": members[f"photo_1.2.{note}"]}
    assert found(tar(tmp_path / "a.tar", members)) == {
        **{f"photo_1.{number}.JPG": (number, number) for number in range(4)},
        "photo_1.JPG": (9, 2),
    }


def test_masks_beside_images_are_no_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members: dict[str, Any] = {}
    for number in range(3):
        members |= {f"{number}.jpg": png(number), f"{number}.seg.png": png(255)}
        members[f"{number}.cls"] = str(number % 2).encode()
    path = tar(tmp_path / "a.tar", members)
    for _ in range(2):  # from a scan, and from what is kept of it
        assert opened(path).left_out == {"companions of images": 3}
    assert "files left out: 3 companions of images" in capsys.readouterr().err
    assert found(path) == {f"{number}.jpg": (number, number % 2) for number in range(3)}


def test_of_several_images_of_a_sample_the_usual_one_is_taken(tmp_path: Path) -> None:
    members: dict[str, Any] = {}
    for number in range(3):
        members |= {f"{number}.image.png": png(number), f"{number}.depth.png": png(255)}
        members[f"{number}.cls"] = str(number % 2).encode()
    assert found(tar(tmp_path / "a.tar", members)) == {
        f"{number}.image.png": (number, number % 2) for number in range(3)
    }
    left, right = tmp_path / "b.tar", {"0.left.png": png(0), "0.right.png": png(1), "0.cls": b"0"}
    with pytest.raises(UserError, match=r"which of 0\.left\.png, 0\.right\.png is the image"):
        opened(tar(left, right))
    pairs = {f"{n}.{kind}": png(n) for n in range(3) for kind in ("jpg", "png")}
    with pytest.raises(UserError, match=r"0\.jpg and 0\.png in each sample"):
        opened(tar(tmp_path / "c.tar", pairs))


def test_links_are_the_members_that_they_lead_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members: dict[str, Any] = {
        "./train/a/0.png": png(0),
        "train/a/1.png": png(1),
        "train/b/2.png": ("hard", "train/a/0.png"),
        "train/b/3.png": ("soft", "../a/1.png"),
        "train/b/4.png": ("soft", "3.png"),
        "train/b/loop.png": ("soft", "pool.png"),
        "train/b/pool.png": ("soft", "loop.png"),
        "train/b/out.png": ("soft", "/etc/passwd"),
        "train/c": ("soft", "a"),
    }
    path = tar(tmp_path / "a.tar", members)
    assert found(path) == {
        "train/a/0.png": (0, 0),
        "train/a/1.png": (1, 0),
        **{f"train/b/{name}.png": (value, 1) for name, value in ((2, 0), (3, 1), (4, 1))},
    }
    assert "3 links to what is not in the shard, 1 links to folders" in capsys.readouterr().err
    labelled = {"0.png": png(0), "0.cls": b"1", "1.png": png(1), "1.cls": ("hard", "0.cls")}
    assert found(tar(tmp_path / "b.tar", labelled)) == {"0.png": (0, 1), "1.png": (1, 1)}


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("val", ["val", "validation", "Test"])
@pytest.mark.parametrize("where", ["inside", "deeper", "around", "named"])
def test_splits_by_their_usual_names(tmp_path: Path, where: str, train: str, val: str) -> None:
    if where in ("inside", "deeper"):
        head = "set/" if where == "deeper" else ""
        names = [f"{head}{train}/cat/0.png", f"{head}{train}/dog/1.png", f"{head}{val}/dog/2.png"]
        names += [f"{head}more/9.png"]
        tar(tmp_path / "set/a.tar", {name: png(n) for n, name in enumerate(names)})
    elif where == "around":
        tar(tmp_path / f"set/{train}/0.tar", {"cat/0.png": png(0), "dog/1.png": png(1)})
        tar(tmp_path / f"set/{val}/0.tar", {"dog/2.png": png(2)})
    else:
        tar(tmp_path / f"set/x-{train}-0.tar", {"cat/0.png": png(0), "dog/1.png": png(1)})
        tar(tmp_path / f"set/x-{val}-0.tar", {"dog/2.png": png(2)})
    one, other = opened(tmp_path / "set"), opened(tmp_path / "set", "val")
    assert [len(one), len(other)] == [2, 1] and one.classes == ["cat", "dog"]
    assert one.labels.tolist() == [0, 1] and other.labels.tolist() == [1]
    assert int(np.asarray(other.image(0)).flat[0]) == 2


def test_test_shards_are_not_val_where_there_are_val_shards(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        tar(
            tmp_path / f"set/{split}.tar",
            {f"a/{number}.png": png(number), f"b/{number}.png": png(9)},
        )
    assert {name for name, _ in [(n, 0) for n in found(tmp_path / "set")]} == {
        *("a/0.png", "b/0.png", "a/1.png", "b/1.png")
    }


def test_a_test_folder_among_classes_is_refused(tmp_path: Path) -> None:
    names = ["cat/0.png", "dog/1.png", "test/2.png"]
    path = tar(tmp_path / "a.tar", {name: png(0) for name in names})
    with pytest.raises(UserError, match=r"^data.path: .*has 'test' but no 'train'"):
        opened(path)


def test_leftovers_of_systems(tmp_path: Path) -> None:
    names = ["cat/0.png", "dog/1.png", "__MACOSX/cat/0.png", "@eaDir/x/t.png", "cat/._0.png"]
    path = tar(tmp_path / "a.tar", {name: png(n) for n, name in enumerate(names)})
    assert found(path) == {"cat/0.png": (0, 0), "dog/1.png": (1, 1)}


@pytest.mark.parametrize(
    "pattern", ["a-{000000..999999999}.tar", "{0..9999}{0..9999}{0..9999}", "{a,b}" * 40]
)
def test_braces_fill_no_memory(pattern: str) -> None:
    with pytest.raises(ValueError, match="more than 100,000 files"):
        expand(pattern)
    with pytest.raises(UserError, match=r"data.path: .*more than 100,000 files"):
        opened(Path(pattern))
