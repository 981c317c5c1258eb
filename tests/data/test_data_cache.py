"""Every cache and every packed set gives the very batches of the folder it came from."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import Batch, Subset, eval_loader, open_source, train_loader
from mim.data.storage import packed as pack_module
from mim.data.storage.pack import pack
from mim.data.storage.packed import MANIFEST, Recipe, verify


def photographs(root: Path, sizes: list[tuple[int, int]], count: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for index in range(count):
        for split in ("train", "val"):
            path = root / split / f"class{index % 3}" / f"{index:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = sizes[index % len(sizes)]
            small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            small.resize((width, height)).save(path, quality=90)
    return root


def config(path: Path, **changes: object) -> DataConfig:
    base = DataConfig(source="imagefolder", path=str(path), image_size=24, batch_size=8)
    return replace(base, **changes)


def batches(data: DataConfig) -> list[Batch]:
    """Two epochs of training and an evaluation."""
    source = open_source(data, "train")
    train = train_loader(source, data, 3, start_step=0, total_steps=6)
    return [*train, *eval_loader(open_source(data, "val"), data)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    assert len(a) == len(b) > 0
    return all(
        torch.equal(x.images.cpu(), y.images.cpu())
        and torch.equal(x.sample_ids, y.sample_ids)
        and torch.equal(x.labels, y.labels)  # type: ignore[arg-type]
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("changes", [{}, {"augment": "none"}, {"channels": 1}, {"image_size": 128}])
def test_batches_are_the_same_bytes_in_every_cache(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    data = config(photographs(tmp_path / "set", [(32, 32)]), **changes)
    plain = batches(data)
    for cache in ("memory", "mmap", "device"):
        again = replace(data, cache=cache, cache_path=str(tmp_path / "cache"))
        assert same(batches(again), plain), cache
        if cache == "mmap":  # found again, without the files
            again = replace(again, workers=1)
            assert same(batches(again), plain)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    data = config(photographs(tmp_path / "set", [(32, 40), (50, 33), (28, 28)]))
    plain = batches(data)
    for cache in ("memory", "mmap"):
        again = replace(data, cache=cache, cache_path=str(tmp_path / "cache"), workers=2)
        assert same(batches(again), plain), cache
    with pytest.raises(UserError, match=r"data\.cache: 'device' needs images of one size"):
        open_source(replace(data, cache="device"), "train")


def test_a_changed_file_is_decoded_again(tmp_path: Path) -> None:
    root = photographs(tmp_path / "set", [(32, 32)])
    data = config(root, cache="mmap", cache_path=str(tmp_path / "cache"))
    batches(data)
    for path in (root / "train").rglob("*.jpg"):
        Image.new("RGB", (32, 32), (1, 2, 3)).save(path)
    assert same(batches(data), batches(replace(data, cache="none")))


@pytest.mark.parametrize("cache", ["memory", "mmap", "device"])
def test_an_unreadable_image_has_the_same_stand_in(tmp_path: Path, cache: str) -> None:
    root = photographs(tmp_path / "set", [(32, 32)])
    (root / "train/class1/004.jpg").write_bytes(b"no image")
    whole = root / "val/class2/005.jpg"
    whole.write_bytes(whole.read_bytes()[:-200])
    data = config(root, max_unreadable=0.2)
    again = replace(data, cache=cache, cache_path=str(tmp_path / "cache"))
    assert same(batches(again), batches(data))
    source = open_source(again, "train")
    assert source.ledger is not None and len(source.ledger) == 1


def test_a_subset_of_a_device_cache_reads_its_own_images(tmp_path: Path) -> None:
    data = config(photographs(tmp_path / "set", [(32, 32)]), cache="device")
    chosen = [7, 3, 11, 0, 5, 9, 2, 1]
    found = Subset(open_source(data, "train"), chosen)
    plain = Subset(open_source(replace(data, cache="none"), "train"), chosen)
    a = list(eval_loader(found, data))
    assert same(a, list(eval_loader(plain, replace(data, cache="none"))))


def test_too_little_memory_is_said_before_all_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mim.data.storage import cache

    data = config(photographs(tmp_path / "set", [(32, 32)]), cache="memory")
    monkeypatch.setattr(
        cache.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10})
    )
    with pytest.raises(UserError, match=r"data\.cache: 'memory' needs about .* choose mmap"):
        open_source(data, "train")


@pytest.mark.parametrize("kind", ["pixels", "shards"])
def test_a_packed_set_gives_the_batches_of_its_source(tmp_path: Path, kind: str) -> None:
    data = config(photographs(tmp_path / "set", [(32, 40), (30, 30)]))
    pack(data, tmp_path / "out", Recipe(kind=kind, part_images=10), workers=0)
    packed = replace(data, source="packed", path=str(tmp_path / "out"))
    plain = batches(data)
    assert same(batches(packed), plain)
    assert same(batches(replace(packed, workers=2)), plain)
    assert open_source(packed, "train").classes == ["class0", "class1", "class2"]
    if kind == "shards":
        with tarfile.open(tmp_path / "out/train-00001.tar") as tar:
            names = tar.getnames()
            first = names[0].partition(".")[0]
            assert names[:3] == [f"{first}.json", f"{first}.cls", f"{first}.jpg"]
            told = json.loads(tar.extractfile(names[0]).read())  # type: ignore[union-attr]
            inside = tar.extractfile(names[2]).read()  # type: ignore[union-attr]
        assert inside == (tmp_path / "set" / told["name"]).read_bytes()


def test_sizes_of_packed_pixels(tmp_path: Path) -> None:
    data = config(photographs(tmp_path / "set", [(60, 90), (20, 30)], count=6), batch_size=2)
    pack(data, tmp_path / "short", Recipe(size=40))
    pack(data, tmp_path / "square", Recipe(size=40, square=True))
    short = open_source(replace(data, source="packed", path=str(tmp_path / "short")), "train")
    square = open_source(replace(data, source="packed", path=str(tmp_path / "square")), "train")
    # Never enlarged, but for squares, which must all have one size.
    assert {np.asarray(short.image(i)).shape for i in range(6)} == {(40, 60, 3), (20, 30, 3)}
    assert {np.asarray(square.image(i)).shape for i in range(6)} == {(40, 40, 3)}


class Killed(BaseException):
    pass


def test_a_killed_packing_goes_on_and_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(photographs(tmp_path / "set", [(32, 32)]))
    recipe = Recipe(part_images=5)
    pack(data, tmp_path / "whole", recipe)
    reads: list[range] = []
    read_span: Callable[..., object] = pack_module.read_span

    def dies(source: object, how: object, span: range) -> object:
        reads.append(span)
        if len(reads) == 3:
            raise Killed
        return read_span(source, how, span)

    monkeypatch.setattr(pack_module, "read_span", dies)
    with pytest.raises(Killed):
        pack(data, tmp_path / "out", recipe)
    with pytest.raises(UserError, match=r"data\.path: .*its packing has not ended"):
        open_source(replace(data, source="packed", path=str(tmp_path / "out")), "train")
    # A part that was damaged meanwhile is packed again too.
    first = tmp_path / "out/train-00000.bin"
    first.write_bytes(first.read_bytes()[::-1])
    pack(data, tmp_path / "out", recipe)
    assert [span.start for span in reads[:3]] == [0, 5, 10]
    assert [span.start for span in reads[3:]] == [0, 10, 15, 20, 0, 5, 10, 15, 20]
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    count = len(reads)
    pack(data, tmp_path / "out", recipe)  # checked and kept
    assert len(reads) == count


def test_damage_and_other_images_are_refused(tmp_path: Path) -> None:
    data = config(photographs(tmp_path / "set", [(32, 32)], count=8))
    out = tmp_path / "out"
    pack(data, out, Recipe())
    with pytest.raises(UserError, match=r"OUT: .* other images or another kind"):
        pack(data, out, Recipe(size=20))
    path = out / "val-00000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"val-00000\.bin is damaged"):
        verify(out)
    path.write_bytes(content[:-1])
    packed = replace(data, source="packed", path=str(out))
    with pytest.raises(UserError, match=r"is damaged: val-00000\.bin has not its size"):
        open_source(packed, "val")
    (out / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"is no packed set: has no manifest\.json"):
        open_source(packed, "train")
    with pytest.raises(UserError, match=r"--kind: 'zip' is not one of pixels, shards"):
        Recipe(kind="zip")
    with pytest.raises(UserError, match=r"shards hold the files as they are"):
        Recipe(kind="shards", size=256)


def test_packing_from_the_command_line(tmp_path: Path, mim: Callable[..., object]) -> None:
    root = photographs(tmp_path / "set", [(32, 32)], count=8)
    (root / "train/class0/000.jpg").write_bytes(b"")
    out = tmp_path / "a b"
    refused = mim("data", "pack", root, out, "--workers", 0)
    assert refused.code == 2 and "data.max_unreadable" in refused.line  # type: ignore[attr-defined]
    (root / "train/class0/000.jpg").unlink()
    done = mim("data", "pack", root, out, "--size", 16, "--workers", 0)
    assert done.code == 0  # type: ignore[attr-defined]
    assert done.out.splitlines() == [  # type: ignore[attr-defined]
        "train: 7 images, 0.00 GB",
        "val: 8 images, 0.00 GB",
        f"--data.source packed --data.path '{out}'",
    ]
    wrong = mim("data", "pakc", root, out)
    assert wrong.code == 2  # type: ignore[attr-defined]
