"""Files by URL: fetched once into a local cache, whole or not at all.

A failed request is tried again after a pause that doubles, and goes on where it stopped if the
server can. A file counts as fetched when it has as many bytes as the server said, and the SHA-256
that a file ``SHA256SUMS`` beside it gives, where there is one.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from mim.core.errors import UserError

T = TypeVar("T")

TRIES = 6
FIRST_PAUSE = 1.0
"""Seconds before the second try; each further pause is twice as long."""
_PASSING = (408, 425, 429)  # refusals that mean "later"
_CHUNK = 1 << 20
SECONDS = 60.0
"""Without any byte, after which a request counts as failed."""
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
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return answer.read().decode()

    try:
        return retry(url, get)
    except urllib.error.HTTPError:
        return None


def _digests(folder: str) -> dict[str, str]:
    """Name -> SHA-256 of the SHA256SUMS in a folder of a server; empty where there is none."""
    text = text_at(f"{folder}/SHA256SUMS") or ""
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {name.strip().lstrip("*"): digest for digest, name in pairs}


def _append(url: str, part: Path) -> None:
    """Fetch what a partial file still lacks.

    Raises:
        OSError: if the connection ends before the file does.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is missing, or the file is another one now
            part.unlink()
            raise OSError("what was fetched before does not fit; beginning anew") from error
        raise
    with answer:
        if have and answer.status != 206:  # the server sends all of it
            have = 0
        length = answer.headers.get("Content-Length")
        with part.open("ab" if have else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
        size = part.stat().st_size
    if length is not None and size != have + int(length):
        raise OSError(f"ended after {size} of {have + int(length)} bytes")


def _check(path: Path, wanted: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        path.unlink()
        raise OSError(f"SHA-256 is {digest.hexdigest()} instead of {wanted}")


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
        place = cache_folder("shards") / hashlib.blake2b(folder.encode(), digest_size=8).hexdigest()
        place.mkdir(exist_ok=True)
        path, part = place / name, place / f"{name}.part"
        with FileLock(place / f"{name}.lock"):
            if not path.is_file():
                if folder not in digests:
                    digests[folder] = _digests(folder)
                wanted = digests[folder].get(name)

                def get(url: str = url, part: Path = part, wanted: str | None = wanted) -> None:
                    _append(url, part)
                    if wanted is not None:
                        _check(part, wanted)

                try:
                    retry(url, get)
                except urllib.error.HTTPError as error:
                    raise UserError(f"{url}: {error}") from error
                part.replace(path)
        found.append(path)
    return found
