"""Files that are whole or not there at all."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import tempfile
import tokenize
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mim.core.errors import UserError

NPY_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError),
    *(SyntaxError, tokenize.TokenError, RecursionError),  # its header is parsed as Python's
    MemoryError,  # the header may promise any size
)
"""What ``np.load`` raises for a file that is damaged, or made to be."""

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".npy", ".npz", ".dcm"),
)
"""Of files that hold images; ``.npy`` and ``.npz`` are (height, width), (height, width, channels)
or (channels, height, width), for values and channels that no image format has."""

_COMPANIONS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}

_MOST_VALUES, _DEEPEST = 100_000, 50


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that systems and archivers leave among the user's."""
    return name.startswith(".") or name in _COMPANIONS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; links in a circle lead nowhere."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def decode_text(data: bytes) -> str:
    """Text as editors, spreadsheets and shells save it: UTF-8, or what a byte order mark says.

    Raises:
        UnicodeDecodeError: if it is neither.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig")


@dataclass
class Folder:
    """A folder that :func:`walk` found."""

    path: str
    """POSIX path relative to the root of the walk."""
    files: list[str]
    """Names of its files, without hidden ones."""
    status: os.stat_result


def walk(root: Path, start: str = ".") -> Iterator[Folder]:
    """Walk the folders at any depth below ``root/start``, each real one once, through links too.

    A link to a folder above it, or to one that the walk finds anyway, is skipped: it would list
    files again, or never end. Folders come before links.

    Raises:
        OSError: if a folder cannot be read.
    """
    real = Path(root, start).resolve()
    seen = {_identity(folder.stat()) for folder in real.parents}
    waiting, links = deque([start]), deque[str]()
    while waiting or links:
        current = waiting.popleft() if waiting else links.popleft()
        status = Path(root, current).stat()
        if _identity(status) in seen:
            continue
        seen.add(_identity(status))
        found = Folder(current, [], status)
        below: list[str] = []
        with os.scandir(Path(root, current)) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                path = entry.name if current == "." else f"{current}/{entry.name}"
                if not is_folder(entry):
                    found.files.append(entry.name)
                elif entry.is_symlink():
                    links.append(path)
                else:
                    below.append(path)
        waiting.extend(sorted(below))
        links = deque(sorted(links))
        yield found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?"
    r"|\.inf|\.Inf|\.INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and a date is the text that stands there."""


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would take for something else."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, found) for tag, found in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that :func:`parse_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file as :func:`decode_text` and :func:`parse_yaml` do.

    Raises:
        ValueError: with the reason in one line, if it cannot be read.
    """
    try:
        return parse_yaml(decode_text(Path(path).read_bytes()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def parse_yaml(text: str) -> Any:
    """YAML as plain values: no objects, and no more of them than a file of settings has.

    A few lines of aliases to aliases can stand for any number of values.

    Raises:
        yaml.YAMLError: if it is no YAML, asks for objects, holds too much or nests too deeply.
    """
    try:
        loaded = yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it nests too deeply") from error
    except ValueError as error:  # a date that is none, a surrogate
        raise yaml.YAMLError(str(error)) from error
    waiting, count = [(loaded, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            limit = f"{_MOST_VALUES:,} values, aliases counted, or {_DEEPEST} levels"
            raise yaml.YAMLError(f"it holds more than {limit}")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(inner, depth + 1) for inner in value]
    return loaded


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file under another name, flush it to disk, and rename it to ``path``.

    Raises:
        OSError: where it cannot be written, with ``path`` as its file name.
    """
    # Short, whatever the length of its name.
    temporary = path.with_name(f".{_home()}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    _remove_orphans(path.parent)
    try:
        # Not by tempfile, whose files are the owner's alone: the umask has the say here.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # it may have been replaced by another
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary), temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _home() -> str:
    """Tells the machine, and the container, in which a process id means this process."""
    parts = [platform.node()]
    for file in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(file) if file.is_symlink() else file.read_text())
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


@functools.cache
def _remove_orphans(folder: Path) -> None:
    """Remove what processes that were killed here were writing in a folder; looks once."""
    for path in folder.glob(f".{_home()}-*-*.tmp"):
        process = path.name.split("-")[1]
        if process.isdecimal() and not _is_alive(int(process)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the files that a killed process was writing in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def _flush_folder(folder: Path) -> None:
    """Make a rename in a folder outlast a power cut."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, write)


def write_arrays(path: Path, arrays: Mapping[str, Any], compress: bool = True) -> None:
    """Write arrays by name as ``.npz``, atomically."""
    import numpy as np  # which ``mim --help`` does not wait for

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # savez appends .npz to a path, not to a file
            (np.savez_compressed if compress else np.savez)(file, **arrays)

    write_atomic(path, write)


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=1) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


_LOOKED_AT = 64
"""Files of a folder whose content is looked at."""


def content_digest(path: Path) -> str:
    """Digest of a file; of a folder, of its files' names and of some files' content."""
    if path.is_file():
        return file_digest(path)
    found = sorted(Path(place, name) for place, _, names in os.walk(path) for name in names)
    digest = hashlib.sha256()
    for number, file in enumerate(found):
        digest.update(os.fsencode(file.relative_to(path)) + b"\0")
        if number % -(-len(found) // _LOOKED_AT) == 0 and file.is_file():
            digest.update(file_digest(file).encode())
    return digest.hexdigest()


def prepare_folder(path: Path, setting: str = "output") -> None:
    """Make a folder; raise a ``UserError`` if files cannot be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{setting}: cannot write to {str(path)!r}: {reason}") from error
