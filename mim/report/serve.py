"""The report as a live page: served on loopback, renewed as runs train."""

from __future__ import annotations

import hashlib
import ipaddress
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mim.core.errors import UserError, setting_error
from mim.report.collect import read_comparison
from mim.report.page import Report, report_html

_FILES = (
    *("config.yaml", "metrics.jsonl", "result.json"),
    *("reconstructions.npz", "reconstructions_ratios.npz"),
)


class LiveReport:
    """A comparison's page and the state of the files that it was made from.

    Args:
        folder: of the comparison.
        every: seconds for which a page is kept, whatever the runs write meanwhile.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.folder, self.every = folder, every
        self._lock = threading.Lock()
        self._looked = -float("inf")
        self._version = ""
        self._page: tuple[str, bytes] = ("", b"")

    def version(self) -> str:
        """A digest of the files, which are looked at no more often than ``every``."""
        with self._lock:
            return self._look()

    def page(self) -> bytes:
        """The page of the present version.

        Raises:
            UserError: if a file cannot be read.
        """
        with self._lock:
            version = self._look()
            if self._page[0] != version:
                html = report_html(Report(read_comparison(self.folder)), live=True)
                self._page = (version, html.encode("utf-8"))
            return self._page[1]

    def _look(self) -> str:
        if time.monotonic() - self._looked < self.every:
            return self._version
        digest = hashlib.sha256()
        runs = sorted(path for path in self.folder.iterdir() if path.is_dir())
        paths = [self.folder / "comparison.json"]
        for path in [*paths, *(run / name for run in runs for name in _FILES)]:
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
        self._looked, self._version = time.monotonic(), digest.hexdigest()
        return self._version


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 60  # seconds for which a thread waits for a client that says nothing

    def do_GET(self) -> None:
        """Answer with the page, or with its version, which changes when the page does."""
        # Another site's page must not read this one under a name of its own (DNS rebinding).
        asked = self.headers.get("Host", "").rpartition(":")[0].strip("[]")
        if self.server.loopback and not _is_loopback(asked):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"served to this machine only\n")
        elif self.path == "/":
            try:
                self._answer(HTTPStatus.OK, "text/html", self.server.report.page())
            except UserError as error:
                text = f"{error}\n".encode()
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", text)
        elif self.path == "/version":
            self._answer(HTTPStatus.OK, "text/plain", self.server.report.version().encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is only the report\n")

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """A terminal has no use for a line each request."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], report: LiveReport) -> None:
        super().__init__(address, _Handler)
        self.report = report
        self.loopback = _is_loopback(address[0])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is no error of the server."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def report_server(
    folder: Path, host: str = "127.0.0.1", port: int = 8765, every: float = 5.0
) -> ThreadingHTTPServer:
    """A server of a comparison's live report; ``serve_forever`` starts it.

    It answers ``/`` with the page and ``/version``, reads only, and writes nothing.

    Args:
        folder: of the comparison.
        host: address to listen on; others than loopback show the page to whoever reaches it.
        port: 0 takes a free one, see ``server_address``.
        every: least seconds between two looks at the files.

    Raises:
        UserError: if the folder is no comparison or the port cannot be used.
    """
    if every <= 0:
        raise setting_error("--every", every, "must be above 0")
    read_comparison(folder)
    try:
        return _Server((host, port), LiveReport(folder, every))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: cannot listen on {host}:{port} ({error})") from error
