"""The live report's server: what it answers, and to whom."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mim.core.errors import UserError
from mim.report import report_server

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mim.report.interactive.plotly_script", lambda: "")


@pytest.fixture
def folder(fake_comparison: Callable[..., Path]) -> Path:
    return fake_comparison(axes={"seed": [0, 1]}, metrics=False)


@pytest.fixture
def ask(folder: Path) -> Iterator[Ask]:
    with report_server(folder, port=0, every=1e-6) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        port = server.server_address[1]

        def request(path: str, method: str = "GET", host: str = "") -> tuple[int, str, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
            answer = connection.getresponse()
            content = answer.read().decode()
            connection.close()
            return answer.status, answer.headers.get("Content-Type", ""), content

        yield request
        server.shutdown()
        thread.join()


def test_page_and_version_follow_the_files(folder: Path, ask: Ask) -> None:
    before = {path for path in folder.rglob("*")}
    status, kind, page = ask("/")
    assert status == 200 and kind == "text/html; charset=utf-8"
    assert "2 of 2 runs finished" in page and 'id="table-runs"' in page
    version = ask("/version")[2]
    assert ask("/version")[2] == version
    (folder / "seed=1" / "result.json").unlink()
    assert ask("/version")[2] != version
    assert "1 of 2 runs finished" in ask("/")[2]
    assert {path for path in folder.rglob("*")} == before - {folder / "seed=1" / "result.json"}


def test_a_client_that_leaves_or_says_nothing_is_no_error(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mim.report.serve._Handler.timeout", 0.2)
    before = threading.active_count()
    with report_server(folder, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for words in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
            client = socket.create_connection(server.server_address[:2], timeout=20)
            linger = struct.pack("ii", 1, 0)  # closes with a reset
            client.sendall(words)
            if words.endswith(b"\n"):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.close()
            else:
                assert client.recv(1) == b"", "the server hangs up"
        server.shutdown()
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before
    assert "Traceback" not in capfd.readouterr().err


def test_nothing_but_the_report_is_served(ask: Ask) -> None:
    for path in (
        "/comparison.json",
        "/../comparison.json",
        "/%2e%2e/",
        "//etc/passwd",
        "/version/",
    ):
        status, _, content = ask(path)
        assert (status, content) == (404, "there is only the report\n"), path
    assert ask("/", method="POST")[0] == 501


def test_a_page_of_another_name_is_refused(ask: Ask) -> None:
    assert ask("/", host="evil.test:80")[0] == 403
    assert ask("/version", host="evil.test")[0] == 403
    assert ask("/version", host="localhost:1")[0] == 200


def test_a_file_that_cannot_be_read_is_said_and_the_server_goes_on(folder: Path, ask: Ask) -> None:
    path = folder / "comparison.json"
    content = path.read_text()
    path.write_text("{")
    status, _, text = ask("/")
    assert status == 500 and "cannot be read as JSON" in text
    path.write_text(content)
    assert ask("/")[0] == 200


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a comparison folder"):
        report_server(tmp_path, port=0)
    with pytest.raises(UserError, match="--every"):
        report_server(folder, port=0, every=0)
    with pytest.raises(UserError, match="--port: cannot listen on"):
        report_server(folder, port=70000)
    with report_server(folder, port=0) as taken, pytest.raises(UserError, match="--port"):
        report_server(folder, port=taken.server_address[1])
