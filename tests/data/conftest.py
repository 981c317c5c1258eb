"""A server of files that fails, cuts answers short and knows ranges, as it is told."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder; fails as often as it is told, cuts answers short, knows ranges."""

    root: Path
    failures: int = 0
    cuts: int = 0
    ranges: bool = True
    version: str | None = '"1"'
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        path = self.root / self.path.lstrip("/")
        if "Authorization" in self.headers:  # as object stores do with a signed address
            self.send_error(400)
            return
        if not path.is_file():
            self.send_error(404)
            return
        if kind.failures:
            kind.failures -= 1
            self.send_error(503)
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range") if kind.ranges else None
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        start, whole = int(first), len(data)
        data = data[: int(last) + 1] if last else data
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{whole}")
        if kind.version is not None:
            self.send_header("ETag", kind.version)
        self.end_headers()
        stop = len(data)
        if kind.cuts and path.suffix in (".tar", ".parquet"):
            kind.cuts -= 1
            stop = start + (len(data) - start) // 2
        self.wfile.write(data[start:stop])

    def log_message(self, *details: object) -> None:
        return


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[Server]]]:
    kind = type("One", (Server,), {"root": tmp_path / "served", "asked": []})
    kind.root.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", kind
        running.shutdown()
        thread.join()
