"""The images below a folder, listed once: a long list is stored for later runs.

Walking through 1.2 million files takes from seconds on a local disk to many minutes on a network
one. A stored list is valid while the times of all folders below are those of the walk, which change
when an entry is added, removed or renamed: the check is one ``stat`` a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim.core.errors import UserError
from mim.core.files import IMAGE_EXTENSIONS, walk, write_arrays
from mim.core.progress import note_once
from mim.core.rng import name_to_int
from mim.data.places.fetch import cache_folder, cache_place
from mim.data.places.names import Names

KEPT_FROM = 20_000
"""From this count of images on a list is stored; a shorter one is made in less than a second."""
_NO_IMAGES = (
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".py"),
    *(".cls", ".db", ".ini", ".log", ".pdf", ".sha256", ".md5"),
)
_FORMAT = 3
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
    """The images at any depth below folders, in the order of the folders.

    Args:
        root: paths and ids are relative to it.
        part: names the list; one is stored for each root and part.
        folders: POSIX paths relative to the root.
        keep: whether to use the list of an earlier run, and to store one for later runs.

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
    listing, walked, times = _walk(root, folders)
    settled = int(times.max()) < begun - _SETTLED * 1e9
    if len(listing.ids) >= KEPT_FROM and settled:
        note = {"left_out": listing.left_out, "folders": [*folders], "walked": walked}
        tensors = {"ids": listing.ids, "counts": listing.counts, "text": listing.names.text}
        tensors["ends"] = listing.names.ends
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        arrays |= {"times": times, "note": np.array(json.dumps(note))}
        try:
            write_arrays(cache_folder("listings") / name, arrays, compress=False)
        except (OSError, UserError) as error:
            message = f"the list of its images is not kept for later runs: {error}"
            warnings.warn(f"{root}: {message} (data.index_cache=false keeps none)", stacklevel=2)
    return listing


def ending_left_out(name: str) -> str | None:
    """The ending of a file that may be an image and is not read as one; else None."""
    ending = PurePosixPath(name).suffix.lower()
    return None if ending in (*IMAGE_EXTENSIONS, *_NO_IMAGES) else ending


def tell_left_out(where: str, left_out: dict[str, int]) -> None:
    """Says which files are not read, if there are any; once, however often they are listed."""
    if left_out:
        kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
        shown = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in kinds)
        note_once(f"{where}: files left out: {shown}")


def _times(status: os.stat_result) -> tuple[int, int]:
    """When entries of a folder last changed; the second time cannot be set back by a copy."""
    return status.st_mtime_ns, status.st_ctime_ns


def _files(
    root: Path, start: str, walked: list[str], times: list[tuple[int, int]], left_out: Counter[str]
) -> list[str]:
    """POSIX paths of the images below ``root/start``, sorted; adds the folders, their times and the
    endings left out to the arguments."""
    found = []
    for folder in walk(root, start):
        walked.append(folder.path)
        times.append(_times(folder.status))
        for name in folder.files:
            if name.lower().endswith(IMAGE_EXTENSIONS):
                found.append(name if folder.path == "." else f"{folder.path}/{name}")
            elif (ending := ending_left_out(name)) is not None:
                left_out[ending] += 1
    return sorted(found)


def _walk(root: Path, folders: Sequence[str]) -> tuple[Listing, list[str], NDArray[np.int64]]:
    """The images, the folders walked through, and (d, 2) int64 times of these."""
    ids, counts = array("q"), []
    walked: list[str] = []
    times: list[tuple[int, int]] = []
    left_out: Counter[str] = Counter()

    def names() -> Iterator[str]:
        for folder in folders:
            found = _files(root, folder, walked, times, left_out)
            ids.extend(name_to_int(name) for name in found)
            counts.append(len(found))
            yield from found

    listing = Listing(
        names=Names.of(names()),
        ids=torch.from_numpy(np.frombuffer(ids, dtype=np.int64)),
        counts=torch.tensor(counts, dtype=torch.int64),
        left_out=left_out,
    )
    return listing, walked, np.array(times, dtype=np.int64).reshape(-1, 2)


def _read(path: Path, root: Path, folders: Sequence[str]) -> Listing | None:
    """A stored list; None if there is none, a folder has changed, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            note = json.loads(str(arrays["note"]))
            kept = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "note"}
        if note["folders"] != [*folders]:
            return None
        for folder, times in zip(note["walked"], kept["times"].tolist(), strict=True):
            if _times((root / folder).stat()) != tuple(times):
                return None
        names = Names(kept["text"], kept["ends"])
        return Listing(names, kept["ids"], kept["counts"], note["left_out"])
    except _DAMAGED:  # listed anew, and written over
        return None
