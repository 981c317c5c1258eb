"""Parquet files read in place, by row group: the rows of the tables, in an order that is near."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig, HuggingFaceConfig, MixConfig, SubsetConfig
from mim.core.errors import UserError
from mim.core.settings import load_config
from mim.data import Batch, open_source, train_loader
from mim.data.places import fetch
from mim.data.storage.pack import pack
from mim.data.storage.packed import Recipe

pa = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")

import pyarrow.parquet as pq  # noqa: E402

ROWS = 4  # of a row group
SIZES = (19, 9)  # rows of the files of train: groups of 4, and one of 3 or 1


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    # so that what datasets makes of a file goes too
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def png(number: int) -> bytes:
    """4 x 6 pixels of noise, but the first, which tells which image it is."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 6), dtype=np.uint8)
    pixels[0, 0] = number
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path: Path, rows: list[dict[str, Any]], names: list[str] | None = None) -> Path:
    """A parquet file as the hub has them; the class names stand in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        told = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": told})
    pq.write_table(table, path, row_group_size=ROWS)
    return path


def row(number: int) -> dict[str, Any]:
    return {"image": {"bytes": png(number), "path": f"{number}.png"}, "label": number % 3}


def data_set(root: Path, names: list[str] | None = None) -> Path:
    first = 0
    for file, count in enumerate(SIZES):
        rows = [row(number) for number in range(first, first + count)]
        write(root / f"train-{file}.parquet", rows, names)
        first += count
    write(root / "val-0.parquet", [row(number) for number in range(100, 106)], names)
    return root


def config(path: object, **settings: Any) -> DataConfig:
    settings.setdefault("huggingface", HuggingFaceConfig(pool=8))
    given = {"image_size": 4, "channels": 1, "batch_size": 6, "streaming": True, **settings}
    return DataConfig(source="huggingface", path=str(path), **given)


def batches(given: DataConfig, start: int = 0, stop: int = 9, **options: Any) -> list[Batch]:
    source = open_source(given, "train")
    loader = train_loader(source, given, 3, start_step=start, total_steps=stop, **options)
    return list(loader)


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.sample_ids, b.sample_ids)
        assert a.labels is not None and b.labels is not None and torch.equal(a.labels, b.labels)


def far(url: str, **settings: Any) -> DataConfig:
    return config(f"{url}/train-{{0..1}}.parquet", val_path=f"{url}/val-0.parquet", **settings)


def test_the_rows_are_those_of_the_tables(tmp_path: Path, server: tuple[str, type[Any]]) -> None:
    url, kind = server
    data_set(kind.root, ["hen", "cat", "dog"])
    for given in (config(kind.root), far(url)):
        for split, count in (("train", sum(SIZES)), ("val", 6)):
            plain = open_source(config(kind.root, streaming=False), split)  # type: ignore[arg-type]
            source = open_source(given, split)  # type: ignore[arg-type]
            assert len(source) == len(plain) == count
            assert source.classes == plain.classes == ["hen", "cat", "dog"]
            assert torch.equal(source.sample_ids, plain.sample_ids)
            assert source.labels is not None and plain.labels is not None
            assert torch.equal(source.labels, plain.labels)
            for index in torch.randperm(count, generator=torch.Generator().manual_seed(0)):
                one, other = (np.asarray(s.image(int(index))) for s in (source, plain))
                assert np.array_equal(one, other)
                assert source.describe(int(index)) == plain.describe(int(index))
    # the same order gives the same bytes, augmented
    source = open_source(far(url), "train")
    plain = open_source(config(kind.root, streaming=False), "train")
    plain.groups, plain.groups_mixed = source.groups, source.groups_mixed
    one, other = (
        list(train_loader(s, far(url), 3, start_step=0, total_steps=9)) for s in (source, plain)
    )
    assert_same(one, other)
    assert not list((tmp_path / "cache").rglob("*.parquet*"))


def test_the_order_goes_from_group_to_group(tmp_path: Path) -> None:
    given = config(data_set(tmp_path / "set"))
    source = open_source(given, "train")
    assert source.groups is not None
    # 5 groups of the first file, 3 of the second, of 4 rows but the last ones
    assert torch.bincount(source.groups).tolist() == [4, 4, 4, 4, 3, 4, 4, 1]
    orders = [source.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(sum(SIZES)))
        passed = list(dict.fromkeys(source.groups[order].tolist()))
        at = 0
        for first in range(0, len(passed), 3):  # 8 rows are 3 groups of 28 / 8 rows
            pool = passed[first : first + 3]
            rows = [index for index in range(len(source)) if source.groups[index] in pool]
            part = order[at : at + len(rows)].tolist()
            assert sorted(part) == rows and part != rows  # all of the pool, in another order
            at += len(rows)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    everything = replace(given, huggingface=HuggingFaceConfig(pool=1000))
    one = open_source(everything, "train").order(0, 0)
    assert torch.equal(
        one, open_source(config(tmp_path / "set", streaming=False), "train").order(0, 0)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_workers_processes_and_a_resume(
    server: tuple[str, type[Any]], workers: int
) -> None:
    url, kind = server
    whole = batches(config(data_set(kind.root)))  # two epochs and a batch
    given = far(url, workers=workers)
    assert_same(whole, batches(given))
    assert_same(whole[6:], batches(given, start=6))
    halves = [batches(given, rank=rank, world=2) for rank in (0, 1)]
    for a, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(a.images, torch.cat([part.images for part in parts]))
        assert torch.equal(a.sample_ids, torch.cat([part.sample_ids for part in parts]))


def test_each_row_group_is_one_request_an_epoch(server: tuple[str, type[Any]]) -> None:
    url, kind = server
    data_set(kind.root)
    source = open_source(far(url), "train")
    assert source.groups is not None
    kind.asked.clear()
    epoch = list(train_loader(source, far(url), 3, start_step=0, total_steps=4))
    asked = kind.asked[:]
    ids = torch.cat([batch.sample_ids for batch in epoch])
    rows = [source.sample_ids.tolist().index(one) for one in ids.tolist()]
    assert len(asked) == len(set(asked)) == len(set(source.groups[rows].tolist()))
    # A resume reads the row groups of its own rows.
    kind.asked.clear()
    fresh = open_source(far(url), "train")
    assert len(kind.asked) == 3  # one a file tells its version: footers and labels are kept
    kind.asked.clear()
    assert_same(epoch[2:3], list(train_loader(fresh, far(url), 3, start_step=2, total_steps=3)))
    assert len(kind.asked) == len(set(source.groups[rows[12:18]].tolist())) < 8
    assert set(kind.asked) <= set(asked)


@pytest.mark.filterwarnings("ignore:http:UserWarning")
def test_a_server_that_fails_then_recovers(server: tuple[str, type[Any]]) -> None:
    url, kind = server
    whole = batches(config(data_set(kind.root)))
    kind.failures, kind.cuts = 2, 2
    source = open_source(far(url), "train")
    assert (kind.failures, kind.cuts) == (0, 0)
    kind.failures, kind.cuts = 2, 4
    again = list(train_loader(source, far(url), 3, start_step=0, total_steps=9))
    assert_same(whole, again)
    assert (kind.failures, kind.cuts) == (0, 0)
    kind.failures = 1000
    with pytest.raises(UserError, match=r"train-\d\.parquet: failed 6 times, at last: .*503"):
        list(train_loader(open_source_again(source), far(url), 3, start_step=0, total_steps=1))


def open_source_again(source: Any) -> Any:
    """As a loader process has it: nothing read yet."""
    import pickle

    return pickle.loads(pickle.dumps(source))


def test_a_file_that_changes_stops_the_run(server: tuple[str, type[Any]]) -> None:
    url, kind = server
    data_set(kind.root)
    source = open_source(far(url), "train")
    kind.version = '"2"'
    with pytest.raises(UserError, match=r"train-\d\.parquet: the file has changed since"):
        list(train_loader(source, far(url), 3, start_step=0, total_steps=1))


def test_a_server_without_ranges_is_fetched_from(
    server: tuple[str, type[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    url, kind = server
    whole = batches(config(data_set(kind.root)))
    kind.ranges = False
    assert_same(whole, batches(far(url)))
    told = [record.getMessage().partition(" http")[0] for record in caplog.records]
    assert told == [f"data.streaming: {count} files, of them" for count in (1, 2)]


def test_files_that_end_early_and_damaged_row_groups(tmp_path: Path) -> None:
    root = data_set(tmp_path / "set")
    path = root / "train-1.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"train-1\.parquet' is no parquet file, or damaged"):
        open_source(config(root), "train")
    place = pq.read_metadata(io.BytesIO(data)).row_group(1).column(0).data_page_offset
    path.write_bytes(data[:place] + bytes(64) + data[place + 64 :])
    source = open_source(config(root, max_unreadable=0.5), "train")
    seen = list(train_loader(source, config(root), 3, start_step=0, total_steps=4))
    assert source.ledger is not None
    names = {fault.name for fault in source.ledger.faults()}
    assert names and names <= {f"train/{19 + 4 + number}" for number in range(4)}
    numbers = {int(value) for batch in seen for value in batch.images[:, 0, 0, 0]}
    assert not numbers & {23, 24, 25, 26}


def test_columns_labels_and_parts(tmp_path: Path) -> None:
    words = ("hen", "cat")
    rows = [{"scan": png(number), "kind": words[number % 2]} for number in range(20)]
    root = write(tmp_path / "a.parquet", rows)
    named = HuggingFaceConfig(image="scan", label="kind", pool=8)
    for _ in range(2):  # the second time from what was kept
        train = open_source(config(root, huggingface=named), "train")
        val = open_source(config(root, huggingface=named), "val")  # held out by key
        assert (len(train), len(val), train.classes) == (18, 2, ["cat", "hen"])
        assert train.labels is not None
        for position in range(18):
            number = int(np.asarray(train.image(position))[0, 0])
            assert train.classes[train.labels[position]] == words[number % 2]
    assert train.groups is not None  # what is held out leaves its row groups as they are
    order = train.groups[train.order(0, 0)].tolist()
    assert len(set(order[: sum(group in order[:1] for group in order)])) <= 2
    with pytest.raises(UserError, match=r"data\.huggingface\.image: None is not among .*scan"):
        open_source(config(root), "train")
    wrong = config(root, huggingface=HuggingFaceConfig(image="kind"))
    with pytest.raises(UserError, match=r"image: 'kind' holds string in .*not image files"):
        open_source(wrong, "train")
    some = write(tmp_path / "b.parquet", [{"image": png(n), "label": n or None} for n in range(4)])
    with pytest.raises(UserError, match=r"label: 'label' lacks 1 labels in a row group of .*b\.p"):
        open_source(config(some), "train")
    bare = write(tmp_path / "c.parquet", [{"image": png(n)} for n in range(4)])
    assert open_source(config(bare), "train").labels is None
    few = config(data_set(tmp_path / "set"), subset=SubsetConfig(per_class=2))
    assert len(open_source(few, "train")) == 6


def test_a_mixture_keeps_groups_together(tmp_path: Path) -> None:
    one, two = data_set(tmp_path / "one"), data_set(tmp_path / "two")
    parts = (MixConfig("huggingface", str(one), weight=3), MixConfig("huggingface", str(two)))
    given = replace(config(None), source="mixed", path=None, mix=parts)
    source = open_source(given, "train")
    assert source.epoch_size == 28 + 9
    for epoch in range(3):
        order = source.order(1, epoch)
        assert len(order.unique()) == len(order) == 37
        first = order[order < 28]  # a whole pass, in the order of its own
        single = open_source(config(one), "train")
        assert torch.equal(first, single.order(1, epoch))
        assert order[:28].tolist() != first.tolist()  # the other one comes in between
    seen = [batch.images for batch in batches(given)]
    kept = replace(given, cache="memory")
    assert open_source(kept, "train").epoch_size == 37  # weights hold in a cache too
    assert all(torch.equal(a, b.images) for a, b in zip(seen, batches(kept), strict=True))


def test_inspect_streams(
    server: tuple[str, type[Any]],
    tiny: Callable[..., Path],
    mim: Callable[..., Any],
    tmp_path: Path,
) -> None:
    url, kind = server
    data_set(kind.root)
    settings = {
        "data.source": "huggingface",
        "data.path": f"{url}/train-{{0..1}}.parquet",
        "data.streaming": True,
        "data.batch_size": 4,
    }
    numbers = tmp_path / "numbers.json"
    picture = tmp_path / "sheet.png"
    outcome = mim(
        "data", "inspect", "--config", tiny(settings), "--json", numbers, "--output", picture
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(numbers.read_text())
    assert found["train"]["images"] + found["val"]["images"] == sum(SIZES)
    assert found["train"]["modes"] == {"L": found["train"]["images"]} and picture.is_file()
    written = load_config(tiny({"data.source": "huggingface"}), {})  # an older run's config
    assert written.data.huggingface.pool == 1024


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_shards_hold_the_files_of_the_rows(tmp_path: Path, streaming: bool) -> None:
    files = []
    for number in range(10):
        file = io.BytesIO()
        Image.new("L", (6, 4), number).save(file, "BMP")
        files.append(file.getvalue())
    root = write(tmp_path / "a.parquet", [{"image": file, "label": 0} for file in files])
    pack(config(root, streaming=streaming), tmp_path / "tars", Recipe(kind="shards"))
    found = []
    for path in (tmp_path / "tars").glob("*.tar"):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".bmp")]
            found += [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    assert sorted(found) == sorted(files)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a data set, and refers to another server for its files."""

    elsewhere = ""
    commit = "a" * 40
    files = ("data/train-0.parquet", "data/train-1.parquet", "data/val-0.parquet")

    def do_GET(self) -> None:
        path, base = self.path.partition("?")[0], "/datasets/me/set/resolve"
        if self.headers.get("Authorization") != "Bearer hf_mine":
            return self.answer(401)
        if path.startswith("/api/datasets/me/set/tree/"):
            found = [{"type": "file", "path": f, "size": 9, "oid": "b" * 40} for f in self.files]
            return self.answer(
                200,
                found
                if path.endswith("/data")
                else [{"type": "directory", "path": "data", "oid": "c" * 40}],
            )
        if path.startswith("/api/datasets/me/set"):
            siblings = [{"rfilename": file} for file in self.files]
            told = {"id": "me/set", "sha": self.commit, "siblings": siblings, "private": True}
            return self.answer(200, told | {"tags": [], "downloads": 0, "likes": 0})
        if path.startswith(f"{base}/{self.commit}/") and path.endswith(".parquet"):
            self.send_response(302)
            self.send_header("Location", f"{self.elsewhere}/{path.rpartition('/')[2]}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.answer(404)

    do_HEAD = do_GET

    def answer(self, code: int, content: object = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("X-Repo-Commit", self.commit)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *details: object) -> None:
        return


@pytest.fixture
def hub(server: tuple[str, type[Any]]) -> Iterator[str]:
    kind = type("OneHub", (Hub,), {"elsewhere": server[0]})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


SCRIPT = """
import sys, torch
from mim.core.config import DataConfig, HuggingFaceConfig
from mim.data import open_source, train_loader
seen = []
for path in ("me/set", "hf://datasets/me/set@main"):
    given = DataConfig(
        source="huggingface", path=path, image_size=4, channels=1, batch_size=6, streaming=True,
        huggingface=HuggingFaceConfig(pool=8),
    )
    source = open_source(given, "train")
    loader = train_loader(source, given, 3, start_step=0, total_steps=9)
    seen.append([batch.images for batch in loader])
    print(len(open_source(given, "val")))
torch.save(seen, sys.argv[1])
"""


def test_a_name_on_the_hub(tmp_path: Path, server: tuple[str, type[Any]], hub: str) -> None:
    _, kind = server
    whole = batches(config(data_set(kind.root)))
    given = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_mine", "HF_HOME": str(tmp_path / "home")}
    kind.asked.clear()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "seen.pt")],
        env={**os.environ, **given, "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "6"]
    for seen in torch.load(tmp_path / "seen.pt"):
        assert all(torch.equal(a.images, b) for a, b in zip(whole, seen, strict=True))
    assert kind.asked and all("bytes=" in line for line in kind.asked)
