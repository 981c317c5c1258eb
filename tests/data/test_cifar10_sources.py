"""CIFAR-10 from every place and cache: the same bytes in every batch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from mim.core.config import DataConfig
from mim.data import Batch, eval_loader, open_source, train_loader
from mim.data.storage.pack import pack
from mim.data.storage.packed import Recipe

CLASSES = 10
TARS = 4


def _unpack(root: Path) -> None:
    """A folder and tars of the same files, the tars in the archive's order turn by turn."""
    archive = Path(os.environ.get("MIM_TEST_DATA", "../shared/data")) / "cifar10.tar.gz"
    if not archive.is_file():
        pytest.skip("no cifar10.tar.gz in $MIM_TEST_DATA")
    (root / "tars").mkdir()
    taken = 0
    with tarfile.open(archive) as every, contextlib.ExitStack() as stack:
        places = [root / f"tars/all-{number}.tar" for number in range(TARS)]
        tars = [stack.enter_context(tarfile.open(place, "w")) for place in places]
        for entry in every:
            name = entry.name.removeprefix("./")
            if not entry.isfile():
                continue
            file = every.extractfile(entry)
            assert file is not None
            path = root / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
            tars[taken % TARS].add(path, arcname=name)
            taken += 1


def _digest(batch: Batch) -> str:
    digest = hashlib.blake2b(batch.images.cpu().contiguous().numpy())
    digest.update(batch.sample_ids.numpy())
    assert batch.labels is not None and not batch.faults
    digest.update(batch.labels.numpy())
    return digest.hexdigest()


def _batches(config: DataConfig) -> list[str]:
    """An epoch of training without augmentation, some steps with it, and an evaluation."""
    train, val = open_source(config, "train"), open_source(config, "val")
    assert (len(train), len(val)) == (5000 * CLASSES, 1000 * CLASSES)
    steps = len(train) // config.batch_size
    loaders = [
        train_loader(train, config, 7, start_step=0, total_steps=steps),
        train_loader(train, replace(config, augment="mae"), 7, start_step=0, total_steps=4),
        eval_loader(val, config),
    ]
    return [_digest(batch) for loader in loaders for batch in loader]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cifar10_gives_the_same_batches_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    _unpack(tmp_path)
    folder = DataConfig(
        source="imagefolder",
        path=str(tmp_path / "folder"),
        image_size=32,
        batch_size=500,
        augment="none",
        cache_path=str(tmp_path / "decoded"),
    )
    pack(folder, tmp_path / "packed", Recipe())
    pack(folder, tmp_path / "webdataset", Recipe(kind="shards", part_images=4000))
    expected = _batches(folder)
    assert len(set(expected)) == len(expected) == 10 * CLASSES + 4 + 2 * CLASSES
    others = {
        "shards": replace(folder, source="shards", path=str(tmp_path / "tars")),
        "packed pixels": replace(folder, source="packed", path=str(tmp_path / "packed")),
        "packed files": replace(folder, source="packed", path=str(tmp_path / "webdataset")),
        **{cache: replace(folder, cache=cache) for cache in ("memory", "mmap", "device")},
        "workers": replace(folder, workers=2),
    }
    for name, config in others.items():
        assert _batches(config) == expected, name
