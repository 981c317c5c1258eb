"""What looking at files found, stored for later runs on the same files."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mim.core.errors import UserError
from mim.core.files import write_arrays, write_json_atomic
from mim.data.places.fetch import cache_folder, cache_place
from mim.data.places.places import Place
from mim.data.places.remote import RemoteFile

T = TypeVar("T")

# NumPy parses the header of an array, and the parser of Python up to 3.12 now and then fails where
# threads use it at once: "AST constructor recursion depth mismatch" (python/cpython#106905).
_parsing = threading.Lock()


def shown(place: Place) -> str:
    """What a message calls the file."""
    return place.url if isinstance(place, RemoteFile) else str(place)


def version_of(place: Place) -> str | None:
    """What tells this version of a file from any other; None if nothing does.

    Raises:
        UserError: if the file is missing.
    """
    if isinstance(place, RemoteFile):
        return f"{place.url}/{place.size}/{place.version}" if place.version else None
    try:
        status = place.stat()
    except OSError as error:
        raise UserError(f"{shown(place)!r} is missing") from error
    return f"{place.resolve()}/{status.st_size}/{status.st_mtime_ns}"


def _path(place: Place, what: str) -> Path | None:
    """Where it is stored; None if nothing tells one version of the file from the next."""
    if (version := version_of(place)) is None:
        return None
    digest = hashlib.blake2b(f"{what}/{version}".encode(), digest_size=16).hexdigest()
    return cache_folder("index") / f"{digest}.npz"


def recall(place: Place, what: str) -> dict[str, Any] | None:
    """The arrays that :func:`keep` stored for this version of a file, else None.

    ``what`` is their kind and format.

    Raises:
        UserError: if the file is missing.
    """
    path = _path(place, what)
    if path is None or not path.is_file():
        return None
    with _parsing, np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def found_once(
    parts: Sequence[object], find: Callable[[], T], lasts: Callable[[T], bool] = lambda _: True
) -> T:
    """What an earlier run found that had the same ``parts``, as JSON, or what is found now.

    It is stored for later runs where it ``lasts``.
    """
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    place = cache_place("measured") / f"{key}.json"
    try:
        kept: T = json.loads(place.read_text(encoding="utf-8"))
        return kept
    except (OSError, ValueError):
        found = find()
    if lasts(found):
        try:
            write_json_atomic(cache_folder("measured") / place.name, found)
        except (OSError, UserError):  # no room for a cache: it is found again next time
            logging.getLogger("mim").warning("%s: cannot be kept for later runs", place)
    return found


def keep(place: Place, what: str, arrays: dict[str, Any]) -> None:
    """Store arrays for later runs; :func:`recall` reads them."""
    path = _path(place, what)
    if path is not None:
        write_arrays(path, arrays, compress=False)
