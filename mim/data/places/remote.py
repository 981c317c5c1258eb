"""Read parts of files by URL: each part is one request, and nothing is stored.

It needs a server that answers range requests (RFC 9110, section 14), as object stores and common
web servers do. Each answer says how long the whole file is and, as a rule, which version of it
(``ETag`` or ``Last-Modified``): a file that changes under a run stops it.
"""

from __future__ import annotations

import io
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from pathlib import PurePosixPath
from typing import Any, TypeAlias, TypeVar

from mim.core.errors import UserError
from mim.data.places.fetch import open_url, retry

S = TypeVar("S")
T = TypeVar("T")

Headers: TypeAlias = Sequence[tuple[str, str]]

_REQUESTS = 16  # at once, of each process: a server far away answers each after a while
_BUFFER = 1 << 16  # bytes read at once where headers are looked through
_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")


@dataclass(frozen=True)
class RemoteFile:
    """A file that is read by range requests."""

    url: str
    size: int
    version: str
    """As the server names it; empty where it names none."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Sent along, such as a token, but not to where the server redirects."""

    @property
    def name(self) -> str:
        """Without the folder."""
        return PurePosixPath(urllib.parse.urlsplit(self.url).path).name

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on.

        Raises:
            UserError: if it fails each time, is refused, or the file is another one now.
        """
        if not size:
            return b""

        def get() -> bytes:
            status, headers, data = _request(self.url, offset, size, self.headers)
            if status != 206 or _size_and_version(headers) != (self.size, self.version):
                raise UserError(f"{self.url}: the file has changed since it was opened")
            if len(data) != size:
                raise OSError(f"ended after {len(data)} of {size} bytes")
            return data

        return _retry(self.url, get)

    def open(self) -> io.BufferedReader:
        """A file object that reads 64 KB at a time."""
        return io.BufferedReader(_Raw(self), _BUFFER)

    def unbuffered(self) -> io.RawIOBase:
        """A file object of which each read is one request."""
        return _Raw(self)


class _Raw(io.RawIOBase):
    def __init__(self, file: RemoteFile) -> None:
        self.file, self.at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.file.size)[whence]
        return self.at

    def readinto(self, into: Any) -> int:
        data = self.file.read(self.at, max(0, min(len(into), self.file.size - self.at)))
        into[: len(data)] = data
        self.at += len(data)
        return len(data)


def _request(url: str, offset: int, size: int, headers: Headers = ()) -> tuple[int, Message, bytes]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
    for name, value in headers:
        request.add_unredirected_header(name, value)
    with open_url(request, trusted=bool(headers)) as answer:
        # An answer with all of the file is not read, nor more than was asked for.
        return answer.status, answer.headers, answer.read(size + 1) if answer.status == 206 else b""


def _size_and_version(headers: Message) -> tuple[int, str]:
    """The size of the file, -1 where it is unknown, and its version."""
    found = _TOTAL.match(headers.get("Content-Range", ""))
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    return (-1 if found is None else int(found[1])), version


def _retry(url: str, get: Callable[[], T]) -> T:
    try:
        return retry(url, get)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {error}") from error


def open_remote(url: str, headers: Headers = ()) -> RemoteFile | None:
    """The file at a URL, or None where the server does not answer range requests.

    Raises:
        UserError: if it is refused, or fails each time.
    """
    status, answered, _ = _retry(url, lambda: _request(url, 0, 1, headers))
    size, version = _size_and_version(answered)
    return RemoteFile(url, size, version, tuple(headers)) if status == 206 and size >= 0 else None


def in_parallel(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """``work`` of each item, in order, in threads: they wait for answers most of the time."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(work, items))
