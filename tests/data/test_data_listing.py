"""The list of a large folder: kept, noticed to be old, small in memory, shared with workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import ImageSource, open_source
from mim.data.places import listing
from mim.data.places.names import Names
from mim.data.sources import folder as folder_module

CLASSES, DEEP, EACH = 60, 2, 20  # 120 folders, 2,400 files


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 100)
    monkeypatch.setattr(listing, "_SETTLED", -3600.0)  # the folders of a test are always new
    monkeypatch.setattr(folder_module, "HEADERS_CHECKED", 0)  # the files are empty


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Empty files that are named as images: listing them opens none."""
    for label in range(CLASSES):
        for deep in range(DEEP):
            place = tmp_path / "set/train" / f"c{label:02}" / f"d{deep}"
            place.mkdir(parents=True)
            for number in range(EACH):
                (place / f"{number:02}.jpg").touch()
    return tmp_path / "set"


@pytest.fixture
def walks(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the tree that were read, one entry a reading."""
    read: list[str] = []
    scandir = os.scandir

    def note(path: str) -> object:
        if Path(path).is_relative_to(tree):  # the cache's own folder is read when it is written
            read.append(os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", note)
    return read


def opened(root: Path, source: str = "imagefolder", **settings: object) -> ImageSource:
    return open_source(DataConfig(source=source, path=str(root), **settings), "train")  # type: ignore[arg-type]


def same(one: ImageSource, other: ImageSource) -> bool:
    told = [[s.describe(index) for index in range(len(s))] for s in (one, other)]
    return one.fingerprint() == other.fingerprint() and told[0] == told[1]


@pytest.mark.parametrize("source", ["imagefolder", "flat"])
def test_a_list_is_made_once(tree: Path, walks: list[str], source: str) -> None:
    first = opened(tree, source)
    once = len(walks)
    assert once > CLASSES * DEEP
    walks.clear()
    again = opened(tree, source)
    assert len(walks) <= 2  # the root and train/, for the names of the classes
    assert same(first, again)
    walks.clear()
    plain = opened(tree, source, index_cache=False)
    assert len(walks) == once
    assert same(plain, again)


def _add(tree: Path) -> None:
    (tree / "train/c03/d1/new.jpg").touch()


def _remove(tree: Path) -> None:
    (tree / "train/c03/d1/05.jpg").unlink()


def _rename(tree: Path) -> None:
    (tree / "train/c03/d1/05.jpg").rename(tree / "train/c03/d1/55.jpg")


def _deeper(tree: Path) -> None:
    (tree / "train/c03/d1/e/f").mkdir(parents=True)
    (tree / "train/c03/d1/e/f/new.jpg").touch()


def _new_class(tree: Path) -> None:
    (tree / "train/c99").mkdir()
    (tree / "train/c99/new.jpg").touch()


def _set_back(tree: Path) -> None:
    """As tools that copy times do."""
    place = tree / "train/c03/d1"
    before = place.stat()
    (place / "new.jpg").touch()
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [_add, _remove, _rename, _deeper, _new_class, _set_back])
@pytest.mark.parametrize("source", ["imagefolder", "flat"])
def test_a_changed_folder_is_seen(tree: Path, source: str, change: Callable[[Path], None]) -> None:
    before = opened(tree, source)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    change(tree)
    after = opened(tree, source)
    assert not same(before, after)
    assert same(after, opened(tree, source, index_cache=False))
    assert same(after, opened(tree, source))  # kept in the place of the old one
    assert len(list((tree.parent / "cache/listings").iterdir())) == 1


def test_a_folder_that_changed_just_now_is_not_trusted(
    tree: Path, walks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_SETTLED", 2.0)
    opened(tree)
    assert not (tree.parent / "cache").exists()


def test_small_folders_leave_nothing_behind(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "KEPT_FROM", CLASSES * DEEP * EACH + 1)
    opened(tree)
    assert not (tree.parent / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_list_is_made_anew(tree: Path, walks: list[str], damage: str) -> None:
    first = opened(tree)
    once = len(walks)
    (kept,) = (tree.parent / "cache/listings").iterdir()
    whole = kept.read_bytes()
    middle = len(whole) // 2
    kept.write_bytes(
        {
            "cut": whole[:middle],
            "empty": b"",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
            "other": b"no list at all",
        }[damage]
    )
    walks.clear()
    assert same(opened(tree), first)
    assert len(walks) == once
    walks.clear()
    assert same(opened(tree), first)
    assert len(walks) < once


def test_a_cache_that_cannot_be_written_is_said(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tree.parent / "file"
    blocked.touch()
    monkeypatch.setenv("MIM_CACHE", str(blocked))
    with pytest.warns(UserWarning, match=r"not kept for later runs: .*MIM_CACHE"):
        source = opened(tree)
    assert same(source, opened(tree, index_cache=False))


def test_an_empty_class_is_refused_also_from_the_cache(tree: Path) -> None:
    (tree / "train/c99").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match=r"has an empty class: no image in .*c99"):
            opened(tree)


def test_names_are_those_given() -> None:
    given = ["a", "", "wäre/ß.jpg", os.fsdecode(b"not\xffutf8"), "b" * 300]
    names = Names.of(iter(given))
    assert list(names) == given == [names[index] for index in range(5)]
    assert names[-1] == given[-1] and len(names) == 5
    with pytest.raises(IndexError):
        names[5]
    assert list(Names.of([])) == []


_MILLION = """
import ctypes, json
from multiprocessing.reduction import ForkingPickler
import numpy as np
import psutil, torch, torch.multiprocessing
from pathlib import Path
from mim.core.config import DataConfig, SubsetConfig
from mim.data import open_source
from mim.data.places import listing
from mim.data.sources import folder, shards
from mim.core.rng import permutation

CLASSES, EACH = 1000, 1000
MB = 1 << 20

def fake(root, name, places, times, left_out):
    places.append(name)
    times.append((1, 1))
    return [f"{name}/{name[-9:]}_{number:08d}.JPEG" for number in range(EACH)]

def held():
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_full_info().uss

def tar(path):
    names = [f"{path.stem}/{n % 99}/{n:07d}.JPEG".encode() for n in range(CLASSES * EACH // 10)]
    numbers = np.arange(len(names))
    return shards.ShardIndex(np.array(names), numbers, numbers,
                             numbers * 0 + np.iinfo(np.int64).min, np.array("{}"))

class Look(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source
    def __len__(self):
        return 2
    def __getitem__(self, step):
        before = psutil.Process().memory_full_info().uss
        for index in range(step, len(self.source), 101):
            self.source.describe(index), int(self.source.sample_ids[index])
        return psutil.Process().memory_full_info().uss - before

if __name__ == "__main__":
    below = [f"n{number:08d}" for number in range(CLASSES)]
    folder.folders_in = lambda path: ["train"] if path == Path("/none") else below
    listing._files = fake
    Path.is_dir = lambda self: True
    subset = SubsetConfig(classes=990, fraction=0.99)
    config = DataConfig(source="imagefolder", path="/none", subset=subset, index_cache=False)
    permutation(0, 0, 1000)  # what torch loads when it is first used counts for nothing here
    before = held()
    source = open_source(config, "train")
    source.fingerprint()
    order = source.order(0, 0)
    mine = held() - before
    below, tensors = source, {}
    while below is not None:
        for value in (*vars(below).values(), *vars(getattr(below, "_names", 0) or object).values()):
            if isinstance(value, torch.Tensor):
                tensors[value.data_ptr()] = value.nbytes
        below = getattr(below, "source", None)
    # What has to be written to a worker; tensors are put into shared memory.
    sent = len(ForkingPickler.dumps(source))
    loader = torch.utils.data.DataLoader(
        Look(source), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    grown = max(loader) / MB
    told = {"images": len(source), "first": source.describe(0)}
    del source, order, below, loader, value
    before = held()
    shards.divide = lambda config, ending: ([Path(f"{n}.tar") for n in range(10)], [])
    shards.read_index = tar
    source = open_source(DataConfig(source="shards", path="/none"), "train")
    shard = (held() - before) / MB
    told |= {"folder": mine / MB, "tensors": sum(tensors.values()) / MB, "grown": grown}
    print(json.dumps({**told, "sent": sent / MB, "shards": shard, "in_shards": len(source)}))
"""


def test_a_million_images_take_less_than_200_mb(tmp_path: Path) -> None:
    """A simulated listing: the index, three subsets of it and an epoch's order; two workers."""
    script = tmp_path / "million.py"
    script.write_text(_MILLION)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert 800_000 < told["images"] < 1_000_000 and told["in_shards"] == 900_000  # of a million
    assert told["first"].startswith("train/n000")
    assert told["tensors"] < 1.1 * told["folder"] and told["folder"] < 200, told
    assert told["shards"] < 200, told
    assert told["sent"] < 1, told
    assert told["grown"] < 20, told  # by a worker that reads all over the index
