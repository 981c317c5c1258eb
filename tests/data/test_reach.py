"""Data lead nowhere that the user did not name, and take no more than there is."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import ImageSource, open_source
from mim.data.places import fetch as fetching
from mim.data.places.fetch import fetch, text_at


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.0)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


@contextmanager
def serving(answer: Any) -> Iterator[tuple[str, list[str]]]:
    """A server whose answers are (status, headers, body) of a path."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for chunk in [body] if isinstance(body, bytes) else body:
                    self.wfile.write(chunk)
            except OSError:
                return

        def log_message(self, *details: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


PAGE = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"


def shards(url: str, **more: Any) -> ImageSource:
    return open_source(DataConfig(source="shards", path=url, channels=1, **more), "train")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_page_is_no_data(tmp_path: Path, kind: str, streaming: bool) -> None:
    length = {"Content-Type": kind, "Content-Length": str(len(PAGE))}
    with serving(lambda path: (200, length, PAGE)) as (url, _):
        with pytest.raises(UserError, match="the server answers with a page, not with a file"):
            shards(f"{url}/a.tar", streaming=streaming)
        if "html" in kind:
            assert text_at(f"{url}/SHA256SUMS") is None
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".part")]
    assert not kept


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "http://[::1]:{port}/secret",
        "http://0.0.0.0:{port}/secret",
        "ftp://127.0.0.1/x",
        "http://169.254.169.254/latest",
    ],
)
def test_a_redirect_to_a_port_of_this_machine(target: str, streaming: bool) -> None:
    with serving(lambda path: (200, {}, png(0))) as (inner, asked):
        place = target.format(port=inner.rpartition(":")[2])
        with (
            serving(lambda path: (302, {"Location": place}, b"")) as (url, _),
            pytest.raises(
                UserError, match=r"refers to .*, which leads to|failed 6 times|HTTP Error 302"
            ),
        ):
            shards(f"{url}/a.tar", streaming=streaming)
        assert not asked


def test_a_redirect_within_a_server_is_followed(tmp_path: Path) -> None:
    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        if path == "/a.txt":
            return 302, {"Location": "/b.txt"}, b""
        return 200, {"Content-Length": "2"}, b"hi"

    with serving(answer) as (url, _):
        assert text_at(f"{url}/a.txt") == "hi"


def test_checksums_and_files_are_not_larger_than_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_MOST_TEXT", 1000)
    with (
        serving(lambda path: (200, {}, (b"x" * 100 for _ in range(10**6)))) as (url, _),
        pytest.raises(UserError, match="has more than 1,000 bytes"),
    ):
        text_at(f"{url}/SHA256SUMS")

    def answer(path: str) -> tuple[int, dict[str, str], Any]:
        if "SUMS" in path:
            return 200, {}, b"one\nnot a digest  b\n" + b"0" * 64 + b"\n"
        if "endless" in path:
            return 200, {}, (b"x" * (1 << 20) for _ in range(10**6))
        return 200, {"Content-Length": str(1 << 50)}, (b"x" * (1 << 16) for _ in range(10))

    sizes = iter(range(20, -(10**6), -1))  # the room ends while an endless file is written
    monkeypatch.setattr(
        "shutil.disk_usage",
        lambda path: SimpleNamespace(free=(1 << 30) + (next(sizes) << 20)),
    )
    with serving(answer) as (url, _):
        for name in ("huge.tar", "endless.tar"):
            with pytest.raises(UserError, match="the disk has no room for it"):
                fetch([f"{url}/{name}"])
    assert not [
        path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".part")
    ]


# Tables ---------------------------------------------------------------------------------------


def parquet(path: Path, table: Any, **options: Any) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def tables(path: Path, **more: Any) -> ImageSource:
    config = DataConfig(source="huggingface", path=str(path), channels=1, val_fraction=0.3, **more)
    return open_source(config, "train")


def test_paths_in_a_table_stay_in_its_folder(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    root, secret = tmp_path / "set", tmp_path / "secret.png"
    secret.write_bytes(png(200))
    (root / "images").mkdir(parents=True)
    for number in range(4):
        (root / f"images/{number}.png").write_bytes(png(number))
    (root / "images/link.png").symlink_to(secret)
    inside = [f"images/{number}.png" for number in range(4)]
    outside = ["../secret.png", str(secret), "images/../../secret.png", "images/link.png"]
    rows = [{"image": {"bytes": None, "path": path}} for path in inside + outside]
    source = tables(parquet(root / "a.parquet", pa.Table.from_pylist(rows)), max_unreadable=0.9)
    whole = source.source  # type: ignore[attr-defined]
    assert [int(np.asarray(whole.image(n)).flat[0]) for n in range(4)] == [0, 1, 2, 3]
    for number in range(4, 8):
        with pytest.raises(UserError, match="leads out of the folder of the table"):
            whole.image(number)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bomb", ["repeated", "plain", "label", "rows"])
def test_a_small_table_that_unpacks_to_gigabytes(
    tmp_path: Path, bomb: str, streaming: bool
) -> None:
    pa = pytest.importorskip("pyarrow")
    big = png(0) + bytes(40 << 20)
    if bomb == "repeated":  # one value of 40 MB in 60 rows
        images = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), pa.array([big]))
        table, options = pa.table({"image": images, "label": [0, 1] * 30}), {}
    elif bomb == "plain":
        table, options = (
            pa.table({"image": [big] * 8, "label": [0, 1] * 4}),
            {"use_dictionary": False},
        )
    elif bomb == "label":
        words = pa.DictionaryArray.from_arrays(
            pa.array([0] * 60, pa.int32()), pa.array(["x" * (10 << 20)])
        )
        table, options = pa.table({"image": [png(0)] * 60, "label": words}), {}
    else:
        table, options = pa.table({"image": pa.nulls(10**7, pa.binary())}), {}
    path = parquet(tmp_path / "set/a.parquet", table, compression="zstd", **options)
    del table
    assert path.stat().st_size < 100_000
    before = psutil.Process().memory_info().rss
    with pytest.raises(UserError) as raised:
        source = tables(path, streaming=streaming, max_unreadable=0.0)
        source.image(0)
    assert "a.parquet" in str(raised.value) or "unpacks to more than" in str(raised.value)
    assert psutil.Process().memory_info().rss - before < 800 << 20
