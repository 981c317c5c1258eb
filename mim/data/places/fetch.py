"""Files by URL: fetched once into a local cache, whole or not at all.

A failed request is repeated after a pause that doubles, and resumes where it stopped if the server
can. A file is complete when it has as many bytes as the server said, and the SHA-256 that a file
``SHA256SUMS`` in the same folder gives, if there is one.

A server may be wrong, or hostile. An HTML page is never taken for a file, a download that exceeds
the free disk is not begun, and a redirect may not lead to an address of this machine or its network
that the URL did not name.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from mim.core.errors import UserError
from mim.core.files import decode_text, file_digest

T = TypeVar("T")

TRIES = 6
FIRST_PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long."""
_PASSING = (408, 425, 429)  # refusals that mean "later"
_CHUNK = 1 << 20
SECONDS = 60.0
"""Without any byte, after which a request has failed."""
_MOST_TEXT = 1 << 24  # bytes of checksums, or of names of classes
_KEPT_FREE = 1 << 30  # bytes of the disk that are left to others
_DIGEST = re.compile(r"([0-9a-fA-F]{64})\s+\*?(.+)")
_FAILURES = (OSError, http.client.HTTPException)  # URLError and timeouts are OSErrors


def cache_place(part: str) -> Path:
    """A folder below ``$MIM_CACHE``, by default ``~/.cache/mim``, which may not be there."""
    home = os.environ.get("MIM_CACHE")
    return (Path(home) if home else Path.home() / ".cache" / "mim") / part


def cache_folder(part: str) -> Path:
    """:func:`cache_place`, made if needed.

    Raises:
        UserError: if it cannot be made.
    """
    folder = cache_place(part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"MIM_CACHE: cannot make the folder {str(folder)!r}: {error}") from error
    return folder


def is_url(place: str) -> bool:
    """Whether a place is fetched rather than read."""
    return place.startswith(("http://", "https://"))


class Refused(UserError):
    """What a server answers with is not taken, now or later."""


class Page(Refused):
    """It is a page for people: as a rule what was asked for is not there."""


def _reach(url: str) -> str:
    """How far away a URL's server is: this machine, a network of its own, or the world.

    Raises:
        OSError: if its name is unknown.
    """
    parts = urllib.parse.urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found]
    if any(address.is_loopback or address.is_unspecified for address in addresses):
        return "this machine"
    if any(address.is_link_local for address in addresses):
        return "the link"
    return "a private network" if any(a.is_private for a in addresses) else "the world"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect within a server, to the world, or within a private network.

    Args:
        trusted: whether the server, a hub, may refer to others that are as near as itself.
    """

    def __init__(self, trusted: bool) -> None:
        self.trusted = trusted

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        reach = _reach(newurl) if new.scheme in ("http", "https") else "another protocol"
        near = ("a private network", "this machine") if self.trusted else ("a private network",)
        inside = reach in near and reach == _reach(req.full_url)
        if old.netloc != new.netloc and reach != "the world" and not inside:
            raise Refused(f"{req.full_url}: refers to {newurl}, which leads to {reach}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(request: str | urllib.request.Request, trusted: bool = False) -> Any:
    """The answer to a request, as ``urlopen`` gives it.

    A ``trusted`` server may redirect to others of this machine.

    Raises:
        Refused: if it is a page, or refers to where it should not.
    """
    answer = urllib.request.build_opener(_Redirects(trusted)).open(request, timeout=SECONDS)
    if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        answer.close()
        raise Page(f"{answer.url}: the server answers with a page, not with a file")
    return answer


def retry(url: str, attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns, tried again where it fails for a reason that may pass.

    Raises:
        HTTPError: if the server refuses (4xx).
        UserError: if it failed each time.
    """
    for number in range(TRIES):
        try:
            return attempt()
        except _FAILURES as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 500
            if code < 500 and code not in _PASSING:
                raise
            if number == TRIES - 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{url}: failed {TRIES} times, at last: {reason}") from error
            pause = FIRST_PAUSE * 2**number
            warnings.warn(f"{url}: {error}; trying again in {pause:g} s", stacklevel=2)
            time.sleep(pause)
    raise AssertionError("unreachable")


def text_at(url: str) -> str | None:
    """A small text file, or None where there is none.

    Raises:
        UserError: if it failed each time.
    """

    def get() -> str:
        with open_url(url) as answer:
            data: bytes = answer.read(_MOST_TEXT + 1)
            if len(data) > _MOST_TEXT:
                raise Refused(f"{url}: has more than {_MOST_TEXT:,} bytes")
            try:
                return decode_text(data)
            except UnicodeDecodeError as error:
                raise Refused(f"{url}: is no text: {error}") from error

    try:
        return retry(url, get)
    except (urllib.error.HTTPError, Page):
        return None


def _digests(folder: str) -> dict[str, str]:
    """Name -> SHA-256 of the SHA256SUMS in a folder of a server; empty where there is none."""
    text = text_at(f"{folder}/SHA256SUMS") or ""
    found = (_DIGEST.fullmatch(line.strip()) for line in text.splitlines())
    return {match[2]: match[1].lower() for match in found if match is not None}


def _append(url: str, part: Path) -> None:
    """Fetch what a partial file still lacks.

    Raises:
        OSError: if the connection ends before the file does.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = open_url(request)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is missing, or the file is another one now
            part.unlink()
            raise OSError("what was fetched before does not fit; beginning anew") from error
        raise
    with answer:
        if have and answer.status != 206:  # the server sends all of it
            have = 0
        length = answer.headers.get("Content-Length")
        needed = 0 if length is None else int(length)
        with part.open("ab" if have else "wb") as file:
            while chunk := answer.read(_CHUNK):
                free = shutil.disk_usage(part.parent).free - _KEPT_FREE
                if free < max(needed, len(chunk)):
                    what = f"{needed / 1e9:.1f} GB are" if needed else "no end is"
                    raise Refused(f"{url}: {what} still to come, and the disk has no room for it")
                if not have and file.tell() == 0 and chunk.lstrip()[:1] == b"<":
                    raise Page(f"{url}: the server answers with a page, not with a file")
                file.write(chunk)
                needed = max(0, needed - len(chunk))
        size = part.stat().st_size
    if length is not None and size != have + int(length):
        raise OSError(f"ended after {size} of {have + int(length)} bytes")


def _check(path: Path, expected: str) -> None:
    found = file_digest(path)
    if found != expected:
        path.unlink()
        raise OSError(f"SHA-256 is {found} instead of {expected}")


def fetch(urls: Sequence[str]) -> list[Path]:
    """Local copies of files, in the order of their URLs; those fetched earlier are kept.

    Several processes may ask for the same file: one fetches it, the others wait.

    Raises:
        UserError: for a URL that is refused, or that failed each time.
    """
    found = []
    digests: dict[str, dict[str, str]] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        if name in ("", ".", ".."):
            raise UserError(f"{url}: names no file")
        place = cache_folder("shards") / hashlib.blake2b(folder.encode(), digest_size=8).hexdigest()
        place.mkdir(exist_ok=True)
        path, part = place / name, place / f"{name}.part"
        with FileLock(place / f"{name}.lock"):
            if not path.is_file():
                if folder not in digests:
                    digests[folder] = _digests(folder)
                expected = digests[folder].get(name)

                def get(url: str = url, part: Path = part, expected: str | None = expected) -> None:
                    _append(url, part)
                    if expected is not None:
                        _check(part, expected)

                try:
                    retry(url, get)
                except urllib.error.HTTPError as error:
                    raise UserError(f"{url}: {error}") from error
                except Refused:
                    part.unlink(missing_ok=True)
                    raise
                part.replace(path)
        found.append(path)
    return found
