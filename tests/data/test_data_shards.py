"""Tar shards: what a folder gives, at any packing; URLs that fail; shards that end early."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.rng import name_to_int
from mim.data import Batch, ImageSource, eval_loader, open_source, train_loader
from mim.data.places import fetch
from mim.data.places.places import expand
from mim.data.sources import shards


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_folder(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pictures(train: int = 20, val: int = 4) -> dict[str, bytes]:
    """Images of two classes, named so that folders and paths sort differently."""
    return {
        f"{split}/{'a' if i % 2 else 'a-b'}/{i:02}.jpg": jpeg(i + 100 * (split == "val"))
        for split, count in (("train", train), ("val", val))
        for i in range(count)
    }


def config(source: str, path: object, **settings: object) -> DataConfig:
    given = {"image_size": 8, "batch_size": 6, **settings}
    return DataConfig(source=source, path=str(path), **given)  # type: ignore[arg-type]


def batches(given: DataConfig, start: int = 0, stop: int = 7) -> list[Batch]:
    source = open_source(given, "train")
    return list(train_loader(source, given, 3, start_step=start, total_steps=stop))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.sample_ids, b.sample_ids)
        assert a.labels is not None and b.labels is not None and torch.equal(a.labels, b.labels)


def packed(root: Path, members: dict[str, bytes], count: int) -> str:
    """The images in any order over several shards, in folders; a pattern with braces."""
    names = sorted(members, key=lambda name: name_to_int(name))
    for number in range(count):
        part = {name: members[name] for name in names[number::count]}
        write_tar(root / f"part-{number:03}.tar", part)
    return f"{root}/part-{{000..{count - 1:03}}}.tar"


@pytest.mark.parametrize("count", [1, 3])
def test_shards_of_a_folder_give_the_folder(tmp_path: Path, count: int) -> None:
    members = pictures()
    folder = config("imagefolder", write_folder(tmp_path / "folder", members))
    tars = config("shards", packed(tmp_path / "tars", members, count))
    assert_same(batches(folder), batches(tars))
    for split in ("train", "val"):
        one, two = open_source(folder, split), open_source(tars, split)
        assert one.classes == two.classes == ["a", "a-b"]
        assert torch.equal(one.sample_ids, two.sample_ids)
        for a, b in zip(eval_loader(one, folder), eval_loader(two, tars), strict=True):
            assert torch.equal(a.images, b.images)


def test_resume_workers_and_processes_are_exact(tmp_path: Path) -> None:
    pattern = packed(tmp_path, pictures(), 3)
    given = config("shards", pattern)
    whole = batches(given)
    assert_same(whole[4:], batches(given, start=4))
    assert_same(whole[2:], batches(config("shards", pattern, workers=2), start=2))
    source = open_source(given, "train")
    shares = [
        list(train_loader(source, given, 3, start_step=0, total_steps=7, rank=rank, world=2))
        for rank in (0, 1)
    ]
    for expected, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(expected.images, torch.cat([part.images for part in parts]))


def test_a_resume_reads_only_what_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config("shards", packed(tmp_path, pictures(), 3))
    source = open_source(given, "train")
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: read.append(1) or pread(*a))
    list(train_loader(source, given, 3, start_step=5, total_steps=6))
    assert len(read) == 6


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_webdataset_samples(tmp_path: Path, kind: str) -> None:
    def sample(number: int) -> dict[str, bytes]:
        label = number % 3
        text = str(label) if kind == "cls" else json.dumps({"label": label, "caption": "x"})
        return {f"{number:05}.jpg": jpeg(number), f"{number:05}.{kind}": text.encode()}

    for name, numbers in (("train-0", range(5)), ("train-1", range(5, 9)), ("val-0", range(9, 12))):
        members = dict(itertools.chain(*(sample(n).items() for n in numbers)))
        write_tar(tmp_path / f"{name}.tar", members)
    (tmp_path / "classes.txt").write_text("cat\ndog\nhen\n")
    given = config("shards", tmp_path)
    train, val = open_source(given, "train"), open_source(given, "val")
    assert train.classes == ["cat", "dog", "hen"] and (len(train), len(val)) == (9, 3)
    for source in (train, val):
        assert source.labels is not None
        for position in range(len(source)):
            number = int(source.describe(position).removesuffix(".jpg"))
            assert source.labels[position] == number % 3
            expected = np.asarray(Image.open(io.BytesIO(jpeg(number))))
            assert np.array_equal(np.asarray(source.image(position)), expected)
    again = pickle.loads(pickle.dumps(train))
    assert again.fingerprint() == train.fingerprint()


def test_images_alone_have_no_labels_and_a_share_is_held_out(tmp_path: Path) -> None:
    for shard in "ab":  # the same names in both
        write_tar(tmp_path / f"{shard}.tar", {f"{n}.jpg": jpeg(n) for n in range(10)})
    given = config("shards", f"{tmp_path}/*.tar", val_fraction=0.2)
    train, val = open_source(given, "train"), open_source(given, "val")
    assert (len(train), len(val), train.labels) == (16, 4, None)
    ids = torch.cat([train.sample_ids, val.sample_ids])
    expected = {name_to_int(f"{shard}.tar/{n}.jpg") for shard in "ab" for n in range(10)}
    assert set(ids.tolist()) == expected


def test_val_shards_of_their_own(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "x" / "one.tar", {f"c/{n}.jpg": jpeg(n) for n in range(4)})
    two = write_tar(tmp_path / "y" / "two.tar", {f"c/{n}.jpg": jpeg(n) for n in range(4, 6)})
    val = open_source(config("shards", one, val_path=str(two)), "val")
    assert [val.describe(i) for i in range(len(val))] == ["c/4.jpg", "c/5.jpg"]


def test_braces() -> None:
    assert expand("a-{008..011}.tar") == [f"a-{n:03}.tar" for n in range(8, 12)]
    assert expand("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand("{9..10}") == ["9", "10"]
    with pytest.raises(ValueError, match="no range"):
        expand("{a..b}")


def test_the_scan_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "one.tar", pictures())
    first = open_source(config("shards", path), "train")

    def never(_: Path) -> None:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "scan", never)
        assert open_source(config("shards", path), "train").fingerprint() == first.fingerprint()
    write_tar(path, pictures(train=22))  # another file under the same name
    assert len(open_source(config("shards", path), "train")) == 22


@pytest.mark.parametrize("cut", ["in an image", "between images", "in a header"])
def test_a_shard_that_ends_early_is_refused(tmp_path: Path, cut: str) -> None:
    path = write_tar(tmp_path / "one.tar", pictures())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[7]
    at = {"in an image": member.offset_data + 100, "between images": member.offset}
    path.write_bytes(path.read_bytes()[: at.get(cut, member.offset + 300)])
    with pytest.raises(
        UserError, match=r"shard .*one\.tar' ends early .* after \d+ whole"
    ) as error:
        open_source(config("shards", path), "train")
    assert "\n" not in str(error.value)


def test_a_shard_that_shrinks_under_a_run(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "one.tar", pictures())
    given = config("shards", path, max_unreadable=0.6)
    source = open_source(given, "train")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert len(list(train_loader(source, given, 3, start_step=0, total_steps=3))) == 3
    strict = config("shards", path, max_unreadable=0.6)
    assert source.ledger is not None and len(source.ledger) > 0
    source.ledger.limit = 0.0
    source.ledger._known.clear()
    with pytest.raises(UserError, match=r"data\.max_unreadable.* of 20 .*shard one\.tar ends"):
        list(train_loader(source, strict, 3, start_step=0, total_steps=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "absent.tar", r"data\.path: .* has no file .*absent\.tar"),
        (lambda root: f"{root}/x-{{a..b}}.tar", r"data\.path: .* no range of whole numbers"),
        (lambda root: root, r"data\.path: .* names no \.tar files"),
        (lambda root: write_tar(root / "e.tar", {"a.txt": b""}), r"has no images in its shards"),
    ],
)
def test_bad_places(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(config("shards", make(tmp_path)), "train")  # type: ignore[operator]


def test_compressed_shards_and_mixed_labels_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(UserError, match="is compressed"):
        open_source(config("shards", tmp_path / "a.tar"), "train")
    write_tar(tmp_path / "b.tar", {"0.jpg": jpeg(0), "0.cls": b"1", "1.jpg": jpeg(1)})
    with pytest.raises(UserError, match=r"has 1 images without \.cls or \.json, and 1 with"):
        open_source(config("shards", tmp_path / "b.tar"), "train")


# ---- by URL


@pytest.mark.filterwarnings("ignore:http:UserWarning")
def test_a_url_that_fails_then_recovers(tmp_path: Path, server: tuple[str, type[Any]]) -> None:
    url, kind = server
    members = pictures()
    packed(kind.root, members, 2)
    sums = [f"{sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in kind.root.glob("*.tar")]
    (kind.root / "SHA256SUMS").write_text("".join(sums))
    kind.failures, kind.cuts = 2, 3
    remote = config("shards", f"{url}/part-{{000..001}}.tar")
    folder = config("imagefolder", write_folder(tmp_path / "folder", members))
    assert_same(batches(folder), batches(remote))
    assert any("bytes=" in asked for asked in kind.asked)  # it went on where it was cut
    before = len(kind.asked)
    assert_same(batches(folder), batches(remote))  # fetched once
    assert len(kind.asked) == before


@pytest.mark.filterwarnings("ignore:http:UserWarning")
def test_a_url_that_stays_down_or_lies(server: tuple[str, type[Any]]) -> None:
    url, kind = server
    write_tar(kind.root / "a.tar", pictures())
    with pytest.raises(UserError, match=r"b\.tar: .*404"):
        open_source(config("shards", f"{url}/b.tar"), "train")
    kind.failures = 100
    with pytest.raises(UserError, match=r"failed 6 times, at last: .*503"):
        open_source(config("shards", f"{url}/a.tar"), "train")
    kind.failures = 0
    (kind.root / "SHA256SUMS").write_text(f"{'0' * 64}  a.tar\n")
    with pytest.raises(UserError, match=r"a\.tar: failed 6 times, at last: SHA-256 is"):
        open_source(config("shards", f"{url}/a.tar"), "train")


def streamed(url: str, **settings: object) -> DataConfig:
    return config("shards", f"{url}/part-{{000..002}}.tar", streaming=True, **settings)


@pytest.mark.filterwarnings("ignore:http:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_shards_are_the_folder_and_nothing_is_kept(
    tmp_path: Path, server: tuple[str, type[Any]], workers: int
) -> None:
    url, kind = server
    members = pictures()
    packed(kind.root, members, 3)
    folder = config("imagefolder", write_folder(tmp_path / "folder", members))
    kind.failures, kind.cuts = 2, 3
    far = streamed(url, workers=workers)
    whole = batches(folder)
    assert_same(whole, batches(far))
    kind.failures, kind.cuts = 2, 1  # the second time from the index that was kept
    assert_same(whole[4:], batches(far, start=4))
    for one, two in zip(
        eval_loader(open_source(folder, "val"), folder),
        eval_loader(open_source(far, "val"), far),
        strict=True,
    ):
        assert torch.equal(one.images, two.images)
    assert not list((tmp_path / "cache").rglob("*.tar*"))


def test_a_streamed_resume_reads_its_own_images_alone(server: tuple[str, type[Any]]) -> None:
    url, kind = server
    packed(kind.root, pictures(), 3)
    far = streamed(url)
    source = open_source(far, "train")
    kind.asked.clear()
    (batch,) = train_loader(source, far, 3, start_step=5, total_steps=6)
    assert len(kind.asked) == len(batch) == 6 and all("bytes=" in line for line in kind.asked)
    kind.asked.clear()
    open_source(far, "train")  # the index is kept: one request a shard tells its version
    assert len(kind.asked) == 3
    kind.version = None  # nothing tells whether the index still fits
    open_source(far, "train")
    assert len(kind.asked) > 6


@pytest.mark.parametrize("change", ["version", "size"])
def test_a_streamed_shard_that_changes_stops_the_run(
    server: tuple[str, type[Any]], change: str
) -> None:
    url, kind = server
    members = pictures()
    packed(kind.root, members, 3)
    far = streamed(url)
    source = open_source(far, "train")
    if change == "version":
        kind.version = '"2"'
    else:
        packed(kind.root, pictures(train=40), 3)
    with pytest.raises(UserError, match=r"part-00\d\.tar: the file has changed since"):
        list(train_loader(source, far, 3, start_step=0, total_steps=1))


def test_a_server_without_ranges_is_fetched_from(
    tmp_path: Path, server: tuple[str, type[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    url, kind = server
    members = pictures()
    packed(kind.root, members, 3)
    kind.ranges = False
    folder = config("imagefolder", write_folder(tmp_path / "folder", members))
    assert_same(batches(folder), batches(streamed(url)))
    (record,) = caplog.records
    assert record.getMessage().startswith("data.streaming: 3 files, of them http")
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3


def test_classes_of_streamed_webdataset_shards(server: tuple[str, type[Any]]) -> None:
    url, kind = server
    for shard in range(3):
        one = {f"{shard}{n}.jpg": jpeg(n) for n in range(4)}
        one |= {f"{shard}{n}.cls": str(n % 2).encode() for n in range(4)}
        write_tar(kind.root / f"part-00{shard}.tar", one)
    (kind.root / "classes.txt").write_text("cat\ndog\n")
    source = open_source(streamed(url), "train")
    assert source.classes == ["cat", "dog"] and source.labels is not None
    for position in range(len(source)):
        assert source.labels[position] == int(source.describe(position)[1]) % 2


def test_what_cannot_be_streamed(server: tuple[str, type[Any]]) -> None:
    url, kind = server
    with pytest.raises(UserError, match=r"data\.streaming: True needs data\.source=shards"):
        DataConfig(source="imagefolder", streaming=True)
    with pytest.raises(UserError, match=r"part-000\.tar: .*404"):
        open_source(streamed(url), "train")
    for shard in range(3):
        write_tar(kind.root / f"part-00{shard}.tar", pictures())
    path = kind.root / "part-001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"shard 'http.*part-001\.tar' ends early"):
        open_source(streamed(url), "train")


def test_real_cifar10_from_folder_and_shards(tmp_path: Path) -> None:
    archive = Path(os.environ.get("MIM_TEST_DATA", "../shared/data")) / "cifar10.tar.gz"
    if not archive.is_file():
        pytest.skip("no cifar10.tar.gz in $MIM_TEST_DATA")
    members = {}
    with tarfile.open(archive) as tar:
        for entry in itertools.islice((e for e in tar if e.isfile()), 300):
            content = tar.extractfile(entry)
            assert content is not None
            members[entry.name.removeprefix("./")] = content.read()
    assert all(name.endswith(".jpg") for name in members)
    settings = {"image_size": 32, "batch_size": 40}
    folder = config("imagefolder", write_folder(tmp_path / "folder", members), **settings)
    tars = config("shards", packed(tmp_path / "tars", members, 4), **settings)
    source: ImageSource = open_source(tars, "train")
    assert source.labels is not None
    assert_same(batches(folder, stop=5), batches(tars, stop=5))
