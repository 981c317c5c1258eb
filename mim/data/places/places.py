"""The files that ``data.path`` and ``data.val_path`` name: folders, patterns, braces, URLs."""

from __future__ import annotations

import glob
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from mim.core.config import DataConfig
from mim.core.errors import blaming, setting_error
from mim.data.places.fetch import fetch, is_url
from mim.data.places.remote import Headers, RemoteFile, in_parallel, open_remote
from mim.data.places.splits import find_splits, split_of, split_of_file

Place: TypeAlias = Path | RemoteFile
"""A file on disk, or one that is read by URL."""

_MOST_FILES = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(pattern: str) -> list[str]:
    """All names that ``a{00..02}b{x,y}`` stands for, as in a shell.

    Raises:
        ValueError: for a range whose ends are not whole numbers, or more than 100,000 names.
    """
    found = list(itertools.islice(_expand(pattern), _MOST_FILES + 1))
    if len(found) > _MOST_FILES:
        raise ValueError(f"stands for more than {_MOST_FILES:,} files")
    return found


def _expand(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    inside = match[1]
    choices: Iterable[str] = inside.split(",")
    if ".." in inside:
        first, _, last = inside.partition("..")
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"{{{inside}}} is no range of whole numbers")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        low, high = int(first), int(last)
        step = 1 if low <= high else -1
        choices = (f"{number:0{width}d}" for number in range(low, high + step, step))
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for choice in choices:
        yield from _expand(f"{head}{choice}{tail}")


def is_local(given: str, ending: str) -> bool:
    """Whether a path names files with this ending, on disk or by URL, rather than a hub's name."""
    return Path(given).exists() or is_url(given) or given.endswith(ending)


def find(setting: str, given: str, ending: str, streaming: bool = False) -> Sequence[Place]:
    """The files that a folder, file, pattern or URL names, in order.

    A folder stands for its files with the ending, ``.tar``; if it holds none, for those below it.
    Files by URL are fetched, or with ``streaming`` read in place, where their server can.
    ``setting`` and its value ``given`` are for messages.

    Raises:
        UserError: if there are none, or one is missing.
    """
    try:
        places = expand(given)
    except ValueError as error:
        raise setting_error(setting, given, str(error)) from error
    if is_url(given):
        return open_urls(places) if streaming else fetch(places)
    found: list[Path] = []
    for place in places:
        if Path(place).is_dir():
            here = sorted(Path(place).glob(f"*{ending}"))
            found += here or sorted(Path(place).rglob(f"*{ending}"))
        elif glob.has_magic(place):
            found += [Path(name) for name in sorted(glob.glob(place, recursive=True))]
        else:
            found.append(Path(place))
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        what = f"has no file {missing[0].as_posix()}" if missing else f"names no {ending} files"
        raise setting_error(setting, given, what)
    return found


def open_urls(urls: Sequence[str], headers: Headers = ()) -> list[Place]:
    """Files by URL, to be read in place; where the server cannot, they are fetched with a warning.

    Raises:
        UserError: for a URL that is refused, or fails each time.
    """
    opened = in_parallel(lambda url: open_remote(url, headers), urls)
    missing = [url for url, file in zip(urls, opened, strict=True) if file is None]
    if missing:
        reason = "the server answers no range requests, so they are fetched whole first"
        log = logging.getLogger("mim")
        log.warning("data.streaming: %d files, of them %s: %s", len(missing), missing[0], reason)
    fetched = dict(zip(missing, fetch(missing), strict=True))
    return [fetched[url] if file is None else file for url, file in zip(urls, opened, strict=True)]


def divide(config: DataConfig, ending: str) -> tuple[Sequence[Place], Sequence[Place]]:
    """Files of train, and of val, which may be none.

    ``data.val_path`` names those of val; without it a folder does in which ``train/`` stands beside
    ``val/`` or ``test/``; without that the files' names, see :func:`split_of_file`. Files of test
    are used where there are none of val.

    Raises:
        UserError: see :func:`find`.
    """
    assert config.path is not None
    streaming = config.streaming
    if config.val_path is not None:
        val = find("data.val_path", config.val_path, ending, streaming)
        return find("data.path", config.path, ending, streaming), val
    root = Path(config.path)
    if root.is_dir():
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        with blaming("data.path", config.path):
            train, held_out = find_splits(name for name in folders if split_of(name))
            if train is not None:
                found = find("data.path", str(root / held_out), ending) if held_out else []
                return find("data.path", str(root / train), ending), found
    files = find("data.path", config.path, ending, streaming)
    splits = [split_of_file(place.name) for place in files]
    if not {None, "train"} & {*splits}:
        return files, []
    held_out = "val" if "val" in splits else "test"
    pairs = list(zip(files, splits, strict=True))
    train_files = [place for place, split in pairs if split in (None, "train")]
    return train_files, [place for place, split in pairs if split == held_out]
