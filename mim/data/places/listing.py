"""The images below a folder, listed once: a large list is kept for later runs.

Walking through 1.2 million files takes from seconds on a local disk to many minutes on a network
one. What is kept is valid as long as the times of all folders below are those of the walk, which
change when an entry is added, removed or renamed: the check is one ``stat`` a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim.core.errors import UserError
from mim.core.files import IMAGE_EXTENSIONS, walk, write_atomic
from mim.core.rng import name_to_int
from mim.data.places.fetch import cache_folder, cache_place
from mim.data.places.names import Names

KEPT_FROM = 20_000
"""Images from which on a list is kept; a smaller one is made in less than a second."""
_NO_IMAGES = (
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".py"),
    *(".cls", ".db", ".ini", ".log", ".pdf", ".sha256", ".md5"),
)
_FORMAT = 2
_SETTLED = 2.0  # seconds; a file system's clock may tick so coarsely that a change leaves no trace
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass
class Listing:
    """Images below some folders, sorted within each."""

    names: Names
    """n POSIX paths relative to the root."""
    ids: Tensor
    """(n,) int64, the sample ids of these paths."""
    counts: Tensor
    """(folders,) int64, how many lie below each."""
    left_out: dict[str, int]
    """Ending, or nothing -> files below the folders that may be images and are not read."""


def list_images(root: Path, part: str, folders: Sequence[str], *, keep: bool) -> Listing:
    """The images at any depth below folders, which are listed in the order given.

    Args:
        root: paths and ids are relative to it.
        part: what to call the list: one is kept for each root and part.
        folders: POSIX paths relative to the root.
        keep: whether to use a list from an earlier run, and to leave one to later runs.

    Raises:
        OSError: if a folder cannot be read.
        UnicodeEncodeError: for a name that is not UTF-8.
    """
    if not keep:
        return _walk(root, folders)[0]
    asked = f"{_FORMAT}/{','.join(IMAGE_EXTENSIONS)}/{root.resolve()}/{part}"
    name = f"{hashlib.blake2b(os.fsencode(asked), digest_size=16).hexdigest()}.npz"
    found = _read(cache_place("listings") / name, root, folders)
    if found is not None:
        return found
    begun = time.time_ns()
    listing, places, times = _walk(root, folders)
    settled = int(times.max()) < begun - _SETTLED * 1e9
    if len(listing.ids) >= KEPT_FROM and settled:
        try:
            _write(cache_folder("listings") / name, listing, folders, places, times)
        except (OSError, UserError) as error:
            told = f"the list of its images is not kept for later runs: {error}"
            warnings.warn(f"{root}: {told} (data.index_cache=false keeps none)", stacklevel=2)
    return listing


def ending_left_out(name: str) -> str | None:
    """The ending of a file that may be an image and is not read as one; else None."""
    ending = PurePosixPath(name).suffix.lower()
    return None if ending in (*IMAGE_EXTENSIONS, *_NO_IMAGES) else ending


def tell_left_out(where: str, left_out: dict[str, int]) -> None:
    """Says which files are not read, if there are any."""
    if left_out:
        kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
        told = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in kinds)
        logging.getLogger("mim").warning("%s: files left out: %s", where, told)


def _times(status: os.stat_result) -> tuple[int, int]:
    """When entries of a folder last changed; the second time cannot be set back by a copy."""
    return status.st_mtime_ns, status.st_ctime_ns


def _files(
    root: Path, start: str, places: list[str], times: list[tuple[int, int]], left_out: Counter[str]
) -> list[str]:
    """POSIX paths of the images below ``root/start``, sorted; notes folders and their times, and
    the endings of files that are left out."""
    found = []
    for folder in walk(root, start):
        places.append(folder.path)
        times.append(_times(folder.status))
        for name in folder.files:
            if name.lower().endswith(IMAGE_EXTENSIONS):
                found.append(name if folder.path == "." else f"{folder.path}/{name}")
            elif (ending := ending_left_out(name)) is not None:
                left_out[ending] += 1
    return sorted(found)


def _walk(root: Path, folders: Sequence[str]) -> tuple[Listing, Names, NDArray[np.int64]]:
    """The images, the folders they were looked for in, and (d, 2) int64 times of these."""
    ids, counts = array("q"), []
    places: list[str] = []
    times: list[tuple[int, int]] = []
    left_out: Counter[str] = Counter()

    def names() -> Iterator[str]:
        for folder in folders:
            found = _files(root, folder, places, times, left_out)
            ids.extend(name_to_int(name) for name in found)
            counts.append(len(found))
            yield from found

    listing = Listing(
        names=Names.of(names()),
        ids=torch.from_numpy(np.frombuffer(ids, dtype=np.int64)),
        counts=torch.tensor(counts, dtype=torch.int64),
        left_out=left_out,
    )
    return listing, Names.of(places), np.array(times, dtype=np.int64).reshape(-1, 2)


def _write(
    path: Path,
    listing: Listing,
    folders: Sequence[str],
    places: Names,
    times: NDArray[np.int64],
) -> None:
    asked = Names.of(folders)
    tensors = {
        "ids": listing.ids,
        "counts": listing.counts,
        "text": listing.names.text,
        "ends": listing.names.ends,
        "asked_text": asked.text,
        "asked_ends": asked.ends,
        "places_text": places.text,
        "places_ends": places.ends,
        "times": torch.from_numpy(times),
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            np.savez(file, left_out=np.array(json.dumps(listing.left_out)), **arrays)

    write_atomic(path, write)


def _read(path: Path, root: Path, folders: Sequence[str]) -> Listing | None:
    """A kept list; None if there is none, a folder has changed, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            left_out = json.loads(str(arrays["left_out"]))
            files = [name for name in arrays.files if name != "left_out"]
            kept = {name: torch.from_numpy(arrays[name]) for name in files}
        if list(Names(kept["asked_text"], kept["asked_ends"])) != list(folders):
            return None
        places = Names(kept["places_text"], kept["places_ends"])
        for place, told in zip(places, kept["times"].tolist(), strict=True):
            if _times((root / place).stat()) != tuple(told):
                return None
        names = Names(kept["text"], kept["ends"])
        return Listing(names, kept["ids"], kept["counts"], left_out)
    except _DAMAGED:  # listed anew, and written over
        return None
