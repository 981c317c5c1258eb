"""What was kept of images is never taken for others: fingerprints, caches and packed sets."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.fingerprints import same_images
from mim.data import open_source
from mim.data.storage.pack import pack
from mim.data.storage.packed import MANIFEST, Recipe


def png(value: int, size: int = 8) -> bytes:
    """A file of the same length for every gray value, as BMP files have."""
    file = io.BytesIO()
    Image.new("L", (size, size), value).save(file, "BMP")
    return file.getvalue()


def images(root: Path, value: int, count: int = 12) -> Path:
    for number in range(count):
        path = root / f"train/{number % 2}/{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value + number))
    return root


def tar(path: Path, value: int) -> Path:
    with tarfile.open(path, "w") as file:
        for number in range(12):
            info = tarfile.TarInfo(f"train/{number % 2}/{number}.bmp")
            info.size = len(png(0))
            file.addfile(info, io.BytesIO(png(value + number)))
    return path


def parquet(path: Path, value: int) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    rows = [{"image": png(value + n), "label": n % 2} for n in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none")
    return path


def given(source: str, path: Path, **settings: Any) -> DataConfig:
    return DataConfig(source=source, path=str(path), image_size=8, channels=1, **settings)


def grays(config: DataConfig) -> list[int]:
    source = open_source(config, "train")
    return sorted(int(np.asarray(source.image(i)).flat[0]) for i in range(len(source)))


def write(source: str, path: Path, value: int) -> Path:
    """A set of the same names, ids and sizes, whatever it shows."""
    if source == "imagefolder":
        return images(path, value)
    if source == "shards":
        return tar(path, value)
    if source == "huggingface":
        return parquet(path, value)
    pack(
        given("imagefolder", images(path.with_name(f"{path.name}-of-{value}"), value)),
        path,
        Recipe(),
    )
    return path


@pytest.mark.parametrize("source", ["imagefolder", "shards", "huggingface", "streamed", "packed"])
def test_a_cache_of_other_pixels_is_not_used(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "index"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    kind = "huggingface" if source == "streamed" else source
    streaming = source == "streamed"
    for folder, value in (("one", 0), ("two", 100)):
        (tmp_path / folder).mkdir()
        path = write(kind, tmp_path / folder / "set.x", value)
        config = given(
            kind, path, cache="mmap", cache_path=str(tmp_path / "c"), streaming=streaming
        )
        plain = replace(config, cache="none")
        assert grays(config) == grays(plain) and min(grays(config)) >= value
    # The same place with other images; the recipe is part of the key too.
    if source != "packed":
        write(kind, path, 50)
        os.utime(path, ns=(1, 1))
        assert grays(config) == grays(plain) and max(grays(config)) < 70
    smaller = replace(config, max_pixels=10)
    if source != "packed":  # whose pixels are decoded already
        with pytest.raises(UserError, match="unreadable"):
            grays(smaller)


def test_a_cache_sees_a_change_that_no_sample_shows(tmp_path: Path) -> None:
    root = images(tmp_path / "set", 0, count=200)
    save = Image.new("L", (8, 8), 0).save
    for number in range(200):
        save(root / f"train/{number % 2}/{number}.bmp", "BMP")
    config = given("imagefolder", root, cache="mmap", cache_path=str(tmp_path / "cache"))
    assert set(grays(config)) == {0}
    plain = replace(config, cache="none")
    source = open_source(plain, "train")
    before = source.fingerprint()
    for index in range(4):  # of which a sample of 128 of 180 leaves out one at least
        (root / source.describe(index)).write_bytes(png(7))
        if open_source(plain, "train").fingerprint() == before:
            break
        (root / source.describe(index)).write_bytes(png(0))
    else:
        raise AssertionError("every image is looked at")
    assert int(np.asarray(open_source(config, "train").image(index)).flat[0]) == 7


@pytest.mark.parametrize("source", ["imagefolder", "shards", "huggingface", "packed"])
def test_fingerprints_follow_the_pixels_and_not_times_or_places(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "index"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    seen = {}
    for folder, value in (("one", 0), ("copy", 0), ("other", 100)):
        (tmp_path / folder).mkdir()
        path = write(source, tmp_path / folder / "set.x", value)
        os.utime(path, ns=(value + 10**9, 10**9))
        seen[folder] = open_source(given(source, path), "train").fingerprint()
    assert seen["one"] == seen["copy"] != seen["other"]
    ids = [fingerprint.partition(".")[0] for fingerprint in seen.values()]
    assert len(set(ids)) == 1  # names and labels are the same


def test_fingerprints_of_segmentation_follow_images_and_masks(tmp_path: Path) -> None:
    from mim.evaluate.dense.segmentation_data import SegmentationSpec, open_segmentation

    for kind in ("images", "masks"):
        for split in ("train", "val"):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.bmp").write_bytes(png(number % 2))
    spec = SegmentationSpec(path=str(tmp_path), classes=("a", "b"))
    seen = {open_segmentation(spec, "train").fingerprint()}
    for kind in ("images", "masks"):
        (tmp_path / kind / "train/2.bmp").write_bytes(png(1))
        seen.add(open_segmentation(spec, "train").fingerprint())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("saved", "seen", "same"),
    [
        ("a.1-b.2", "a.1-b.2", True),
        ("a-b", "a.1-b.2", True),  # of an earlier version
        ("a.1-b.2", "a.1-b.3", False),
        ("a.1-b.2", "a.1-c.2", False),
        ("a-b", "c.1-b.2", False),
        ("of other images", "a.1-b.2", False),
        ("a.1", "a.1-b.2", False),
    ],
)
def test_fingerprints_of_earlier_versions_are_compared_as_far_as_they_go(
    saved: str, seen: str, same: bool
) -> None:
    assert same_images(saved, seen) is same is same_images(seen, saved)


def test_a_run_is_not_resumed_over_other_pixels_of_the_same_names(
    tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    root = images(tmp_path / "set", 0, count=80)
    changes = {"data.source": "imagefolder", "data.path": str(root), "data.batch_size": 8}
    config = tiny(changes | {"train.max_steps": 2, "train.checkpoint_every": 1})
    run = tmp_path / "run"
    assert mim("pretrain", "--config", config, "--output", run, "--train.stop_at", 1).code in (0, 2)
    first = mim("pretrain", "--config", config, "--output", run)
    assert first.code == 0, first.err
    result = run / "result.json"
    told = json.loads(result.read_text())
    result.write_text(json.dumps(told | {"status": "interrupted"}))
    before = (root / "train/0/0.bmp").read_bytes()
    # Another image under an old name, of the same size in bytes.
    (root / "train/0/0.bmp").write_bytes(png(255))
    again = mim("pretrain", "--config", config, "--output", run, "--resume", "auto")
    assert again.code == 2 and "contents have changed" in again.line
    # Nor are numbers on them added to the run's.
    measure = ("evaluate", "knn", run, "--set", "k=[1]", "few_shot=[]")
    assert "data.fingerprint" in mim(*measure).line
    assert mim(*measure, "--data", root).code == 0
    (root / "train/0/0.bmp").write_bytes(before)
    assert mim(*measure).code == 0


def test_packing_replaced_images_is_refused_and_touched_ones_are_kept(tmp_path: Path) -> None:
    root = images(tmp_path / "set", 0)
    config, out = given("imagefolder", root), tmp_path / "out"
    pack(config, out, Recipe())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for path in root.rglob("*.bmp"):  # as a copy of the folder has other times
        os.utime(path, ns=(5, 5))
    pack(config, out, Recipe())
    # An earlier version wrote no key, and a fingerprint of names and labels alone.
    manifest = json.loads((out / MANIFEST).read_text())
    for entry in manifest["splits"].values():
        del entry["key"]
        entry["source"] = entry["source"].partition(".")[0]
    (out / MANIFEST).write_text(json.dumps(manifest))
    pack(config, out, Recipe())
    assert {path.name for path in out.iterdir()} == set(before)
    (root / "train/0/0.bmp").write_bytes(png(200))
    with pytest.raises(UserError, match="other images or another kind"):
        pack(config, out, Recipe())


def test_a_packing_begun_over_other_images_keeps_none_of_their_pixels(tmp_path: Path) -> None:
    root = images(tmp_path / "set", 0, count=30)
    config, out = given("imagefolder", root), tmp_path / "out"
    pack(config, out, Recipe(part_images=2))
    (out / MANIFEST).unlink()  # as if killed before the end; and then there are fewer images
    (out / ".train-00000.bin.abc.tmp").write_bytes(b"half")
    for number in range(12, 30):
        (root / f"train/{number % 2}/{number}.bmp").unlink()
    images(root, 100)
    pack(config, out, Recipe(part_images=2))
    assert min(grays(given("packed", out))) >= 100
    pack(config, tmp_path / "whole", Recipe(part_images=2))
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="locks are the system's")
def test_two_packings_do_not_write_into_one_folder(tmp_path: Path) -> None:
    config = given("imagefolder", images(tmp_path / "set", 0))
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from mim.core.lock import sole_use\n"
        "with sole_use(Path(sys.argv[1])):\n print('in', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"in\n"
    try:
        with pytest.raises(UserError, match=r"OUT: .* is in use by process"):
            pack(config, out, Recipe())
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    pack(config, out, Recipe())  # a killed process leaves no lock
