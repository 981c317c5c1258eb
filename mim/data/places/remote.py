"""Files by URL read in place: any stretch of bytes is one request, and nothing is kept.

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
    """A file that is read by range requests.

    Args:
        url: where it is.
        size: its bytes.
        version: as the server names it; empty where it names none.
        headers: sent along, such as who asks; not to where the server refers.
    """

    url: str
    size: int
    version: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Without the folder."""
        return PurePosixPath(urllib.parse.urlsplit(self.url).path).name

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes from a place on; tried again where a request fails.

        Raises:
            UserError: if it fails each time, is refused, or the file is another one now.
        """
        if not size:
            return b""

        def get() -> bytes:
            status, headers, data = _request(self.url, offset, size, self.headers)
            if status != 206 or _told(headers) != (self.size, self.version):
                raise UserError(f"{self.url}: the file has changed since it was opened")
            if len(data) != size:
                raise OSError(f"ended after {len(data)} of {size} bytes")
            return data

        return _patiently(self.url, get)

    def open(self) -> io.BufferedReader:
        """As a file, of which stretches of 64 KB are read where it is read from."""
        return io.BufferedReader(_Raw(self), _BUFFER)

    def unbuffered(self) -> io.RawIOBase:
        """As a file of which each read is one request, of so many bytes."""
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


def _told(headers: Message) -> tuple[int, str]:
    """The size of the whole file, -1 where it is not told, and its version."""
    found = _TOTAL.match(headers.get("Content-Range", ""))
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    return (-1 if found is None else int(found[1])), version


def _patiently(url: str, get: Callable[[], T]) -> T:
    try:
        return retry(url, get)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {error}") from error


def open_remote(url: str, headers: Headers = ()) -> RemoteFile | None:
    """The file at a URL, or None where the server does not answer range requests.

    Raises:
        UserError: if it is refused, or fails each time.
    """
    status, told, _ = _patiently(url, lambda: _request(url, 0, 1, headers))
    size, version = _told(told)
    return RemoteFile(url, size, version, tuple(headers)) if status == 206 and size >= 0 else None


def in_parallel(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """``work`` of each item, in order, several at once: they wait for answers most of the time."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(work, items))
