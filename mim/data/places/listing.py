"""The images below a folder, listed once: a large list is kept for later runs.

Walking through 1.2 million files takes from seconds on a local disk to many minutes on a network
one. What is kept is valid as long as the times of all folders below are those of the walk, which
change when an entry is added, removed or renamed: the check is one ``stat`` a folder.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim.core.errors import UserError
from mim.core.files import write_atomic
from mim.core.keys import name_to_int
from mim.data.images.decode import EXTENSIONS
from mim.data.places.fetch import cache_folder, cache_place
from mim.data.places.names import Names

KEPT_FROM = 20_000
"""Images from which on a list is kept; a smaller one is made in less than a second."""
_FORMAT = 1
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
    asked = f"{_FORMAT}/{','.join(EXTENSIONS)}/{root.resolve()}/{part}"
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


def _raise(error: OSError) -> None:
    """For os.walk, which would pass over a folder that it may not read."""
    raise error


def _times(path: Path) -> tuple[int, int]:
    """When entries of a folder last changed; the second time cannot be set back by a copy."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns


def _files(root: Path, folder: str, places: list[str], times: list[tuple[int, int]]) -> list[str]:
    """POSIX paths of the images below ``root/folder``, sorted; notes folders and their times."""
    found = []
    for place, folders, names in os.walk(root / folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(place).relative_to(root).as_posix()
        places.append(relative)
        times.append(_times(Path(place)))
        found += [
            f"{relative}/{name}"
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def _walk(root: Path, folders: Sequence[str]) -> tuple[Listing, Names, NDArray[np.int64]]:
    """The images, the folders they were looked for in, and (d, 2) int64 times of these."""
    ids, counts = array("q"), []
    places: list[str] = []
    times: list[tuple[int, int]] = []

    def names() -> Iterator[str]:
        for folder in folders:
            found = _files(root, folder, places, times)
            ids.extend(name_to_int(name) for name in found)
            counts.append(len(found))
            yield from found

    listing = Listing(
        names=Names.of(names()),
        ids=torch.from_numpy(np.frombuffer(ids, dtype=np.int64)),
        counts=torch.tensor(counts, dtype=torch.int64),
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
            np.savez(file, **arrays)

    write_atomic(path, write)


def _read(path: Path, root: Path, folders: Sequence[str]) -> Listing | None:
    """A kept list; None if there is none, a folder has changed, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kept = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if list(Names(kept["asked_text"], kept["asked_ends"])) != list(folders):
            return None
        places = Names(kept["places_text"], kept["places_ends"])
        for place, told in zip(places, kept["times"].tolist(), strict=True):
            if _times(root / place) != tuple(told):
                return None
        return Listing(Names(kept["text"], kept["ends"]), kept["ids"], kept["counts"])
    except _DAMAGED:  # listed anew, and written over
        return None
